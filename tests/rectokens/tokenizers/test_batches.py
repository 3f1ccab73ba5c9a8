import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rectokens.tokenizers.batches import checked_batches, reservoir_sample, shuffled_batches

splits = st.lists(st.integers(0, 30), min_size=1, max_size=8)


def numbered(sizes):
    """Batches of one column that counts the rows."""
    total = sum(sizes)
    return list(torch.arange(total, dtype=torch.float32)[:, None].split(sizes))


def test_arrays_and_tensors_become_float32(tmp_path):
    np.save(tmp_path / "x.npy", np.ones((4, 3), np.float16))
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    batches = list(checked_batches([mapped[:2], torch.zeros(1, 3, dtype=torch.float64)]))
    assert [tuple(batch.shape) for batch in batches] == [(2, 3), (1, 3)]
    assert all(batch.dtype == torch.float32 for batch in batches)


def test_bad_batches_are_named():
    with pytest.raises(TypeError, match="read only once"):
        list(checked_batches(iter([torch.zeros(1, 2)])))
    with pytest.raises(ValueError, match="batch 1 has shape"):
        list(checked_batches([torch.zeros(1, 2), torch.zeros(1, 3)]))
    with pytest.raises(ValueError, match="batch 0 has shape"):
        list(checked_batches([torch.zeros(2)]))
    with pytest.raises(ValueError, match="batch 1 has NaN"):
        list(checked_batches([torch.zeros(1, 1), torch.full((1, 1), torch.nan)]))


@settings(deadline=None, max_examples=50)
@given(sizes=splits, num_rows=st.integers(1, 60), seed=st.integers(0, 2**31))
def test_reservoir_holds_distinct_rows_all_of_them_if_few(sizes, num_rows, seed):
    if sum(sizes) == 0:
        with pytest.raises(ValueError, match="no rows"):
            reservoir_sample(numbered(sizes), num_rows, np.random.default_rng(seed))
        return
    sample, seen = reservoir_sample(numbered(sizes), num_rows, np.random.default_rng(seed))
    assert seen == sum(sizes)
    assert sample.shape == (min(num_rows, seen), 1)
    assert sample.unique().numel() == sample.shape[0]
    if seen <= num_rows:
        assert sample.flatten().tolist() == list(range(seen))


def test_every_row_is_as_likely_to_be_sampled():
    rng = np.random.default_rng(0)
    trials, total, num_rows = 4000, 20, 5
    counts = torch.zeros(total)
    for _ in range(trials):
        sample, _ = reservoir_sample(numbered([7, 1, 9, 3]), num_rows, rng)
        counts[sample.flatten().long()] += 1
    share = num_rows / total
    deviation = (share * (1 - share) / trials) ** 0.5
    assert (counts / trials - share).abs().max() < 5 * deviation


@settings(deadline=None, max_examples=50)
@given(
    sizes=splits,
    batch_size=st.integers(1, 20),
    buffer_rows=st.integers(1, 80),
    seed=st.integers(0, 2**31),
)
def test_shuffling_keeps_every_row_once(sizes, batch_size, buffer_rows, seed):
    batches = list(
        shuffled_batches(
            numbered(sizes), batch_size, buffer_rows, torch.Generator().manual_seed(seed)
        )
    )
    assert all(1 <= len(batch) <= batch_size for batch in batches)
    assert all(len(batch) == batch_size for batch in batches[:-1])
    seen = [int(value) for batch in batches for value in batch.flatten()]
    assert sorted(seen) == list(range(sum(sizes)))


def test_shuffling_mixes_within_the_buffer():
    batches = shuffled_batches(numbered([500]), 50, 500, torch.Generator().manual_seed(0))
    first = next(batches).flatten()
    assert first.max() > 400
    assert first.min() < 100
