"""Reading a data folder: what it holds, and what is wrong with one that is not right."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import numpy as np
import pytest

from server.demo.amazon import load_amazon
from server.demo.data import DataFolderError, item_counts, leave_one_out

ITEMS = [
    {"id": 1, "asin": "B00A", "text": "title: a", "title": "a", "brand": "x", "categories": []},
    {"id": 2, "asin": "B00B", "text": "title: b", "title": "b", "categories": ["C", "D"]},
    {"id": 3, "asin": "B00C", "text": "brand: y", "title": None},
]


def write_folder(folder, *, items=ITEMS, sequences="7 1 2 3\n8 3 1\n", embeddings=None):
    folder.mkdir(parents=True, exist_ok=True)
    with gzip.open(folder / "items.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(item) + "\n" for item in items)
    with gzip.open(folder / "sequences.txt.gz", "wt", encoding="utf-8") as file:
        file.write(sequences)
    if embeddings is None:
        embeddings = np.arange(6, dtype=np.float16).reshape(3, 2)
    np.save(folder / "embeddings.f16.npy", embeddings)
    return folder


@pytest.mark.parametrize("given_parent", [False, True])
def test_reads_items_sequences_and_embeddings(tmp_path, given_parent):
    folder = write_folder(tmp_path / "amazon-beauty")
    data = load_amazon(tmp_path if given_parent else folder)
    assert data.name == "amazon-beauty"
    assert data.item_ids == ("B00A", "B00B", "B00C")
    assert data.sequences == ((0, 1, 2), (2, 0))
    assert data.embeddings.dtype == np.float32
    assert data.embeddings[2].tolist() == [4.0, 5.0]
    assert data.metadata["category"].to_list() == ["", "C > D", ""]
    assert data.metadata["title"].to_list() == ["a", "b", ""]
    assert data.metadata["brand"].to_list() == ["x", "", ""]


@pytest.mark.parametrize("name", ["items.jsonl.gz", "sequences.txt.gz", "embeddings.f16.npy"])
def test_a_missing_file_is_named(tmp_path, name):
    folder = write_folder(tmp_path / "data")
    (folder / name).unlink()
    with pytest.raises(DataFolderError, match=f"lacks {name}"):
        load_amazon(folder)


@pytest.mark.parametrize("name", ["items.jsonl.gz", "sequences.txt.gz"])
def test_a_file_cut_short_is_named(tmp_path, name):
    folder = write_folder(tmp_path / "data")
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[: len(whole) - 9])
    with pytest.raises(DataFolderError, match=rf"{name} is damaged or cut short"):
        load_amazon(folder)


def test_embeddings_cut_short_are_named(tmp_path):
    folder = write_folder(tmp_path / "data")
    path = folder / "embeddings.f16.npy"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(DataFolderError, match=r"no readable \.npy array"):
        load_amazon(folder)


def test_pickled_embeddings_are_refused(tmp_path):
    folder = write_folder(tmp_path / "data", embeddings=np.array([object()] * 3))
    with pytest.raises(DataFolderError, match=r"no readable \.npy array"):
        load_amazon(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"embeddings": np.zeros((2, 2), np.float16)}, "has 2 rows and items.jsonl.gz has 3"),
        ({"embeddings": np.zeros(3, np.float16)}, r"no \(N, D\) array"),
        ({"embeddings": np.zeros((3, 2), np.int8)}, "dtype int8"),
        ({"embeddings": np.full((3, 2), np.inf, np.float16)}, "not finite"),
        ({"sequences": "7 1 4\n"}, "line 1 names item 4; allowed are 1 to 3"),
        ({"sequences": "7 1\n8 0\n"}, "line 2 names item 0"),
        ({"sequences": "7 1 x\n"}, "line 1: expected 'user item item ...'"),
        ({"sequences": "7 1\n\n"}, "line 2: expected 'user item item ...'"),
        ({"sequences": ""}, "no users"),
        ({"items": []}, "no items"),
        ({"items": [ITEMS[0], ITEMS[2], ITEMS[1]]}, "line 2 has id 3; expected 2"),
        ({"items": [ITEMS[0], {**ITEMS[1], "asin": "B00A"}, ITEMS[2]]}, "item ids repeat"),
        ({"items": [{"id": 1, "text": "t"}]}, "line 1: 'asin' must be a text"),
        ({"items": [{**ITEMS[0], "categories": "C"}]}, "'categories' must be a list"),
        ({"items": [[1, 2]]}, "line 1 is no JSON object"),
    ],
)
def test_files_that_are_malformed_or_do_not_fit_are_refused(tmp_path, changes, message):
    folder = write_folder(tmp_path / "data", **changes)
    with pytest.raises(DataFolderError, match=message):
        load_amazon(folder)


def test_a_folder_that_is_none_or_empty_is_refused(tmp_path):
    with pytest.raises(DataFolderError, match="is no folder"):
        load_amazon(tmp_path / "nowhere")
    with pytest.raises(DataFolderError, match=r"holds none of sequences\.txt\.gz"):
        load_amazon(tmp_path)


def test_the_real_data_has_the_size_it_is_known_for():
    root = os.environ.get("RECTOKENS_DATA_DIR")
    if not root:
        pytest.skip("RECTOKENS_DATA_DIR is not set: no folder with amazon-beauty to read")
    data = load_amazon(Path(root))
    assert len(data.item_ids) == 12_101
    assert len(data.sequences) == 22_363
    assert sum(map(len, data.sequences)) == 198_502
    assert data.embeddings.shape == (12_101, 384)
    split = leave_one_out(data.sequences)
    assert split.skipped == 0
    assert item_counts(split.train, 12_101).sum() == 198_502 - 2 * 22_363
