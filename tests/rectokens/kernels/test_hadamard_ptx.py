"""The warp kernels' PTX, run instruction by instruction, against the plain path."""

import math

import numpy as np
import pytest
import torch

from rectokens._turboquant.codec import hadamard_rotation
from rectokens._turboquant.packing import unpack
from rectokens.kernels.hadamard_ptx import PAIRS, SLICE, decode_ptx, encode_ptx
from rectokens.kernels.turboquant_warp_launch import lane_signs
from rectokens.turboquant import TurboQuantMSE
from tests.rectokens.kernels.ptx_warp import run

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
CODES = {1: np.uint8, 2: np.uint16, 4: np.uint32}
CASES = [(512, 4), (1024, 2), (2048, 1), (4096, 4)]


def sign_operands(dim, seed, first, second, pairs):
    table = lane_signs(hadamard_rotation(dim, seed)).numpy().view(np.uint32)
    return {
        start + word: table[round_index, :, word].copy()
        for round_index, start in ((0, first), (1, second))
        for word in range(min(PAIRS, pairs))
    }


def encode_row(x, bits, kind, seed=42):
    """Packed bytes of one row by the PTX."""
    dim = len(x)
    pairs = dim // SLICE * PAIRS
    words = x.contiguous().view(torch.int64 if kind == "fp32" else torch.int32).numpy()
    words = words.view(np.uint64 if kind == "fp32" else np.uint32)
    lanes = words.reshape(dim // SLICE, 32, PAIRS).transpose(1, 0, 2).reshape(32, pairs)
    scale = np.float32(SLICE / math.sqrt(dim) / x.double().norm().item())
    operands = {pairs + pair: lanes[:, pair].copy() for pair in range(pairs)}
    operands |= sign_operands(dim, seed, 2 * pairs, 3 * pairs, pairs)
    operands[4 * pairs] = np.full(32, scale, np.float32)
    done = run(encode_ptx(dim, bits, kind)[0], operands)
    for pair in range(pairs):
        assert pair % PAIRS == 0 or not done[pair].any()
    codes = np.stack([done[pair] for pair in range(0, pairs, PAIRS)])
    return torch.from_numpy(codes.astype(CODES[bits]).reshape(-1).view(np.uint8))


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize(("dim", "bits"), CASES)
def test_encode(dim, bits, kind):
    x = torch.randn(4096 // dim, dim, generator=torch.Generator().manual_seed(dim))
    x = x.to(DTYPES[kind])
    expected = TurboQuantMSE(dim, bits).encode(x)[0]
    packed = torch.stack([encode_row(row, bits, kind) for row in x])
    levels = unpack(packed, bits, dim).int() - unpack(expected, bits, dim).int()
    assert levels.abs().max() <= 1
    # Few enough to be rounding; a single wrong lane or register would be 1 in 64 or more.
    assert levels.ne(0).double().mean() < 0.006


def test_encode_with_other_signs():
    x = torch.randn(512, generator=torch.Generator().manual_seed(3))
    expected = TurboQuantMSE(512, 4, seed=7).encode(x[None])[0]
    packed = encode_row(x, 4, "fp32", seed=7)[None]
    assert (unpack(packed, 4, 512) != unpack(expected, 4, 512)).double().mean() < 0.006


@pytest.mark.parametrize(("dim", "bits"), CASES)
def test_decode(dim, bits):
    x = torch.randn(1, dim, generator=torch.Generator().manual_seed(dim))
    quantizer = TurboQuantMSE(dim, bits)
    packed, norms = quantizer.encode(x)
    pairs = dim // SLICE * PAIRS
    codes = packed[0].numpy().view(CODES[bits]).reshape(-1, 32)
    # As the kernel loads them: bytes without a sign, 16 bits with one.
    loaded = codes if bits == 1 else codes.view(f"i{codes.itemsize}").astype(np.int32)
    operands = {
        pairs + index * PAIRS: loaded[index].astype(np.uint32) for index in range(len(codes))
    }
    operands |= sign_operands(dim, 42, 2 * pairs, 3 * pairs, pairs)
    operands[4 * pairs] = np.full(32, SLICE / math.sqrt(dim) / dim, np.float32)
    operands[5 * pairs] = np.full(32, norms.item(), np.float32)
    done = run(decode_ptx(dim, bits)[0], operands)
    words = np.stack([done[pair] for pair in range(pairs)], 1).view(np.float32)
    rows = words.reshape(32, dim // SLICE, 2 * PAIRS).transpose(1, 0, 2).reshape(-1)
    expected = quantizer.decode(packed, norms)[0]
    error = (torch.from_numpy(rows.copy()) - expected).norm() / expected.norm()
    assert error < 1e-3


@pytest.mark.parametrize("size", [512, 4096])
def test_sign_words_are_a_rearrangement_of_the_signs(size):
    from rectokens._turboquant.signs import signs

    table = lane_signs(hadamard_rotation(size, 42)).numpy().view(np.uint32)
    for round_index in (0, 1):
        expected = signs(42, round_index, size) < 0
        for index in (0, 1, 2, 9, 255, 256, size - 1):
            lane, pair = index % SLICE // 8, index // SLICE * PAIRS + index % 8 // 2
            bit = (31 if index & 1 else 15) - pair % 16
            assert bool(table[round_index, lane, pair // 16] >> bit & 1) == expected[index]
