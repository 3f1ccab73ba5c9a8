"""The hot kernels compile for Hopper without a GPU, without a spill; 16 bits on tensor cores."""

import re
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("triton")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rectokens.kernels import constrained_triton as constrained
from rectokens.kernels import nearest_triton as nearest
from rectokens.kernels import selection_triton as selection

HOPPER = GPUTarget("cuda", 90, 32)
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
SHARED_MEMORY_LIMIT = 227 * 1024
FLOAT32 = ("logits_ptr", "stats_ptr", "temperature_ptr", "out_logits_ptr", "out_log_probas_ptr",
           "squares_ptr", "scratch_ptr", "distance_ptr")  # fmt: skip
DATA = ("a_ptr", "w_ptr", "bias_ptr", "source_ptr", "x_ptr", "codes_ptr")
WIDE = ("edge_stride", "a_row", "w_token", "source_row")


def code_of(kernel, tmp_path, dtype, constants, **options):
    """Machine code, after the checks that all kernels must pass."""

    def kind(name):
        if name in constants:
            return "constexpr"
        if name in FLOAT32 or (name == "out_ptr" and kernel is constrained.product_kernel):
            return "*fp32"
        if name in DATA or (name == "out_ptr" and kernel is constrained.spread_kernel):
            return f"*{dtype}"
        return "*i64" if name.endswith("_ptr") else "i64" if name in WIDE else "i32"

    signature = {name: kind(name) for name in kernel.arg_names}
    place = kernel.arg_names.index
    constexprs = {(place(name),): value for name, value in constants.items()}
    # Unit strides are constants, as they are at a launch.
    for name in ("a_col", "w_hidden", "source_col"):
        if name in signature:
            signature[name] = "constexpr"
            constexprs[(place(name),)] = 1
    aligned = [name for name in signature if name.endswith("_ptr") or name in WIDE]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs=constexprs,
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
        [str(TOOLS / "cuobjdump"), option, str(cubin)], capture_output=True, text=True, check=True
    ).stdout


@pytest.mark.parametrize(("dtype", "wide"), [("bf16", False), ("fp32", True)])
def test_shared(tmp_path, dtype, wide):
    constants = {"HIDDEN": 1024, "HAS_BIAS": False, "GROUP": 64, "BLOCK_M": 64,
                 "BLOCK_H": 32 if wide else 64}  # fmt: skip
    code = code_of(constrained.shared_kernel, tmp_path, dtype, constants,
                   num_warps=8 if wide else 4, num_stages=3)  # fmt: skip
    # fp32 must stay fp32: no tensor core rounds it to TF32.
    assert ("FFMA" in code and "HMMA" not in code) if wide else re.search("HG?MMA", code)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_gather(tmp_path, dtype):
    constants = {"HIDDEN": 2048, "HAS_BIAS": True, "GROUP": 64, "BLOCK_M": 8, "BLOCK_H": 512}
    code = code_of(constrained.gather_kernel, tmp_path, dtype, constants, num_warps=4)
    assert re.search(r"LDG\.E\.128", code)


@pytest.mark.parametrize(("dtype", "block", "warps"), [("bf16", 128, 8), ("fp32", 64, 8)])
def test_product(tmp_path, dtype, block, warps):
    constants = {"HIDDEN": 1024, "HAS_BIAS": False, "BLOCK_B": block, "BLOCK_N": block,
                 "BLOCK_H": 64 if dtype == "bf16" else 32}  # fmt: skip
    code_of(constrained.product_kernel, tmp_path, dtype, constants, num_warps=warps, num_stages=3)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("from_logits", [True, False])
def test_spread(tmp_path, dtype, from_logits):
    constants = {"FROM_LOGITS": from_logits, "BLOCK": 4096, "BLOCK_M": 512}
    code = code_of(constrained.spread_kernel, tmp_path, dtype, constants, num_warps=4)
    assert "BAR.SYNC" in code


@pytest.mark.parametrize("draw", [False, True])
@pytest.mark.parametrize(("k", "block", "warps"), [(1, 2048, 8), (64, 2048, 8), (512, 512, 2)])
def test_select(tmp_path, draw, k, block, warps):
    constants = {"DRAW": draw, "K": k, "BLOCK": block}
    code_of(selection.select_kernel, tmp_path, "fp32", constants, num_warps=warps)


def test_long_rows(tmp_path):
    constants = {"DRAW": True, "K": 64, "BLOCK": 2048}
    code_of(selection.part_kernel, tmp_path, "fp32", constants, num_warps=8)
    code_of(selection.merge_kernel, tmp_path, "fp32", {"K": 64, "BLOCK": 2048}, num_warps=8)
    code_of(selection.stats_kernel, tmp_path, "fp32", {"BLOCK": 2048}, num_warps=8)
    code_of(selection.merge_kernel, tmp_path, "fp32", {"K": 512, "BLOCK": 2048}, num_warps=8)
    code_of(selection.emit_kernel, tmp_path, "fp32", {"K": 64}, num_warps=4)


@pytest.mark.parametrize(("levels", "rows", "warps"), [(1, 64, 8), (4, 64, 8), (1, 16, 4)])
@pytest.mark.parametrize("exact", [True, False])
def test_nearest(tmp_path, levels, rows, warps, exact):
    constants = {"LEVELS": levels, "DIM": 256, "EXACT": exact, "WITH_DISTANCE": False,
                 "PRECISION": "ieee" if exact else "tf32", "BLOCK_B": rows, "BLOCK_N": 64,
                 "BLOCK_D": 32, "RECHECK_N": 16, "RECHECK_D": 32}  # fmt: skip
    code = code_of(nearest.nearest_kernel, tmp_path, "fp32", constants, num_warps=warps,
                   num_stages=2)  # fmt: skip
    assert bool(re.search("HG?MMA", code)) != exact
