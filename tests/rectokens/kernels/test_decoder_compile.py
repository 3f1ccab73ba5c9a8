"""The decoder and head kernels compile for Hopper without a GPU and without a spill."""

import re
import subprocess
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rectokens.kernels import decoder_triton as decoder
from rectokens.kernels import gated_linear_launch, gated_linear_triton
from rectokens.kernels import head_norm_triton as head
from rectokens.kernels.head_norm_launch import tile_for

HOPPER = GPUTarget("cuda", 90, 32)
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
SHARED_MEMORY_LIMIT = 227 * 1024
TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def code_of(kernel, tmp_path, dtype, constants, blocks=None, **options):
    """Machine code, after the checks that all kernels must pass."""

    def kind(name):
        if name in constants:
            return "constexpr"
        if name.endswith("_desc"):
            return f"tensordesc<{TYPES[dtype]}{blocks[name]}>"
        if not name.endswith("_ptr"):
            return "fp32" if name in ("eps", "factor", "softcap") else "i32"
        if name in ("slot_ptr", "position_ptr", "kind_ptr"):
            return "*i32"
        if name == "scale_ptr":
            return "*fp32"
        if name == "out_ptr" and ("fp8" in kernel.__name__ or constants.get("FP8")):
            return "*fp8e4nv"
        wide = kernel is head.linear_logsumexp_kernel and name == "out_ptr"
        return "*fp32" if wide else f"*{TYPES[dtype]}"

    signature = {name: kind(name) for name in kernel.arg_names}
    place = kernel.arg_names.index
    aligned = [name for name in signature if name.endswith(("_ptr", "_row", "_stride", "size"))]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(place(name),): value for name, value in constants.items()},
        attrs={(place(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    compiled = triton.compile(source, target=HOPPER, options=options)
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    usage = cuobjdump("--dump-resource-usage", cubin)
    stack, local = (int(re.search(rf"{name}:(\d+)", usage).group(1)) for name in ("STACK", "LOCAL"))
    assert stack + local == 0, usage
    assert compiled.metadata.shared <= SHARED_MEMORY_LIMIT
    return cuobjdump("-sass", cubin)


def cuobjdump(option, cubin):
    return subprocess.run(
        [str(CUOBJDUMP), option, str(cubin)], capture_output=True, text=True, check=True
    ).stdout


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("block", [1024, 16384])
@pytest.mark.parametrize("fp8", [False, True])
def test_norm(tmp_path, dtype, block, fp8):
    constants = {"HAS_RESIDUAL": True, "OFFSET": False, "FP8": fp8, "BLOCK": block}
    code = code_of(
        decoder.add_norm_kernel, tmp_path, dtype, constants, num_warps=max(2, block // 1024)
    )
    assert "LDG.E.128" in code or "LDG.E.64" in code


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rotate(tmp_path, dtype):
    constants = {"HAS_NORM": True, "OFFSET": False, "PAGE_SIZE": 64, "DIM": 128, "BLOCK_R": 16,
                 "BLOCK_HALF": 64}  # fmt: skip
    code_of(decoder.rotate_store_kernel, tmp_path, dtype, constants, num_warps=4)


def test_store_and_gate(tmp_path):
    constants = {"PAGE_SIZE": 64, "DIM": 128, "BLOCK_R": 16, "BLOCK_D": 128}
    code_of(decoder.store_kernel, tmp_path, torch.bfloat16, constants, num_warps=4)
    for activation in ("silu", "gelu_tanh", "gelu"):
        constants = {"ACTIVATION": activation, "BLOCK": 1024}
        code = code_of(decoder.gate_kernel, tmp_path, torch.bfloat16, constants, num_warps=4)
        assert "LDG.E.128" in code
    for block in (8192, 32768):
        constants = {"ACTIVATION": "silu", "BLOCK": block}
        code = code_of(decoder.gate_fp8_kernel, tmp_path, torch.bfloat16, constants,
                       num_warps=min(16, block // 1024))  # fmt: skip
        assert "LDG.E.128" in code


@pytest.mark.parametrize(
    ("rows", "activation"), [(64, "silu"), (128, "silu"), (256, "gelu"), (512, "silu")]
)
def test_gated_product(tmp_path, rows, activation):
    tile = gated_linear_launch.tile_for(rows)
    constants = {"ACTIVATION": activation, "GROUP": 8, "BLOCK_M": tile.rows,
                 "BLOCK_N": tile.outputs, "BLOCK_K": tile.hidden}  # fmt: skip
    blocks = {
        "x_desc": [tile.rows, tile.hidden],
        "weight_desc": [tile.outputs, tile.hidden],
        "out_desc": [tile.rows, tile.outputs // 2],
    }
    code = code_of(gated_linear_triton.gated_linear_kernel, tmp_path, torch.bfloat16, constants,
                   blocks, num_warps=tile.warps, num_stages=tile.stages)  # fmt: skip
    assert "HGMMA" in code
    assert "UTMALDG" in code
    assert "UTMASTG" in code


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (20, True),
        (64, True),
        (256, True),
        (257, False),
        (1024, True),
        (1152, False),
        (5000, True),
        (16384, True),
    ],
)
def test_where_the_gated_product_pays(rows, expected):
    assert gated_linear_launch.pays(rows, 12_288, 132) is expected


def test_few_outputs_leave_few_rows_to_a_product_and_a_gate():
    assert not gated_linear_launch.pays(64, 6_144, 132)
    assert not gated_linear_launch.pays(256, 49_152, 132)


@pytest.mark.parametrize(
    ("dtype", "rows"),
    [(torch.bfloat16, 8), (torch.float16, 64), (torch.bfloat16, 256), (torch.float32, 256)],
)
def test_logsumexp(tmp_path, dtype, rows):
    block_r, block_n, block_h, warps, stages = tile_for(rows, dtype)
    constants = {"HIDDEN": 2048, "HAS_BIAS": True, "HAS_SOFTCAP": True, "BLOCK_R": block_r,
                 "BLOCK_N": block_n, "BLOCK_H": block_h,
                 "PRECISION": "tf32x3" if dtype == torch.float32 else "tf32"}  # fmt: skip
    code = code_of(head.linear_logsumexp_kernel, tmp_path, dtype, constants,
                   num_warps=warps, num_stages=stages)  # fmt: skip
    assert re.search("HG?MMA", code)


def test_joining_parts(tmp_path):
    code_of(head.join_parts_kernel, tmp_path, torch.float32, {"BLOCK_R": 16, "BLOCK_P": 64},
            num_warps=4)  # fmt: skip
