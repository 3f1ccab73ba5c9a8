import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rectokens.ops import nearest_reference
from rectokens.ops.nearest_reference import nearest_direct, nearest_exact, squared_distances


@st.composite
def searches(draw):
    """Queries and codebooks where the expanded form of the distance is hard pressed."""
    rows, codes = draw(st.integers(0, 40)), draw(st.integers(1, 40))
    dim = draw(st.integers(1, 70))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x = torch.randn(rows, dim, generator=generator)
    codebook = torch.randn(codes, dim, generator=generator)
    kind = draw(st.sampled_from(["plain", "offset", "grid", "near", "copies", "outlier", "scaled"]))
    if kind == "offset":
        shift = draw(st.sampled_from([1e2, 1e4, 1e6]))
        x, codebook = x + shift, codebook + shift
    elif kind == "grid":
        x, codebook = x.round(), codebook.round()
    elif kind == "near":
        codebook = codebook[:1] + codebook * draw(st.sampled_from([1e-3, 1e-5, 1e-7]))
    elif kind == "copies":
        codebook = codebook[torch.randint(codes, (codes,), generator=generator)]
    elif kind == "outlier":
        codebook[0] *= 1e6
    elif kind == "scaled":
        scale = draw(st.sampled_from([1e-30, 1e-12, 1e12, 1e25]))
        x, codebook = x * scale, codebook * scale
    return x, codebook


@settings(deadline=None, max_examples=150)
@given(searches())
def test_exact_search_equals_the_definition(search):
    x, codebook = search
    assert torch.equal(nearest_exact(x, codebook), nearest_direct(x, codebook))


@pytest.mark.parametrize("shape", [(257, 64, 129), (64, 384, 256), (33, 7, 1), (5, 1, 300)])
def test_exact_search_on_ordinary_shapes(shape):
    rows, dim, codes = shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, dim, generator=generator)
    codebook = torch.randn(codes, dim, generator=generator)
    assert torch.equal(nearest_exact(x, codebook), nearest_direct(x, codebook))


def test_expanded_form_alone_would_fail_where_the_exact_search_does_not():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 64, generator=generator) + 1e4
    codebook = torch.randn(50, 64, generator=generator) + 1e4
    truth = nearest_direct(x, codebook)
    assert torch.equal(nearest_exact(x, codebook), truth)
    assert not torch.equal(nearest_reference.nearest_expanded(x, codebook), truth)


def test_chunks_do_not_show(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(100, 8, generator=generator).round()
    codebook = torch.randn(30, 8, generator=generator).round()
    whole = nearest_exact(x, codebook)
    distances = squared_distances(x, codebook, whole)
    monkeypatch.setattr(nearest_reference, "_CHUNK_ELEMENTS", {"cpu": 64})
    assert torch.equal(nearest_exact(x, codebook), whole)
    assert torch.equal(squared_distances(x, codebook, whole), distances)


def test_exact_whatever_precision_the_process_allows_products():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3000, 32, generator=generator)
    codebook = torch.randn(256, 32, generator=generator)
    truth = torch.cat([nearest_direct(rows, codebook) for rows in x.split(500)])
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert torch.equal(nearest_exact(x, codebook), truth)
    finally:
        torch.set_float32_matmul_precision(before)


def test_rows_that_are_not_finite_do_not_disturb_their_neighbours():
    x = torch.tensor([[0.9, 0.0], [float("nan"), 0.0], [float("inf"), 1.0], [0.0, 1.1]])
    codes = nearest_exact(x, torch.eye(2))
    assert codes[0] == 0
    assert codes[3] == 1
    assert ((codes >= 0) & (codes < 2)).all()


def test_mixed_dtypes_are_searched_in_the_wider_one():
    codebook = torch.tensor([[1.0], [1.0 + 1e-9]], dtype=torch.float64)
    assert nearest_exact(torch.tensor([[2.0]]), codebook).tolist() == [1]
    assert nearest_exact(torch.tensor([[0.5]], dtype=torch.bfloat16), codebook).tolist() == [0]
