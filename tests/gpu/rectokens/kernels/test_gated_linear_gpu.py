"""The gated product on CUDA: the definition's results, whatever does not divide its tiles."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from rectokens.kernels import gated_linear_launch as launch
from rectokens.ops.decoder_pieces import ACTIVATIONS, gate, gated_linear

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_capability()[0] != 9,
        reason="the kernel is for Hopper",
    ),
]


@pytest.mark.parametrize("dtype", launch.DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    ("rows", "hidden", "outputs"),
    [
        (1, 72, 48),
        (64, 2048, 12_288),
        (100, 2048, 1040),
        (130, 2048, 1040),
        (256, 512, 12_288),
        (300, 2048, 1040),
        (1024, 512, 12_288),
    ],
)
def test_equals_the_definition(
    rows: int, hidden: int, outputs: int, activation: str, dtype: torch.dtype
) -> None:
    x = torch.randn(rows, hidden, device="cuda").to(dtype)
    weight = (torch.randn(outputs, hidden, device="cuda") * hidden**-0.5).to(dtype)
    assert launch.takes(x, weight)
    found = launch.launch_gated_linear(x, weight, activation).float()
    wanted = gate(F.linear(x.double(), weight.double()), activation).float()
    assert float((found - wanted).norm() / wanted.norm()) < 1e-2
    assert torch.equal(found, launch.launch_gated_linear(x, weight, activation).float())


@pytest.mark.parametrize("rows", [64, 256, 2048])
def test_one_kernel_or_two_give_nearly_the_same(rows: int) -> None:
    x = torch.randn(rows, 2048, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(12_288, 2048, device="cuda", dtype=torch.bfloat16) * 0.02
    assert launch.pays_on(x.shape[0], weight.shape[0], x.device)
    one = gated_linear(x, weight, None, "silu")
    two = gate(F.linear(x, weight), "silu")
    assert float((one - two).float().norm() / two.float().norm()) < 4e-3
