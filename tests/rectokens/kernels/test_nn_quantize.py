import subprocess
import sys

import pytest
import torch

from rectokens.kernels.nn_quantize import quantize_fwd, quantize_fwd_mm, residual_quantize_fwd
from rectokens.ops.nearest_reference import nearest_direct


def rows_and_codebook(rows=50, dim=24, codes=17, dtype=torch.float32):
    generator = torch.Generator().manual_seed(rows * dim + codes)
    return (
        torch.randn(rows, dim, generator=generator).to(dtype),
        torch.randn(codes, dim, generator=generator).to(dtype),
    )


@pytest.mark.parametrize("dim", [1, 3, 24, 64, 100])
@pytest.mark.parametrize("precision", ["float32", "tf32"])
def test_both_forms_find_the_nearest(dim, precision):
    x, codebook = rows_and_codebook(dim=dim)
    expected = nearest_direct(x, codebook)
    codes, distances = quantize_fwd_mm(x, codebook, precision=precision)
    assert torch.equal(quantize_fwd(x, codebook, precision=precision), expected)
    assert torch.equal(codes, expected)
    assert codes.dtype == torch.long
    assert distances.dtype == torch.float32
    truth = (x.double() - codebook.double()[expected]).square().sum(1)
    torch.testing.assert_close(distances.double(), truth, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    x, codebook = rows_and_codebook(dtype=dtype)
    codes, distances = quantize_fwd_mm(x, codebook)
    assert torch.equal(codes, nearest_direct(x, codebook))
    assert distances.dtype == torch.float32


def test_lowest_index_on_ties():
    codebook = torch.tensor([[2.0], [1.0], [1.0], [-1.0]])
    assert quantize_fwd(torch.tensor([[0.0], [1.0]]), codebook).tolist() == [1, 1]


def test_distance_does_not_cancel_far_from_the_origin():
    x = torch.tensor([[10_000.0, 10_000.0]])
    _, distances = quantize_fwd_mm(x, x + 0.5)
    assert distances.tolist() == [0.5]


def test_registered_ops_pass_the_library_checks():
    x, codebook = rows_and_codebook()
    for op in (torch.ops.kmeans.quantize.default, torch.ops.kmeans.quantize_mm.default):
        torch.library.opcheck(op, (x, codebook))
        torch.library.opcheck(op, (x[:0], codebook, "tf32"))
    assert torch.equal(torch.ops.kmeans.quantize(x, codebook), quantize_fwd(x, codebook))


def test_fake_tensors_have_shapes_and_dtypes():
    x, codebook = torch.empty(5, 3, device="meta"), torch.empty(4, 3, device="meta")
    codes, distances = quantize_fwd_mm(x, codebook)
    assert (codes.shape, codes.dtype) == ((5,), torch.long)
    assert (distances.shape, distances.dtype) == ((5,), torch.float32)
    assert quantize_fwd(x, codebook).shape == (5,)


def test_no_gradient_and_no_complaint():
    x, codebook = rows_and_codebook()
    codes, distances = quantize_fwd_mm(x.requires_grad_(), codebook.requires_grad_())
    assert not codes.requires_grad
    assert not distances.requires_grad


def test_bad_arguments():
    x, codebook = rows_and_codebook()
    for form in (quantize_fwd, quantize_fwd_mm):
        with pytest.raises(AssertionError, match="D = 24 and codebook D = 23"):
            form(x, codebook[:, 1:])
        with pytest.raises(AssertionError, match="one device"):
            form(x, codebook.to("meta"))
        with pytest.raises(ValueError, match="0 rows"):
            form(x, codebook[:0])
        with pytest.raises(ValueError, match="allowed are float32, tf32"):
            form(x, codebook, precision="bf16")
        with pytest.raises(ValueError, match="expected \\(B, D\\)"):
            form(x[0], codebook)


def test_import_changes_no_global_settings_and_needs_no_triton():
    program = """
import sys
sys.modules["triton"] = None  # importing it would fail
import torch
state = lambda: (torch.get_float32_matmul_precision(), torch.get_num_threads(),
                 torch.is_grad_enabled(), torch.get_default_dtype(),
                 torch.backends.cuda.matmul.allow_tf32, torch.initial_seed(),
                 torch.get_rng_state().sum().item())
torch.manual_seed(0)
before = state()
import rectokens.kernels.nn_quantize, rectokens.ops.faiss_quantize
import rectokens.tokenizers.fitting, rectokens.tokenizers.rqvae
assert state() == before, (before, state())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_residual_codes_are_those_of_one_level_after_the_other():
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(30, 6, generator=generator)
    codebooks = torch.randn(3, 9, 6, generator=generator)
    left, expected = x, []
    for codebook in codebooks:
        expected.append(quantize_fwd(left, codebook))
        left = left - codebook[expected[-1]]
    assert torch.equal(residual_quantize_fwd(x, codebooks), torch.stack(expected, 1))
    torch.library.opcheck(torch.ops.kmeans.residual_quantize.default, (x, codebooks))


@pytest.mark.parametrize(
    ("codebooks", "error", "message"),
    [
        (torch.zeros(9, 6), ValueError, r"expected \(L, K, D\)"),
        (torch.zeros(0, 9, 6), ValueError, r"expected \(L, K, D\)"),
        (torch.zeros(2, 9, 6).half(), ValueError, "float16"),
        (torch.zeros(2, 9, 5), AssertionError, "D = 5"),
        (torch.zeros(2, 0, 6), ValueError, "0 rows"),
    ],
)
def test_bad_residual_arguments(codebooks, error, message):
    with pytest.raises(error, match=message):
        residual_quantize_fwd(torch.zeros(3, 6), codebooks)


def test_the_raw_ops_check_their_arguments_too():
    x, codebook = torch.randn(3, 7), torch.randn(4, 8)
    for op in (torch.ops.kmeans.quantize, torch.ops.kmeans.quantize_mm):
        with pytest.raises(AssertionError, match="D = 7 and codebook D = 8"):
            op(x, codebook)
