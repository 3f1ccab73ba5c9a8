"""TurboQuant on a CUDA device: the kernels against the plain path on the CPU."""

import math

import pytest
import torch

from rectokens._turboquant.packing import unpack
from rectokens.prompt_embeds import dump_payload, load_prompt_embeds
from rectokens.turboquant import (
    BlockTurboQuantMSE,
    TurboQuantMSE,
    codec_for,
    encode_embeddings,
    quantizer_for,
    warmup_encode,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

BITS = [1, 2, 4, 8]
POWERS = [16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384]
DIMS = [*POWERS, 640, 1536, 2560, 3072, 5120, 7168, 12288]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
MAX_DIFFERING = {1: 0.001, 2: 0.001, 4: 0.003, 8: 0.03}
TABLE = {
    128: {1: 0.3608, 2: 0.1160, 4: 0.00933, 8: 4.03e-5},
    1024: {1: 0.3632, 2: 0.1173, 4: 0.00949, 8: 4.13e-5},
    4096: {1: 0.3633, 2: 0.1174, 4: 0.00950, 8: 4.11e-5},
}


def rows(n, dim, dtype=torch.float32):
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(n)).to(dtype)


def assert_same_code(dim, bits, gpu, cpu):
    levels = unpack(gpu[0].cpu(), bits, dim).int() - unpack(cpu[0], bits, dim).int()
    assert levels.abs().max() <= 1
    # A few of a small number are no rate.
    assert levels.ne(0).sum() <= MAX_DIFFERING[bits] * levels.numel() + 3
    # Sums of up to 16,384 squares, in two orders; each is within 3e-6 of the exact norm.
    torch.testing.assert_close(gpu[1].cpu(), cpu[1], rtol=4e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dim", DIMS)
def test_encode_and_decode_equal_the_cpu(dim, bits, dtype):
    quantizer = quantizer_for(dim, bits, codec_for(dim))
    x = rows(max(70, 40_000 // dim), dim, dtype)
    cpu = quantizer.encode(x)
    gpu = quantizer.encode(x.cuda())
    assert gpu[0].is_cuda
    assert_same_code(dim, bits, gpu, cpu)
    expected = quantizer.decode(*cpu)
    got = quantizer.decode(cpu[0].cuda(), cpu[1].cuda())
    assert got.dtype == torch.float32
    assert (got.cpu() - expected).norm() / expected.norm() < 1e-3


@pytest.mark.parametrize("n", [1, 2, 3, 131, 132, 133, 397, 5000])
def test_numbers_of_rows(n):
    x = rows(n, 4096, torch.bfloat16)
    quantizer = TurboQuantMSE(4096, 4)
    assert_same_code(4096, 4, quantizer.encode(x.cuda()), quantizer.encode(x))
    short = rows(n, 64)
    assert_same_code(
        64, 4, TurboQuantMSE(64, 4).encode(short.cuda()), TurboQuantMSE(64, 4).encode(short)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dim", [128, 1024, 4096, 2560, 16384])
def test_error_is_that_of_the_table(dim, bits, dtype):
    expected = TABLE[dim if dim in TABLE else 4096][bits]
    x = torch.nn.functional.normalize(torch.randn(20_000_000 // dim, dim, device="cuda"), dim=1)
    quantizer = BlockTurboQuantMSE(dim, bits) if dim == 2560 else TurboQuantMSE(dim, bits)
    measured = quantizer.mse((x * math.sqrt(dim)).to(dtype)) / dim
    assert measured == pytest.approx(expected, rel=0.05 if bits == 8 else 0.01)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dim", [64, 4096, 8192, 16384, 2560])
def test_awkward_rows(dim, bits):
    x = rows(12, dim)
    x[0] = 0
    x[1] = 1
    x[2] = 0
    x[2, 3] = 5
    x[4] *= 1e-36
    x[5] *= 1e33
    quantizer = quantizer_for(dim, bits, codec_for(dim))
    cpu, gpu = quantizer.encode(x), quantizer.encode(x.cuda())
    torch.testing.assert_close(gpu[1].cpu(), cpu[1], rtol=1e-6, atol=0)
    decoded = quantizer.decode(*gpu).cpu().double()
    assert not decoded[0].any()
    exact = x.double()[1:]
    error = (decoded[1:] - exact).norm(dim=1) / exact.norm(dim=1)
    on_cpu = (quantizer.decode(*cpu).double()[1:] - exact).norm(dim=1) / exact.norm(dim=1)
    torch.testing.assert_close(error, on_cpu, rtol=0.05, atol=1e-4)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_that_are_not_finite_are_refused(value, dtype):
    x = rows(500, 1024, dtype).cuda()
    x[377, 1023] = value
    with pytest.raises(ValueError, match="vector 377 holds NaN or infinity"):
        encode_embeddings(x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norms_are_exact_to_float32(dtype):
    for dim in (64, 4096, 16384, 2560):
        x = rows(200, dim, dtype)
        norms = quantizer_for(dim, 4, codec_for(dim)).encode(x.cuda())[1].cpu()
        torch.testing.assert_close(norms.double(), x.double().norm(dim=1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dim", [512, 4096])
def test_both_kernels_of_a_size(dim, bits, dtype):
    """Sizes that warps hold are also the tile kernels', for rows that are not aligned."""
    quantizer = TurboQuantMSE(dim, bits)
    x = rows(300, dim, dtype)
    cpu = quantizer.encode(x)
    flat = torch.zeros(300 * dim + 1, dtype=dtype, device="cuda")
    odd = flat[1:].view(300, dim).copy_(x)
    assert_same_code(dim, bits, quantizer.encode(odd), cpu)
    codes = torch.zeros(cpu[0].numel() + 1, dtype=torch.uint8, device="cuda")
    codes = codes[1:].view(cpu[0].shape).copy_(cpu[0])
    got, expected = quantizer.decode(codes, cpu[1].cuda()).cpu(), quantizer.decode(*cpu)
    assert (got - expected).norm() / expected.norm() < 1e-3


@pytest.mark.parametrize("dim", [2560, 4096, 8192, 12288])
def test_every_byte_is_written_and_none_beside(dim):
    from rectokens._turboquant.backends import make_backend

    quantizer = quantizer_for(dim, 4, codec_for(dim))
    device = torch.device("cuda", torch.cuda.current_device())
    backend = make_backend(dim, 4, quantizer._rotation, device)
    x = rows(301, dim, torch.bfloat16).cuda()
    expected = quantizer.encode(x)
    for poison in (0x00, 0xFF):
        packed = torch.full((303, dim // 2), poison, dtype=torch.uint8, device="cuda")
        norms = torch.full((303,), math.nan, device="cuda")
        backend.encode(x, packed[1:-1], norms[1:-1])
        assert torch.equal(packed[1:-1], expected[0])
        assert torch.equal(norms[1:-1], expected[1])
        assert (packed[[0, -1]] == poison).all()
        assert norms[[0, -1]].isnan().all()
    out = torch.full((303, dim), math.nan, device="cuda")
    backend.decode(*expected, out[1:-1])
    assert torch.equal(out[1:-1], quantizer.decode(*expected))
    assert out[[0, -1]].isnan().all()


def test_results_do_not_depend_on_the_batch():
    x = rows(1000, 4096, torch.bfloat16).cuda()
    packed, norms = encode_embeddings(x)
    for start, stop in ((0, 1), (7, 8), (990, 1000), (3, 500)):
        part = encode_embeddings(x[start:stop])
        assert torch.equal(part[0], packed[start:stop])
        assert torch.equal(part[1], norms[start:stop])


def test_strided_rows_and_other_streams():
    wide = rows(64, 2 * 4096, torch.bfloat16).cuda()
    expected = encode_embeddings(wide[:, :4096].contiguous())
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        got = encode_embeddings(wide[:, :4096])
    stream.synchronize()
    assert torch.equal(got[0], expected[0])
    transposed = rows(256, 64).cuda().T
    assert_same_code(
        256, 4, encode_embeddings(transposed), encode_embeddings(transposed.cpu().contiguous())
    )


def test_offsets_beyond_32_bits():
    n = (1 << 31) // 4096 + 3
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GiB of free device memory")
    x = torch.zeros(n, 4096, dtype=torch.bfloat16, device="cuda")
    x[-1] = rows(1, 4096, torch.bfloat16)[0]
    packed, norms = encode_embeddings(x)
    last = encode_embeddings(x[-1:])
    assert torch.equal(packed[-1:], last[0])
    assert torch.equal(norms[-1:], last[1])
    assert not norms[:-1].any()
    assert torch.equal(
        quantizer_for(4096, 4).decode(packed, norms)[-1:], quantizer_for(4096, 4).decode(*last)
    )


def test_one_launch_and_no_copy_of_the_rows():
    quantizer = TurboQuantMSE(4096, 4)
    x = rows(256, 4096, torch.bfloat16).cuda()
    quantizer.encode(x)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        quantizer.encode(x)
        torch.cuda.synchronize()
    launched = {event.key: event.count for event in profile.key_averages()}
    assert [count for name, count in launched.items() if "encode" in name] == [1]


def test_warmup_leaves_nothing_to_compile():
    from rectokens.kernels.turboquant import encode_kernel
    from rectokens.kernels.turboquant_warp import encode_warp_kernel

    def compiled():
        device = torch.cuda.current_device()
        return [len(k.device_caches[device][0]) for k in (encode_kernel, encode_warp_kernel)]

    for dim, bits in ((2048, 2), (2560, 2)):
        warmup_encode(dim, bits=bits, codec=codec_for(dim))
        before = compiled()
        for n in (1, 2, 16, 1000):
            for dtype in DTYPES:
                encode_embeddings(rows(n, dim, dtype).cuda(), bits=bits, codec=codec_for(dim))
        assert compiled() == before


def test_payload_decoded_on_the_device():
    x = rows(9, 4096)
    data = dump_payload(*encode_embeddings(x.cuda()), 4, 4096)
    limits = {"hidden_size": 4096, "max_tokens": 16, "max_bytes": 1 << 20}
    on_gpu = load_prompt_embeds(data, **limits, device="cuda")
    assert on_gpu.is_cuda
    torch.testing.assert_close(
        on_gpu.cpu(), load_prompt_embeds(data, **limits), rtol=1e-2, atol=5e-3
    )
