"""Rows in FP8 are what they say, and a product in FP8 is near the product."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rectokens.ops.decoder_pieces import Norm, add_norm_, gate
from rectokens.ops.fp8 import (
    FP8_MAX,
    add_norm_fp8_,
    check_fp8_weight,
    fp8_linear,
    fp8_refusal,
    fp8_rows,
    gate_fp8,
)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), power=st.floats(-20, 20))
def test_rows_are_rounded_relative_to_their_largest(seed: int, power: float) -> None:
    x = torch.randn(5, 24, generator=torch.Generator().manual_seed(seed)) * 10.0**power
    rows = fp8_rows(x)
    largest = x.abs().amax(1, keepdim=True)
    assert torch.allclose(rows.values.float().abs().amax(1), torch.full((5,), FP8_MAX))
    gap = (rows.values.float() * rows.scale - x).abs()
    # Three bits after the point: half a step is a sixteenth; below 2^-6 steps are even.
    assert bool((gap <= torch.maximum(x.abs() / 16, largest / FP8_MAX * 2.0**-10) * 1.001).all())


def test_odd_rows() -> None:
    zeros = fp8_rows(torch.zeros(2, 16))
    assert not zeros.values.float().any()
    assert bool((zeros.scale == 1).all())
    for bad in (float("nan"), float("inf")):
        x = torch.ones(2, 16)
        x[1, 3] = bad
        rows = fp8_rows(x)
        assert bool((rows.values[0].float() * rows.scale[0] == 1).all())
        assert bool((rows.values[1].float() * rows.scale[1]).isnan().any())


def test_products_are_near_and_follow_the_scales() -> None:
    g = torch.Generator().manual_seed(0)
    x, weight = torch.randn(32, 64, generator=g), torch.randn(48, 64, generator=g)
    x *= torch.logspace(-3, 3, 32)[:, None]
    weight *= torch.logspace(2, -2, 48)[:, None]
    bias = torch.randn(48, generator=g).bfloat16()
    wanted = x @ weight.t()
    size = x.norm(dim=1, keepdim=True) * weight.norm(dim=1)
    for given_bias in (None, bias):
        found = fp8_linear(fp8_rows(x), fp8_rows(weight), given_bias)
        assert found.dtype == torch.bfloat16
        right = wanted if given_bias is None else wanted + bias.float()
        gap = (found.float() - right).abs()
        assert bool((gap <= 0.05 * size + 0.01 * right.abs()).all())


def test_norm_and_gate_are_those_of_the_decoder() -> None:
    g = torch.Generator().manual_seed(1)
    x, residual = torch.randn(2, 6, 32, generator=g).bfloat16()
    norm = Norm(torch.randn(32, generator=g).bfloat16(), 1e-6)
    mine, theirs = residual.clone(), residual.clone()
    found, wanted = add_norm_fp8_(x, mine, norm), fp8_rows(add_norm_(x, theirs, norm))
    assert torch.equal(found.values.float(), wanted.values.float())
    assert torch.equal(found.scale, wanted.scale)
    assert torch.equal(mine, theirs)
    gated, right = gate_fp8(x, "silu"), fp8_rows(gate(x, "silu"))
    assert torch.equal(gated.values.float() * gated.scale, right.values.float() * right.scale)


def test_refusals() -> None:
    assert "capability 8.9 or higher; this is a cpu" in str(
        fp8_refusal(torch.device("cpu"), torch.bfloat16)
    )
    with pytest.raises(ValueError, match=r"\(24, 32\).*multiples of 16"):
        check_fp8_weight(torch.zeros(24, 32))
    check_fp8_weight(torch.zeros(16, 48))
