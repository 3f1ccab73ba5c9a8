"""The warp kernels' PTX, run instruction by instruction, against the plain path."""

import numpy as np
import pytest
import torch

from rectokens._turboquant.assign import float32_boundaries
from rectokens._turboquant.codec import (
    Rotation,
    block_rotation,
    codec_for,
    hadamard_rotation,
    packed_dim,
)
from rectokens._turboquant.packing import unpack
from rectokens._turboquant.signs import signs
from rectokens.kernels.turboquant_assign_ptx import half_index, index_polynomial, limit
from rectokens.kernels.turboquant_decode_ptx import decode_ptx
from rectokens.kernels.turboquant_encode_ptx import encode_ptx
from rectokens.kernels.turboquant_warp_launch import (
    decode_gain,
    decode_settings,
    encode_gain,
    encode_settings,
    lane_signs,
    team_of,
    warp_tables,
)
from rectokens.kernels.warp_rows import (
    DECODE_LAYOUT,
    ENCODE_LAYOUT,
    SLICE,
    fits,
)
from rectokens.turboquant import TurboQuantMSE, quantizer_for
from tests.rectokens.kernels.ptx_warp import Warp, run

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
MAX_DIFFERING = {1: 0.004, 2: 0.004, 4: 0.006, 8: 0.04}
FUSED = [
    (0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (2, 0, 0, 0),
    (0, 2, 0, 0), (0, 0, 2, 0), (0, 0, 0, 2), (2, 1, 1, 2), (1, 1, 1, 1), (1, 2, 2, 1),
]  # fmt: skip
CASES = [(512, 8), (1024, 2), (2048, 1), (4096, 4), (8192, 8), (2560, 4), (1536, 8), (1280, 2)]


def rotation_of(dim, seed=42):
    return (hadamard_rotation if "/hd2/" in codec_for(dim) else block_rotation)(dim, seed)


class Memory:
    """Arrays laid out one after the other, poison between them."""

    def __init__(self):
        self.bytes = np.full(1 << 18, 0xA5, np.uint8)
        self.end = 256

    def put(self, tensor):
        """Address of a copy of the tensor's bytes."""
        content = tensor.contiguous().view(torch.uint8).numpy().reshape(-1)
        start, self.end = self.end, self.end + -(-content.size // 256 + 1) * 256
        self.end = start + (content.size // 256 + 2) * 256
        self.bytes[start : start + content.size] = content
        return start

    def room(self, size):
        start = self.end
        self.end += (size // 256 + 2) * 256
        return start


def addresses(*numbers):
    return [np.full(32, number, np.uint64) for number in numbers]


def encode_row(x, bits, kind, seed=42, fused=None, team=None):
    """Packed bytes and the norm of one row by the PTX."""
    dim = len(x)
    rotation = rotation_of(dim, seed)
    memory = Memory()
    settings = encode_settings(rotation, bits, x.dtype)
    fused, team = fused or settings.fused, team or settings.team
    tables = warp_tables(rotation, bits, torch.device("cpu"), team)
    size = packed_dim(dim, bits)
    places = addresses(
        memory.put(x), memory.room(size), memory.room(4), memory.put(tables.encode[team])
    )
    operands = dict(enumerate(places, 1)) | {
        5: np.full(32, encode_gain(rotation, bits), np.float32)
    }
    before = memory.bytes.copy()
    text = encode_ptx(dim, rotation.block, bits, kind, fused, team, settings.wide)
    run(text, memory.bytes, operands, team)
    start, norm = int(places[1][0]), int(places[2][0])
    packed, found = memory.bytes[start : start + size].copy(), memory.bytes[norm : norm + 4].copy()
    memory.bytes[start : start + size] = before[start : start + size]
    memory.bytes[norm : norm + 4] = before[norm : norm + 4]
    assert np.array_equal(memory.bytes, before)  # Nothing was written beside.
    return torch.from_numpy(packed), found.view(np.float32)[0]


def decode_row(packed, norm, dim, bits, fused=None, team=None):
    """One row's numbers by the PTX."""
    rotation = rotation_of(dim)
    memory = Memory()
    settings = decode_settings(rotation)
    fused, team = fused or settings.fused, team or settings.team
    tables = warp_tables(rotation, bits, torch.device("cpu"), team)
    places = addresses(
        memory.put(packed), memory.put(norm.reshape(1)), memory.room(4 * dim),
        memory.put(tables.decode), memory.put(tables.centroids),
    )  # fmt: skip
    factor = np.full(32, decode_gain(rotation), np.float32)
    operands = dict(enumerate(places, 1)) | {6: factor}
    run(decode_ptx(dim, rotation.block, bits, fused, team), memory.bytes, operands, team)
    start = int(places[2][0])
    return torch.from_numpy(memory.bytes[start : start + 4 * dim].view(np.float32).copy())


def differing(packed, expected, bits, dim):
    levels = unpack(packed, bits, dim).int() - unpack(expected, bits, dim).int()
    assert levels.abs().max() <= 1
    return float(levels.ne(0).double().mean())


def random_row(dim, dtype=torch.float32, seed=0):
    return torch.randn(dim, generator=torch.Generator().manual_seed(dim + seed)).to(dtype)


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize(("dim", "bits"), CASES)
def test_encode(dim, bits, kind):
    x = random_row(dim, DTYPES[kind])
    expected = quantizer_for(dim, bits, codec_for(dim)).encode(x[None])[0]
    packed, norm = encode_row(x, bits, kind)
    # Few enough to be rounding; a single wrong lane or register would be 1 in 64 or more.
    assert differing(packed[None], expected, bits, dim) < MAX_DIFFERING[bits]
    assert norm == pytest.approx(x.double().norm().item(), rel=1e-6)


@pytest.mark.parametrize("fused", FUSED)
def test_levels_between_slices_go_with_any_product(fused):
    for dim, bits in ((1024, 4), (1536, 8)):
        x = random_row(dim)
        expected, norms = quantizer_for(dim, bits, codec_for(dim)).encode(x[None])
        packed, _ = encode_row(x, bits, "fp32", fused=fused)
        assert differing(packed[None], expected, bits, dim) < MAX_DIFFERING[bits]
        restored = decode_row(expected[0], norms, dim, bits, fused)
        exact = quantizer_for(dim, bits, codec_for(dim)).decode(expected, norms)[0]
        assert (restored - exact).norm() / exact.norm() < 1e-3


def test_encode_with_other_signs():
    x = random_row(512)
    expected = TurboQuantMSE(512, 4, seed=7).encode(x[None])[0]
    packed, _ = encode_row(x, 4, "fp32", seed=7)
    assert differing(packed[None], expected, 4, 512) < 0.006


@pytest.mark.parametrize("factor", [1e-37, 1e-20, 1e20, 1e34])
@pytest.mark.parametrize(("dim", "kind"), [(512, "bf16"), (512, "fp32"), (8192, "fp32")])
def test_rows_far_from_one(dim, kind, factor):
    x = (random_row(dim) * factor).to(DTYPES[kind])
    expected, _ = TurboQuantMSE(dim, 4).encode(x[None])
    packed, norm = encode_row(x, 4, kind)
    assert differing(packed[None], expected, 4, dim) < 0.006
    assert norm == pytest.approx(x.double().norm().item(), rel=1e-6)


@pytest.mark.parametrize("kind", DTYPES)
def test_rows_of_zeros_and_rows_that_are_not_finite(kind):
    zeros = torch.zeros(512, dtype=DTYPES[kind])
    packed, norm = encode_row(zeros, 8, kind)
    assert norm == 0
    assert torch.equal(packed[None], TurboQuantMSE(512, 8).encode(zeros[None])[0])
    for value in (torch.nan, torch.inf, -torch.inf):
        x = random_row(512, DTYPES[kind])
        x[333] = value
        assert not np.isfinite(encode_row(x, 4, kind)[1])


@pytest.mark.parametrize(("dim", "bits"), CASES)
def test_decode(dim, bits):
    quantizer = quantizer_for(dim, bits, codec_for(dim))
    packed, norms = quantizer.encode(random_row(dim)[None])
    restored = decode_row(packed[0], norms, dim, bits)
    expected = quantizer.decode(packed, norms)[0]
    assert (restored - expected).norm() / expected.norm() < 1e-3


@pytest.mark.parametrize(
    ("dim", "bits", "team"),
    [
        (16384, 4, 2),
        (16384, 8, 4),
        (16384, 4, 8),
        (12288, 1, 2),
        (12288, 8, 4),
        (10240, 4, 2),
        (4096, 2, 4),
    ],
)
def test_rows_that_warps_share(dim, bits, team):
    quantizer = quantizer_for(dim, bits, codec_for(dim))
    for kind, factor in (("bf16", 1e20), ("fp32", 1)):
        x = (random_row(dim) * factor).to(DTYPES[kind])
        expected, norms = quantizer.encode(x[None])
        packed, norm = encode_row(x, bits, kind, team=team)
        assert differing(packed[None], expected, bits, dim) < MAX_DIFFERING[bits]
        assert norm == pytest.approx(x.double().norm().item(), rel=1e-6)
    restored = decode_row(expected[0], norms, dim, bits, team=team)
    exact = quantizer.decode(expected, norms)[0].double()
    assert (restored - exact).norm() / exact.norm() < 1e-3


@pytest.mark.parametrize("team", [1, 2])
@pytest.mark.parametrize("layout", [ENCODE_LAYOUT, DECODE_LAYOUT])
def test_lane_signs_are_a_rearrangement_of_the_signs(layout, team):
    words = lane_signs(hadamard_rotation(2048, 42), layout, team).numpy().view(np.uint32)
    assert words.shape == (team, 2, 2 // team, 32)
    negative = signs(42, 0, 2048) < 0
    for warp, index, lane, pair, half in (
        (0, 0, 0, 0, 0),
        (team - 1, 3, 5, 1, 1),
        (0, 2, 31, 3, 0),
    ):
        element = (warp * 8 // team + index) * SLICE + layout.element(lane, pair) + half
        word, place = divmod(4 * index + pair, 16)
        assert words[warp, 0, word, lane] >> (15 - place + 16 * half) & 1 == negative[element]
    assert np.bitwise_count(words[:, 0]).sum() == negative.sum()
    assert np.bitwise_count(words[:, 1]).sum() == (signs(42, 1, 2048) < 0).sum()


@pytest.mark.parametrize("dim", [512, 1536, 2560, 4096, 16384])
def test_the_polynomial_gives_the_index(dim):
    """One rounded-up evaluation in float32, as the kernel does it at 8 bits, and the definition."""
    boundaries = float32_boundaries(dim, 8)
    coefficients = index_polynomial(dim)
    every = np.linspace(-1.5 * boundaries[-1], 1.5 * boundaries[-1], 100_001, dtype=np.float32)
    gaussian = np.random.default_rng(dim).standard_normal(200_000).astype(np.float32)
    both = np.concatenate([-boundaries[::-1], [0], boundaries])
    for values, most in ((every, 0.005), (gaussian, 0.0005)):
        inside = np.clip(values, -limit(dim), limit(dim))
        square = inside * inside
        sums = np.full_like(inside, coefficients[-1])
        for coefficient in coefficients[-2::-1]:
            sums = sums * square + coefficient
        index = np.ceil(sums.astype(np.float64) * inside).astype(int) + 127
        expected = np.searchsorted(both, values, side="left")
        assert np.abs(index - expected).max() <= 1
        assert (index != expected).mean() < most
        assert index.min() >= 0
        assert index.max() < 256


@pytest.mark.parametrize("dim", [512, 1536, 2560, 4096, 16384])
def test_fp16_gives_the_index_of_four_bits(dim):
    index = half_index(dim)
    boundaries = float32_boundaries(dim, 4)
    both = np.concatenate([-boundaries[::-1], [0], boundaries])
    gaussian = np.random.default_rng(dim).standard_normal(400_000)
    wide = np.random.default_rng(dim).standard_normal(100_000) * 100
    for values, most in ((gaussian, 0.0015), (wide, 0.0005)):
        codes = index.codes((values * index.scale).astype(np.float16).astype(np.float64))
        expected = np.searchsorted(both, values.astype(np.float32), side="left")
        assert np.abs(codes - expected).max() <= 1
        assert (codes != expected).mean() < most
    # Zero has the lower code of the middle.
    assert index.codes(np.array([-1e-3, -0.0, 0.0, 1e-3])).tolist() == [7, 7, 7, 8]


def test_instructions_give_the_index_of_every_fp16_number():
    from rectokens.kernels.turboquant_assign_ptx import assign_halves, half_constants

    index = half_index(4096)
    numbers = np.arange(1 << 16, dtype=np.uint16)
    numbers = numbers[np.isfinite(numbers.view(np.float16))].reshape(-1, 32, 4, 2)
    text = "\n".join([*half_constants(4096), *assign_halves(["v0", "v1", "v2", "v3"])])
    for lanes in numbers:
        warp = Warp(np.zeros(4, np.uint8), np.zeros(4, np.uint8), {}, 0)
        for pair in range(4):
            warp.registers[f"v{pair}"] = np.ascontiguousarray(lanes[:, pair]).view(np.uint32)[:, 0]
        assert list(warp.run(text)) == []
        expected = index.codes(lanes.view(np.float16).astype(np.float64)).reshape(32, 8)
        found = warp.registers["d0"][:, None] >> 4 * np.arange(8, dtype=np.uint32) & 15
        assert np.array_equal(found, expected)


def test_sizes_that_a_warp_holds():
    held = [512, 768, 1024, 1280, 1536, 2048, 2560, 3072, 3584, 4096, 5120, 7168, 8192]
    assert all(fits(dim, dim & -dim) for dim in held)
    assert not any(fits(dim, dim & -dim) for dim in (128, 256, 640, 1152, 12288, 16384))
    teams = {16384: 8, 12288: 4, 10240: 2, 9216: 2, 8704: 0, 32768: 0, 4096: 4, 2048: 2, 1024: 1}
    assert {dim: team_of(Rotation(dim, dim & -dim, 42)) for dim in teams} == teams
    # Rows of 16-bit numbers are held by fewer warps.
    for dim, bits, team in ((1024, 4, 1), (2048, 4, 1), (4096, 8, 2), (16384, 4, 4), (16384, 8, 8)):
        settings = encode_settings(hadamard_rotation(dim, 42), bits, torch.bfloat16)
        assert settings.team == team
