import math
import threading

import pytest
import torch

from rectokens._turboquant.codec import block_rotation, hadamard_rotation
from rectokens._turboquant.packing import unpack
from rectokens._turboquant.reference import decode_reference, encode_reference, rotation_matrix
from rectokens.turboquant import (
    BLOCK_CODEC,
    DEFAULT_CODEC,
    BlockTurboQuantMSE,
    TurboQuantMSE,
    codec_for,
    encode_embeddings,
    packed_dim,
    quantizer_for,
    warmup_encode,
)

TABLE = {
    128: {1: 0.3608, 2: 0.1160, 4: 0.00933, 8: 4.03e-5},
    1024: {1: 0.3632, 2: 0.1173, 4: 0.00949, 8: 4.13e-5},
    4096: {1: 0.3633, 2: 0.1174, 4: 0.00950, 8: 4.11e-5},
}
BITS = [1, 2, 4, 8]


def rows(n, dim, seed=0):
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed))


def unit(x):
    return torch.nn.functional.normalize(x, dim=-1)


def make(dim, bits):
    return TurboQuantMSE(dim, bits) if dim in TABLE else BlockTurboQuantMSE(dim, bits)


def expected_mse(dim, bits):
    return TABLE[dim if dim in TABLE else 4096 if dim > 2048 else 1024][bits]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dim", [128, 1024, 4096, 1536, 2560, 3072, 5120])
