"""From histories to sample files: what is in them, and what never is."""

from __future__ import annotations

import pytest
import torch

from examples.data.amazon import AmazonReviews, ItemData, PrecomputedSequenceDataset
from examples.data.samples import SEQUENCE_TEMPLATES
from examples.scripts.preprocessing.precompute_sequences import main
from rectokens.core.tokenizer import TokenSequence
from rectokens.integrations.hf import ItemAwareTokenizer
from rectokens.tokenizers.fitting import RQKMeansSettings, fit_rq_kmeans


@pytest.fixture
def item_tokenizer(data_root, tmp_path):
    """Gives every item of the data codes of its own, so that codes tell which item it is."""
    items = ItemData(data_root)
    tokenizer = fit_rq_kmeans([items.x], RQKMeansSettings(2, 40))
    assert len(torch.unique(tokenizer.encode(items.x).codes, dim=0)) == 40
    tokenizer.save(tmp_path / "tok" / "final.pt")
    return tokenizer


@pytest.fixture
def precompute(data_root, chat_model, item_tokenizer, tmp_path):
    def call(**options):
        defaults = {
            "root": str(data_root),
            "item_tok_path": str(tmp_path / "tok" / "final.pt"),
            "item_tok_type": "rqkmeans",
            "num_levels": 2,
            "codebook_size": 40,
            "model_name": str(chat_model),
            "output_dir": str(tmp_path / "pre"),
        }
        return main(**{**defaults, **options})

    return call


def read(path, chat_tokenizer, item_tokenizer, reviews):
    """Rows of the items that each sample asks with and answers with."""
    dataset = PrecomputedSequenceDataset(path)
    aware = ItemAwareTokenizer(chat_tokenizer, num_levels=2, codebook_size=40)
    assert dataset.original_vocab_size == aware.original_vocab_size
    row_of = {
        tuple(c): row for row, c in enumerate(item_tokenizer.encode(reviews.x).codes.tolist())
    }

    def rows(ids):
        parts = aware.decode_sequence(ids)
        return [row_of[tuple(p.codes.tolist())] for p in parts if isinstance(p, TokenSequence)]

    def texts(ids):
        said = aware.decode(ids)
        return {row for row, text in enumerate(reviews.text) if text in said}

    samples = []
    for sample in dataset:
        learned = sample["labels"] != -100
        first = int(learned.nonzero()[0])
        asked, answer = sample["input_ids"][:first], sample["input_ids"][first:]
        samples.append((rows(asked), rows(answer), texts(asked), texts(answer)))
    return dataset, samples


def test_no_held_out_item_is_in_a_sample_before_its_time(
    precompute, chat_tokenizer, item_tokenizer, data_root
):
    """Neither by its semantic ID nor by its description."""
    paths = precompute(seq_splits=("train", "eval", "test"), samples_per_user=5)
    assert [path.name for path in paths] == [
        f"beauty_{name}{kind}.pt" for name in ("train", "eval", "test") for kind in ("", "_item")
    ]
    reviews = AmazonReviews(data_root)
    for path, later in zip(paths[::2], (2, 1, 0), strict=True):
        dataset, samples = read(path, chat_tokenizer, item_tokenizer, reviews)
        users = dataset.meta["user_ids"].tolist()
        assert len(samples) == 5 * len(set(users))
        seen_templates = {user: set() for user in users}
        for at, (asked, answer, said, told) in enumerate(samples):
            whole = list(reviews.data.sequences[users[at]])
            visible, held_out = whole[: len(whole) - later], whole[len(whole) - later :]
            template = dataset.meta["templates"][at]
            seen_templates[users[at]].add(template)
            history = [row for row in dataset.meta["histories"][at].tolist() if row >= 0]
            target = int(dataset.meta["targets"][at])
            assert [*history, target] == visible[-len(history) - 1 :]
            assert answer == [target]
            assert asked == ([] if template.startswith("description") else history)
            assert not (set(asked) | set(answer) | said | told) & set(held_out)
            if template.startswith(("description", "mixed")):
                assert set(history) <= said
        assert all(names == set(SEQUENCE_TEMPLATES) for names in seen_templates.values())


