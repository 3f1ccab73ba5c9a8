import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rectokens.ops.nearest_reference import nearest_direct
from rectokens.quantizers.kmeans import KMeansQuantizer


def rows(count, dim=4, seed=0):
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))


def running_mean_step(centroids, counts, batch):
    """The definition, a centroid at a time, in float64."""
    codes = nearest_direct(batch, centroids)
    centroids, counts = centroids.double().clone(), counts.clone()
    for code in range(centroids.shape[0]):
        members = batch[codes == code].double()
        if len(members):
            total = counts[code] * centroids[code] + members.sum(dim=0)
            counts[code] += len(members)
            centroids[code] = total / counts[code]
    return centroids, counts


def test_before_fitting():
    quantizer = KMeansQuantizer(3, 4)
    assert quantizer._fitted is False
    assert quantizer._counts is None
    with pytest.raises(RuntimeError, match="fit_step"):
        quantizer.quantize(rows(2))


def test_first_step_seeds_then_takes_means():
    batch = torch.tensor([[0.0], [1.0], [100.0], [101.0]])
    quantizer = KMeansQuantizer(2, 1)
    assert quantizer.fit_step(batch) is quantizer
    assert quantizer._fitted is True
    assert sorted(quantizer.codebook.embeddings.flatten().tolist()) == [0.5, 100.5]
    assert quantizer._counts.dtype == torch.long
    assert quantizer._counts.tolist() == [2, 2]


@settings(deadline=None, max_examples=40)
@given(
    size=st.integers(1, 12),
    batches=st.lists(st.integers(1, 30), min_size=1, max_size=4),
    seed=st.integers(0, 2**31),
)
def test_steps_are_running_means(size, batches, seed):
    quantizer = KMeansQuantizer(size, 3, seed=seed)
    quantizer.fit_step(rows(batches[0], 3, seed))
    for index, count in enumerate(batches[1:]):
        batch = rows(count, 3, seed + index + 1)
        expected, counts = running_mean_step(
            quantizer.codebook.embeddings, quantizer._counts, batch
        )
        quantizer.fit_step(batch)
        assert torch.equal(quantizer._counts, counts)
        torch.testing.assert_close(
            quantizer.codebook.embeddings.double(), expected, rtol=1e-5, atol=1e-6
        )


def test_unhit_centroids_stay():
    quantizer = KMeansQuantizer(2, 1).fit_step(torch.tensor([[0.0], [10.0]]))
    near, far = quantizer.codebook.embeddings.flatten().tolist().index(0.0), None
    far = 1 - near
    quantizer.fit_step(torch.tensor([[1.0], [2.0]]))
    assert quantizer.codebook.embeddings[far].item() == 10.0
    assert quantizer.codebook.embeddings[near].item() == 1.0
    assert quantizer._counts[far] == 1


def test_fewer_rows_than_codes_repeats_rows():
    batch = rows(3)
    quantizer = KMeansQuantizer(8, 4).fit_step(batch)
    assert torch.cdist(quantizer.codebook.embeddings, batch).min(dim=1).values.max() < 1e-3
    assert torch.cdist(batch, quantizer.codebook.embeddings).min(dim=1).values.max() < 1e-3
    assert quantizer._counts.sum() == 3


def test_seed_decides():
    batch = rows(200)
    first = KMeansQuantizer(16, 4, seed=1).fit_step(batch).codebook.embeddings
    assert torch.equal(first, KMeansQuantizer(16, 4, seed=1).fit_step(batch).codebook.embeddings)
    assert not torch.equal(
        first, KMeansQuantizer(16, 4, seed=2).fit_step(batch).codebook.embeddings
    )


def test_quantize():
    quantizer = KMeansQuantizer(5, 4).fit_step(rows(50))
    x = rows(7, seed=1).requires_grad_()
    out = quantizer.quantize(x)
    assert torch.equal(out.codes, nearest_direct(x.detach(), quantizer.codebook.embeddings))
    assert torch.equal(out.quantized, quantizer.codebook.embeddings[out.codes])
    assert torch.equal(out.residuals, x.detach() - out.quantized)
    assert out.commitment_loss is None
    assert not out.quantized.requires_grad
    assert not out.residuals.requires_grad


def test_lloyd_lowers_the_error():
    data = rows(400)
    quantizer = KMeansQuantizer(16, 4)
    quantizer.fit_step(data)
    first = quantizer.quantize(data).residuals.square().mean()
    for _ in range(10):
        quantizer.fit_step(data)
    assert quantizer.quantize(data).residuals.square().mean() < first


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int32])
def test_input_is_cast_to_float32(dtype):
    quantizer = KMeansQuantizer(2, 1).fit_step(torch.tensor([[0], [4]], dtype=dtype))
    assert quantizer.codebook.embeddings.dtype == torch.float32


def test_bad_batches():
    quantizer = KMeansQuantizer(2, 4)
    with pytest.raises(ValueError, match="0 rows"):
        quantizer.fit_step(rows(0))
    with pytest.raises(ValueError, match="expected \\(B, 4\\)"):
        quantizer.fit_step(rows(3, 5))
    bad = rows(3)
    bad[1, 2] = float("nan")
    with pytest.raises(ValueError, match="first in row 1"):
        quantizer.fit_step(bad)
    assert quantizer._fitted is False


def test_state_dict_round_trip_goes_on_fitting():
    fitted = KMeansQuantizer(5, 4).fit_step(rows(50))
    loaded = KMeansQuantizer(5, 4)
    loaded.load_state_dict(fitted.state_dict())
    twin = copy.deepcopy(fitted)
    for quantizer in (fitted, loaded, twin):
        quantizer.fit_step(rows(20, seed=9))
    assert torch.equal(fitted.codebook.embeddings, loaded.codebook.embeddings)
    assert torch.equal(fitted.codebook.embeddings, twin.codebook.embeddings)
    assert torch.equal(fitted._counts, loaded._counts)


def test_set_fitted_takes_over_centroids():
    counts = torch.tensor([3, 1])
    quantizer = KMeansQuantizer(2, 1)
    quantizer.set_fitted(torch.tensor([[0.0], [10.0]]), counts)
    quantizer.fit_step(torch.tensor([[4.0]]))
    assert quantizer.codebook.embeddings.flatten().tolist() == [1.0, 10.0]
    assert counts.tolist() == [3, 1]
