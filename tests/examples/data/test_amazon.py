"""The data classes: what they read, and that nothing held out leaks."""

from __future__ import annotations

import os

import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from examples.data.amazon import (
    AmazonReviews,
    DataFolderError,
    ItemData,
    SeqBatch,
    UserSequenceDataset,
)
from server.demo.data import METADATA_COLUMNS, DemoData


def real_data():
    root = os.environ.get("RECTOKENS_DATA_DIR")
    if not root:
        pytest.skip("RECTOKENS_DATA_DIR is not set: no folder with amazon-beauty to read")
    return AmazonReviews(root, download=False)


@pytest.mark.parametrize("where", ["root", "itself"])
def test_reads_the_folder_layout(data_root, where):
    root = data_root if where == "root" else data_root / "amazon-beauty"
    reviews = AmazonReviews(root, "beauty", download=False)
    assert reviews.num_items == 40
    assert reviews.x.shape == (40, 8)
    assert reviews.x.dtype == torch.float32
    assert reviews.text[0].startswith("title: thing 1;")
    assert reviews.item_ids[0] == "B001"
    assert reviews.skipped_users == 2


def test_the_training_mask_depends_on_the_seed_alone(data_root):
    masks = [AmazonReviews(data_root, seed=seed).is_train for seed in (1, 1, 2)]
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


def test_about_95_percent_of_real_items_are_training_items():
    assert 0.94 < real_data().is_train.float().mean() < 0.96


def test_users_with_fewer_than_three_items_are_counted_and_in_no_split(data_root, caplog):
    reviews = AmazonReviews(data_root)
    assert "2 users with fewer than three items left out" in caplog.text
    for part in reviews.histories.values():
        assert len(part["userId"]) == 28
        assert not {0, 1} & set(part["userId"].tolist())


def test_only_short_users_is_an_error(tmp_path, data_folder_writer):
    data_folder_writer(tmp_path / "amazon-beauty", num_users=4, short_users=4)
    with pytest.raises(ValueError, match="none of the 4 users"):
        AmazonReviews(tmp_path)


def test_the_histories_of_a_user(data_root):
    reviews = AmazonReviews(data_root)
    for at, user in enumerate(reviews.histories["train"]["userId"].tolist()):
        whole = list(reviews.data.sequences[user])
        train, evaluation, test = (reviews.histories[name] for name in ("train", "eval", "test"))
        assert [*train["itemId"][at].tolist(), int(train["itemId_fut"][at])] == whole[:-2]
        assert int(evaluation["itemId_fut"][at]) == whole[-2]
        assert int(test["itemId_fut"][at]) == whole[-1]
        for part, history in ((evaluation, whole[:-2]), (test, whole[:-1])):
            row = part["itemId"][at].tolist()
            assert len(row) == 20
            assert [item for item in row if item >= 0] == history[-20:]


def check_no_leak(sequences, reviews):
    """Held-out items of a user appear in no row of theirs that comes before."""
    train = UserSequenceDataset(reviews, seq_split="train", max_seq_len=50)
    evaluation = UserSequenceDataset(reviews, seq_split="eval", max_seq_len=50)
    test = UserSequenceDataset(reviews, seq_split="test", max_seq_len=50)
    for dataset, held_out in ((train, 2), (evaluation, 1), (test, 0)):
        for user, ids, following, x, x_fut, mask in dataset:
            whole = list(sequences[int(user)])
            seen = [*ids[mask].tolist(), int(following)]
            # No user has an item twice, so rows tell whether a later item is there.
            assert not set(seen) & set(whole[len(whole) - held_out :])
            assert seen == whole[: len(whole) - held_out][-len(seen) :]
            assert torch.equal(x[mask], reviews.x[ids[mask]])
            assert not x[~mask].any()
            assert torch.equal(x_fut, reviews.x[following])


def test_no_test_item_leaks(data_root):
    reviews = AmazonReviews(data_root)
    check_no_leak(reviews.data.sequences, reviews)


def test_no_test_item_leaks_in_the_real_data():
    reviews = real_data()
    sequences = reviews.data.sequences
    targets = {}
    for name in ("train", "eval", "test"):
        dataset = UserSequenceDataset(reviews, seq_split=name, max_seq_len=300)
        assert len(dataset) == 22_363
        targets[name] = dataset.ids_fut
        later = {"train": 2, "eval": 1, "test": 0}[name]
        for user, ids, following in zip(
            dataset.user_ids.tolist(), dataset.ids.tolist(), dataset.ids_fut.tolist(), strict=True
        ):
            seen = [*(item for item in ids if item >= 0), following]
            assert seen == list(sequences[user][: len(sequences[user]) - later])
    assert not (targets["test"] == targets["eval"]).any()


@settings(max_examples=25, deadline=None)
@given(st.lists(st.permutations(range(8)), min_size=2, max_size=5), st.data())
def test_collaborative_vectors_do_not_depend_on_what_is_held_out(users, data):
    def others(user):
        held_out = data.draw(st.lists(st.sampled_from(user), min_size=2, max_size=2, unique=True))
        return [*user[:-2], *held_out]

    made = [
        AmazonReviews.from_data(demo_data(sequences)).vectors(
            "text+collaborative", behaviour_dims=3
        )
        for sequences in (users, [others(user) for user in users])
    ]
    assert torch.equal(*made)


