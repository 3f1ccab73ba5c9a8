"""Files of samples."""

from __future__ import annotations

import pytest
import torch

from examples.data.amazon import PrecomputedSequenceDataset
from examples.data.precomputed import write_samples
from rectokens.integrations.hf.collator import PrecomputedSequenceCollator

SIZES = {"original_vocab_size": 10, "num_levels": 2, "codebook_size": 4}


def test_a_file_is_read_as_it_was_written(tmp_path):
    path = tmp_path / "deep" / "samples.pt"
    samples = [([1, 2, 3], [-100, 2, 3]), ([4], [-100]), ([5, 6], [-100, 6])]
    meta = {"split": "train", "targets": torch.tensor([1, 2, 3]), "templates": ["a", "b"]}
    assert write_samples(path, samples, **SIZES, meta=meta) == 3
    dataset = PrecomputedSequenceDataset(path)
    assert len(dataset) == len(dataset.samples) == 3
    for sample, (ids, labels) in zip(dataset, samples, strict=True):
        assert sample["input_ids"].tolist() == ids
        assert sample["labels"].tolist() == labels
        assert sample["labels"].dtype == torch.long
    assert {name: getattr(dataset, name) for name in SIZES} == SIZES
    assert dataset.meta["targets"].tolist() == [1, 2, 3]
    batch = PrecomputedSequenceCollator(pad_token_id=0)([dataset[0], dataset[1]])
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 0, 0]]


def test_unequal_lengths_are_refused_and_nothing_is_written(tmp_path):
    with pytest.raises(ValueError, match="sample 1 has 2 ids and 1 labels"):
        write_samples(tmp_path / "x.pt", [([1], [1]), ([1, 2], [1])], **SIZES, meta={})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no tensors", "no readable sample file"),
        ([1, 2], "it has no samples"),
        ({"samples": [], "num_levels": 1, "codebook_size": 1}, "it has no original_vocab_size"),
        ({"samples": [], **SIZES, "num_levels": 0}, "num_levels is 0"),
        (
            {"samples": [{"input_ids": torch.ones(2), "labels": torch.ones(3)}], **SIZES},
            r"sample 0 has ids of shape \(2,\) and labels of shape \(3,\)",
        ),
    ],
)
def test_a_file_of_another_kind_is_refused(tmp_path, content, message):
    path = tmp_path / "x.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(ValueError, match=message):
        PrecomputedSequenceDataset(path)


def test_a_file_cut_short_is_refused(tmp_path):
    path = tmp_path / "x.pt"
    write_samples(path, [([1, 2], [1, 2])] * 100, **SIZES, meta={})
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match="no readable sample file"):
        PrecomputedSequenceDataset(path)


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        PrecomputedSequenceDataset(tmp_path / "none.pt")