def test_error_on_gaussian_rows(dim, bits):
    measured = make(dim, bits).mse(unit(rows(max(600, 2_000_000 // dim), dim)))
    assert measured == pytest.approx(expected_mse(dim, bits), rel=0.05 if bits == 8 else 0.01)


def awkward_rows(kind, dim):
    generator = torch.Generator().manual_seed(7)
    n = 96
    if kind == "constant":
        return torch.ones(1, dim)
    x = torch.zeros(n, dim)
    at = torch.randint(dim, (n, 2), generator=generator)
    x[torch.arange(n), at[:, 0]] += 1.0
    if kind == "two-hot":
        x[torch.arange(n), at[:, 1]] += 1.0
    if kind == "two-hot of unequal weight":
        x[torch.arange(n), at[:, 1]] -= 0.37
    return x


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dim", [1024, 4096, 1536, 2560, 5120])
@pytest.mark.parametrize("kind", ["one-hot", "two-hot", "two-hot of unequal weight", "constant"])
def test_error_on_sparse_and_constant_rows(kind, dim, bits):
    # Rotated, such rows lie on a lattice: not exactly Gaussian, so the error varies a little.
    ratio = make(dim, bits).mse(unit(awkward_rows(kind, dim))) / expected_mse(dim, bits)
    assert 0.65 < ratio < (1.35 if bits == 8 else 1.10)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("scale", [1e-30, 1e-38, 1e-41, 1e-12, 1e15, 1e30, 3e36])
def test_tiny_and_huge_norms_keep_the_relative_error(bits, scale):
    x = (rows(200, 1024, seed=3).double() * scale).float()
    quantizer = TurboQuantMSE(1024, bits)
    packed, norms = quantizer.encode(x)
    exact = x.double().norm(dim=1)
    assert torch.isfinite(norms).all()
    # Below 1e-38 float32 itself keeps fewer digits.
    tolerance = 1e-6 if scale > 1e-37 else 1e-3
    torch.testing.assert_close(norms.double(), exact, rtol=tolerance, atol=0)
    error = (quantizer.decode(packed, norms).double() - x.double()).norm(dim=1) / exact
    assert error.square().mean() == pytest.approx(TABLE[1024][bits], rel=0.15)


def test_zero_rows_decode_to_zeros_among_others():
    x = rows(5, 256)
    x[1] = 0
    x[4] = -0.0
    packed, norms = TurboQuantMSE(256, 4).encode(x)
    assert norms[[1, 4]].tolist() == [0.0, 0.0]
    assert packed[1].tolist() == packed[4].tolist() == [0x77] * 128
    decoded = TurboQuantMSE(256, 4).decode(packed, norms)
    assert not decoded[[1, 4]].any()
    assert decoded[[0, 2, 3]].norm(dim=1).min() > 1


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_values_that_are_not_finite_are_refused(value, dtype):
    x = rows(40, 64).to(dtype)
    x[37, 5] = value
    with pytest.raises(ValueError, match="vector 37 holds NaN or infinity"):
        TurboQuantMSE(64, 4).encode(x)


def test_a_norm_beyond_float32_is_refused():
    with pytest.raises(ValueError, match="vector 0 of x is beyond"):
        TurboQuantMSE(64, 4).encode(torch.full((1, 64), 3e38))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dim", [1, 2, 4, 32, 128, 512, 384, 640])
def test_same_bytes_as_the_reference(dim, bits):
    power = dim & (dim - 1) == 0
    quantizer = TurboQuantMSE(dim, bits) if power else BlockTurboQuantMSE(dim, bits)
    matrix = rotation_matrix(hadamard_rotation(dim, 42) if power else block_rotation(dim, 42))
    x = rows(60, dim, seed=dim)
    x[3] = 0
    packed, norms = quantizer.encode(x)
    reference, reference_norms = encode_reference(x, bits, matrix)
    got = unpack(packed, bits, dim).int()
    differ = (got - unpack(reference, bits, dim).int()).abs()
    # Rounding of float32 decides at most one coordinate in ten thousand, by one level.
    assert differ.max() <= 1
    assert differ.float().mean() <= 1e-4
    torch.testing.assert_close(norms, reference_norms, rtol=1e-6, atol=0)
    torch.testing.assert_close(
        quantizer.decode(reference, reference_norms),
        decode_reference(reference, reference_norms, bits, matrix),
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.mark.parametrize(
    ("bits", "golden"),
    [
        (1, "f583"),
        (2, "72bb5ad4"),
        (4, "386c8ebc986442d6"),
        (8, "8e3cc162ec86c8af8695506b314964d7"),
    ],
)
def test_golden_bytes(bits, golden):
    packed, norms = TurboQuantMSE(16, bits).encode(torch.arange(16) * 37 % 101 - 50.0)
    assert packed.numpy().tobytes().hex() == golden
    assert norms.item() == pytest.approx(118.283554, rel=1e-6)


@pytest.mark.parametrize(
    ("bits", "golden"),
    [
        (1, "4dfe6af11b72492ef45b734392bcdb26"),
        (2, "a661a9ae997913eb8e12596b9365a859"),
        (4, "59b8046a8598ea999784a77f4c278eeb"),
        (8, "8f6080b44e13a164538782929ede9c8f"),
    ],
)
def test_golden_bytes_of_the_block_codec(bits, golden):
    packed, _ = BlockTurboQuantMSE(384, bits).encode(torch.arange(384) * 37 % 101 - 50.0)
    assert packed.numpy().tobytes().hex()[:32] == golden


@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3), (2, 0, 3)])
def test_leading_shapes(shape):
    quantizer = TurboQuantMSE(32, 2)
    x = torch.randn(*shape, 32)
    packed, norms = quantizer.encode(x)
    assert packed.shape == (*shape, 8)
    assert packed.dtype == torch.uint8
    assert norms.shape == shape
    assert norms.dtype == torch.float32
    assert quantizer.decode(packed, norms).shape == x.shape


def test_strided_input_and_every_float_type():
    x = rows(64, 8).T.bfloat16()
    expected = TurboQuantMSE(64, 4).encode(x.contiguous().float())
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        got = TurboQuantMSE(64, 4).encode(x.to(dtype))
        assert torch.equal(got[0], expected[0])
        assert torch.equal(got[1], expected[1])


def test_input_is_not_changed_and_gradients_stay_out():
    x = rows(3, 64).requires_grad_()
    before = x.detach().clone()
    packed, norms = TurboQuantMSE(64, 4).encode(x)
    assert torch.equal(x.detach(), before)
    assert not norms.requires_grad
    assert not TurboQuantMSE(64, 4).decode(packed, norms).requires_grad


@pytest.mark.parametrize("bits", BITS)
def test_least_squares_scale_is_never_worse(bits):
    x = torch.cat((rows(500, 512), awkward_rows("one-hot", 512), torch.zeros(1, 512)))
    plain, fitted = TurboQuantMSE(512, bits), TurboQuantMSE(512, bits, least_squares=True)
    packed, _ = plain.encode(x)
    same, scales = fitted.encode(x)
    assert torch.equal(packed, same)
    # The decoder need not know.
    error = (plain.decode(same, scales) - x).square().sum(1)
    assert (error <= (plain.decode(*plain.encode(x)) - x).square().sum(1) * (1 + 1e-5)).all()
    assert scales[-1] == 0


@pytest.mark.parametrize("bits", BITS)
def test_inner_products_stay_within_the_papers_bound(bits):
    # Theorem 2: the mean squared error of <y, x> is at most sqrt(3) pi^2 |y|^2 / dim * 4^-bits.
    dim = 1024
    x, y = unit(rows(400, dim, seed=1)), rows(400, dim, seed=2)
    quantizer = TurboQuantMSE(dim, bits)
    error = (y * (quantizer.decode(*quantizer.encode(x)) - x)).sum(1)
    bound = math.sqrt(3) * math.pi**2 / dim * 4.0**-bits
    assert (error.square() / y.square().sum(1)).mean() <= bound


@pytest.mark.parametrize("bits", BITS)
def test_bounds(bits):
    quantizer = TurboQuantMSE(64, bits)
    assert quantizer.lower_bound() == 4.0**-bits
    assert quantizer.upper_bound() == pytest.approx(1.535 * 4.0**-bits, rel=1e-3)
    assert quantizer.paper_upper_bound() == pytest.approx(2.7207 * 4.0**-bits, rel=1e-4)
    measured = TurboQuantMSE(1024, bits).mse(unit(rows(300, 1024)))
    assert quantizer.lower_bound() < measured < quantizer.paper_upper_bound()


def test_rotation_is_what_saves_sparse_rows():
    x = unit(awkward_rows("one-hot", 1024))
    assert TurboQuantMSE(1024, 4, rotate=False).mse(x) > 0.5
    assert TurboQuantMSE(1024, 4).mse(x) < 0.011
    assert TurboQuantMSE(5, 4, rotate=False).mse(unit(rows(2000, 5))) < 0.02


def test_seeds_give_different_codes_of_equal_quality():
    x = unit(rows(500, 256))
    first, second = TurboQuantMSE(256, 4, seed=1), TurboQuantMSE(256, 4, seed=2)
    assert not torch.equal(first.encode(x)[0], second.encode(x)[0])
    assert first.mse(x) == pytest.approx(second.mse(x), rel=0.05)
    assert (first.codec, second.codec) == ("tq1/hd2/lsb/seed1", "tq1/hd2/lsb/seed2")


def test_codec_strings():
    assert TurboQuantMSE(64, 4).codec == DEFAULT_CODEC == "tq1/hd2/lsb/seed42"
    assert BlockTurboQuantMSE(768, 4).codec == BLOCK_CODEC == "tq1/bhd2/lsb/seed42"
    assert codec_for(4096) == DEFAULT_CODEC
    assert codec_for(5120) == BLOCK_CODEC
    with pytest.raises(ValueError, match="2880"):
        codec_for(2880)


@pytest.mark.parametrize("bits", [0, 3, 5, 16, -1, True, 4.0, "4", None])
def test_other_bits_are_refused(bits):
    with pytest.raises(ValueError, match="bits must be one of"):
        TurboQuantMSE(64, bits)
    with pytest.raises(ValueError, match="bits must be one of"):
        BlockTurboQuantMSE(768, bits)


@pytest.mark.parametrize("dim", [0, -1, 3, 12, 2560, True, 64.0, None])
def test_other_dims_are_refused(dim):
    with pytest.raises(ValueError, match="dim must be"):
        TurboQuantMSE(dim, 4)


@pytest.mark.parametrize("seed", [-1, 2**64, True, 1.5, None])
def test_other_seeds_are_refused(seed):
    with pytest.raises(ValueError, match="seed must be"):
        TurboQuantMSE(64, 4, seed=seed)


def test_encode_refuses_other_shapes_and_types():
    quantizer = TurboQuantMSE(64, 4)
    with pytest.raises(ValueError, match=r"\(\.\.\., 64\), got \(2, 32\)"):
        quantizer.encode(torch.zeros(2, 32))
    with pytest.raises(ValueError, match=r"floating point, got torch.int64"):
        quantizer.encode(torch.zeros(2, 64, dtype=torch.int64))
    with pytest.raises(ValueError, match="at least one vector"):
        quantizer.mse(torch.zeros(0, 64))


def test_decode_refuses_other_shapes_and_types():
    quantizer = TurboQuantMSE(64, 4)
    packed, norms = quantizer.encode(rows(3, 64))
    for bad_packed, bad_norms, message in [
        (packed[:, :-1], norms, "packed must be uint8"),
        (packed.int(), norms, "packed must be uint8"),
        (packed, norms[:-1], "norms must be float32"),
        (packed, norms.double(), "norms must be float32"),
        (packed, norms[:, None], "norms must be float32"),
    ]:
        with pytest.raises(ValueError, match=message):
            quantizer.decode(bad_packed, bad_norms)


def test_packed_dim():
    assert [packed_dim(4096, bits) for bits in (1, 2, 3, 4, 8)] == [512, 1024, 1536, 2048, 4096]
    assert [packed_dim(8, 3), packed_dim(9, 3), packed_dim(5, 1), packed_dim(3, 4)] == [3, 4, 1, 2]
    for bits in (0, 5, 6, 7, 9, True, 4.0):
        with pytest.raises(ValueError, match="bits must be one of"):
            packed_dim(64, bits)
    for dim in (0, -8, True, 8.0):
        with pytest.raises(ValueError, match="dim must be"):
            packed_dim(dim, 4)


def test_encode_embeddings():
    x = rows(7, 128)
    packed, norms = encode_embeddings(x)
    assert packed.shape == (7, 64)
    assert torch.equal(packed, TurboQuantMSE(128, 4).encode(x)[0])
    assert torch.equal(norms, TurboQuantMSE(128, 4).encode(x)[1])
    assert encode_embeddings(x, bits=8)[0].shape == (7, 128)
    assert encode_embeddings(rows(2, 768), codec=BLOCK_CODEC)[0].shape == (2, 384)
    for bad in (x[0], x[None]):
        with pytest.raises(ValueError, match="num_tokens, hidden_size"):
            encode_embeddings(bad)
    with pytest.raises(ValueError, match="power of two"):
        encode_embeddings(rows(2, 768))
    with pytest.raises(ValueError, match="codec must be"):
        encode_embeddings(x, codec="tq1/hd2/lsb/seed43")


def test_quantizers_are_shared_between_threads():
    found, barrier = [], threading.Barrier(8)
    x = rows(16, 2048)
    expected = TurboQuantMSE(2048, 2).encode(x)[0]

    def work():
        barrier.wait()
        found.append((quantizer_for(2048, 2), encode_embeddings(x, bits=2)[0]))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id(quantizer) for quantizer, _ in found}) == 1
    assert all(torch.equal(packed, expected) for _, packed in found)


def test_warmup_is_repeatable_and_checks_its_arguments():
    assert warmup_encode(512) is None
    assert warmup_encode(512, bits=8) is None
    assert warmup_encode(512) is None
    with pytest.raises(ValueError, match="power of two"):
        warmup_encode(768)
    assert warmup_encode(768, codec=BLOCK_CODEC) is None