def demo_data(sequences):
    texts = torch.randn(8, 4, generator=torch.Generator().manual_seed(1)).numpy()
    names = tuple(f"B{row}" for row in range(8))
    columns = {column: [""] * 8 for column in METADATA_COLUMNS}
    return DemoData(
        "made", names, names, texts, tuple(map(tuple, sequences)), pl.DataFrame(columns)
    )


@pytest.mark.parametrize("seq_split", ["train", "eval", "test"])
def test_long_histories_keep_their_newest_items(data_root, seq_split):
    dataset = UserSequenceDataset(data_root, "beauty", seq_split, max_seq_len=2)
    assert dataset[0].ids.shape == (2,)
    whole = UserSequenceDataset(data_root, "beauty", seq_split, max_seq_len=50)
    for short, long in zip(dataset, whole, strict=True):
        assert short.ids[short.seq_mask].tolist() == long.ids[long.seq_mask].tolist()[-2:]


def test_training_rows_without_history_are_left_out_and_counted(tmp_path, data_folder_writer):
    folder = data_folder_writer(tmp_path / "amazon-beauty", num_users=60)
    reviews = AmazonReviews(folder)
    alone = sum(len(part) == 1 for part in reviews.leave_one_out.train)
    assert alone > 0
    assert UserSequenceDataset(reviews).without_history == alone
    assert UserSequenceDataset(reviews, seq_split="eval").without_history == 0


def test_a_data_loader_makes_batches(data_root):
    batch = next(iter(DataLoader(UserSequenceDataset(data_root), batch_size=4)))
    assert isinstance(batch, SeqBatch)
    assert batch.user_ids.shape == (4,)
    assert batch.ids.shape == batch.seq_mask.shape == (4, 20)
    assert batch.x.shape == (4, 20, 8)
    assert batch.x_fut.shape == (4, 8)
    items = next(iter(DataLoader(ItemData(data_root), batch_size=4)))
    assert items.x.shape == (4, 8)
    assert items.ids.tolist() == [0, 1, 2, 3]
    assert items.user_ids.tolist() == items.ids_fut.tolist() == [-1] * 4


def test_train_and_eval_items_are_all_items(data_root):
    parts = [set(ItemData(data_root, train_test_split=name).rows.tolist()) for name in PARTS]
    assert parts[0] == parts[1] | parts[2] == set(range(40))
    assert not parts[1] & parts[2]


PARTS = ("all", "train", "eval")


def test_collaborative_features_stand_beside_the_text(data_root):
    data = ItemData(
        data_root, features="text+collaborative", behaviour_weight=0.5, behaviour_dims=6
    )
    assert data.x.shape == (40, 14)
    assert data[3].x.tolist() == data.x[3].tolist()
    norms = data.x[:, 8:].norm(dim=1)
    assert norms == pytest.approx(torch.full((40,), 0.5).tolist(), abs=1e-5)


def test_behaviour_vectors_tell_who_is_met_with_whom():
    from examples.data.item_vectors import item_vectors

    # Two groups that never mix; the texts tell nothing.
    rng = torch.Generator().manual_seed(0)
    users = [(torch.randperm(6, generator=rng) + 6 * (n % 2)).tolist() for n in range(60)]
    vectors = item_vectors(
        torch.eye(12).numpy(), users, behaviour_weight=1.0, behaviour_dims=2, seed=0
    )[:, 12:]
    similar = vectors @ vectors.T
    assert similar[:6, :6].min() > similar[:6, 6:].max() + 0.5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: AmazonReviews(root, "beuty"), "split is 'beuty'; allowed are 'beauty'"),
        (lambda root: UserSequenceDataset(root, seq_split="tset"), "seq_split is 'tset'"),
        (lambda root: UserSequenceDataset(root, max_seq_len=0), "max_seq_len is 0"),
        (lambda root: ItemData(root, train_test_split="test"), "train_test_split is 'test'"),
        (lambda root: ItemData(root, features="image"), "features is 'image'; allowed are 'text'"),
        (
            lambda root: ItemData(root, features="text+collaborative", behaviour_dims=41),
            "behaviour_dims is 41; allowed are 1 to 40",
        ),
        (
            lambda root: ItemData(root, features="text+collaborative", behaviour_weight=0.0),
            "behaviour_weight is 0.0",
        ),
    ],
)
def test_bad_arguments_name_what_is_allowed(data_root, make, message):
    with pytest.raises(ValueError, match=message):
        make(data_root)


@pytest.mark.parametrize("name", ["items.jsonl.gz", "sequences.txt.gz", "embeddings.f16.npy"])
def test_a_partial_folder_is_an_error_and_nothing_is_fetched(data_root, name):
    (data_root / "amazon-beauty" / name).unlink()
    with pytest.raises(DataFolderError, match=f"lacks {name}"):
        AmazonReviews(data_root, base_url="http://127.0.0.1:9/never")


def test_a_missing_folder_without_download_names_where_it_looked(tmp_path):
    with pytest.raises(DataFolderError, match="amazon-beauty"):
        AmazonReviews(tmp_path / "nothing", download=False)


def test_a_folder_of_another_data_set_is_not_taken(data_root):
    with pytest.raises(DataFolderError, match="holds 'beauty', and split is 'toys'"):
        AmazonReviews(data_root / "amazon-beauty", "toys", download=False)