def test_item_files_have_train_items_or_held_out_ones(
    precompute, chat_tokenizer, item_tokenizer, data_root
):
    paths = precompute()
    reviews = AmazonReviews(data_root)
    for path, mask in ((paths[1], reviews.is_train), (paths[3], ~reviews.is_train)):
        dataset, samples = read(path, chat_tokenizer, item_tokenizer, reviews)
        assert sorted(dataset.meta["targets"].tolist()) == sorted(
            mask.nonzero().squeeze(1).repeat(2).tolist()
        )
        for target, template, (asked, answer, said, told) in zip(
            dataset.meta["targets"].tolist(), dataset.meta["templates"], samples, strict=True
        ):
            if template == "description_to_sid":
                assert (asked, answer) == ([], [target])
                assert target in said
            else:
                assert (asked, answer) == ([target], [])
                assert target in told


def test_without_the_future_the_last_of_the_history_is_asked_for(
    precompute, chat_tokenizer, item_tokenizer, data_root
):
    (path,) = precompute(seq_splits=("test",), include_future=False, include_item_samples=False)
    reviews = AmazonReviews(data_root)
    dataset, samples = read(path, chat_tokenizer, item_tokenizer, reviews)
    assert not dataset.meta["include_future"]
    for user, (asked, answer, said, told) in zip(
        dataset.meta["user_ids"].tolist(), samples, strict=True
    ):
        whole = reviews.data.sequences[user]
        assert answer == [whole[-2]]
        assert whole[-1] not in {*asked, *said, *told}


def test_long_samples_lose_their_oldest_items(precompute):
    options = {"seq_splits": ("test",), "include_item_samples": False}
    (path,) = precompute(**options, templates=("sid_sequence_to_sid",))
    whole = PrecomputedSequenceDataset(path)
    lengths = [len(sample["input_ids"]) for sample in whole]
    limit = sorted(lengths)[len(lengths) // 2]
    assert max(lengths) > limit
    (path,) = precompute(**options, templates=("sid_sequence_to_sid",), max_length=limit)
    short = PrecomputedSequenceDataset(path)
    assert max(len(sample["input_ids"]) for sample in short) <= limit
    for at, (one, other) in enumerate(zip(whole, short, strict=True)):
        kept = [row for row in short.meta["histories"][at].tolist() if row >= 0]
        full = [row for row in whole.meta["histories"][at].tolist() if row >= 0]
        assert kept == full[-len(kept) :]
        tail = int((other["labels"] != -100).sum())
        assert tail == int((one["labels"] != -100).sum())
        if len(one["input_ids"]) <= limit:
            assert one["input_ids"].tolist() == other["input_ids"].tolist()


def test_the_same_seed_gives_the_same_files(precompute, tmp_path):
    def ids(seed):
        (path,) = precompute(
            seq_splits=("train",),
            include_item_samples=False,
            seed=seed,
            output_dir=str(tmp_path / f"pre{seed}"),
        )
        return [sample["input_ids"].tolist() for sample in PrecomputedSequenceDataset(path)]

    assert ids(1) == ids(1)
    assert ids(1) != ids(2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_levels": 3}, "num_levels 2; 3 was asked for"),
        ({"item_tok_type": "rqvae"}, "final.pt"),
        ({"seq_splits": ("trian",)}, "seq_split is 'trian'"),
        ({"templates": ("sid_to_sid",)}, "template is 'sid_to_sid'; allowed are"),
        ({"samples_per_user": 6}, "samples_per_user is 6; allowed are 1 to 5"),
        ({"max_length": 0}, "max_length is 0"),
        (
            {"features": "text+collaborative", "behaviour_dims": 4},
            r"shape \(40, 12\); the item tokenizer takes \(N, 8\)",
        ),
    ],
)
def test_bad_parameters_are_named_and_nothing_is_written(precompute, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        precompute(**options)
    assert not (tmp_path / "pre").exists()
