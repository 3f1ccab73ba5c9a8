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
from rectokens.kernels.constrained_launch import FINE, LONG, NARROW, WIDE
from rectokens.kernels.nearest_launch import settings_for

HOPPER = GPUTarget("cuda", 90, 32)
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
SHARED_MEMORY_LIMIT = 227 * 1024
FLOAT64 = ("gaps_ptr",)
INT32 = ("found_ptr",)
FLOAT32 = ("logits_ptr", "stats_ptr", "temperature_ptr", "out_logits_ptr", "out_log_probas_ptr",
           "squares_ptr", "scratch_ptr", "distance_ptr")  # fmt: skip
HALVES = ("high_ptr", "low_ptr")
DATA = ("a_ptr", "w_ptr", "bias_ptr", "source_ptr", "x_ptr", "codes_ptr")
WRITE_FLOAT32 = (
    constrained.product_kernel,
    constrained.project_kernel,
    constrained.place_kernel,
)
INT64 = ("edge_stride", "a_row", "w_token", "source_row")


def code_of(kernel, tmp_path, dtype, constants, may_spill=0, **options):
    """Machine code, after the checks that all kernels must pass."""

    def kind(name):
        if name in constants:
            return "constexpr"
        if name in FLOAT32 or (name == "out_ptr" and kernel in WRITE_FLOAT32):
            return "*fp32"
        if name in HALVES:
            return "*bf16"
        if name in FLOAT64 or name in INT32:
            return "*fp64" if name in FLOAT64 else "*i32"
        if name in DATA or (name == "out_ptr" and kernel is constrained.spread_kernel):
            return f"*{dtype}"
        return "*i64" if name.endswith("_ptr") else "i64" if name in INT64 else "i32"

    signature = {name: kind(name) for name in kernel.arg_names}
    place = kernel.arg_names.index
    constexprs = {(place(name),): value for name, value in constants.items()}
    # Unit strides are constants, as they are at a launch.
    for name in ("a_col", "w_hidden", "source_col"):
        if name in signature:
            signature[name] = "constexpr"
            constexprs[(place(name),)] = 1
    aligned = [name for name in signature if name.endswith("_ptr") or name in INT64]
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
    registers = re.search(r"REG:(\d+)", usage).group(1)
    print(f"{kernel.__name__} {dtype}: {registers} registers, {compiled.metadata.shared} bytes "
          f"shared, {stack + local} spilled")  # fmt: skip
    assert stack + local <= may_spill, usage
    assert compiled.metadata.shared <= SHARED_MEMORY_LIMIT
    return cuobjdump("-sass", cubin)


def cuobjdump(option, cubin):
    return subprocess.run(
        [str(TOOLS / "cuobjdump"), option, str(cubin)], capture_output=True, text=True, check=True
    ).stdout


@pytest.mark.parametrize(
    ("dtype", "fill", "chosen", "slots", "may_spill"),
    [
        # Where some may spill, smaller tiles did not, and were slower.
        ("bf16", False, WIDE, 64, 48),
        ("fp32", True, WIDE, 64, 600),
        ("bf16", False, FINE, 32, 0),
        ("bf16", True, FINE, 32, 0),
        ("fp32", False, FINE, 32, 0),
        ("fp32", True, FINE, 32, 0),
        ("fp32", True, LONG, 64, 40),
        ("bf16", False, LONG, 64, 0),
        ("fp32", True, NARROW, 16, 0),
        ("bf16", False, NARROW, 16, 0),
    ],
)
def test_project(tmp_path, dtype, fill, chosen, slots, may_spill):
    narrow = 1 if dtype == "bf16" else 2
    constants = {"HIDDEN": 1024, "HAS_BIAS": True, "FILL": fill, "GROUP": chosen.group,
                 "FEW": chosen.few, "BLOCK_M": slots, "BLOCK_K": 2 * chosen.depth // narrow,
                 "CHAINS": chosen.chains, "PAIRS": chosen.pairs, "AHEAD": chosen.ahead,
                 "BLOCK_H": chosen.pairs_hidden // narrow, "BLOCK_IDS": 256,
                 "BLOCK_SHARED": chosen.listed, "BLOCK_FILL": chosen.fill,
                 "LEAVES": chosen.leaves}  # fmt: skip
    code = code_of(constrained.project_kernel, tmp_path, dtype, constants, may_spill,
                   num_warps=chosen.warps, num_stages=chosen.stages)  # fmt: skip
    assert re.search("HG?MMA", code)
    # Wide loads of weights, wide stores of the filling.
    assert re.search(r"LDGSTS\.E\S*\.128", code)
    assert re.search(r"STG\.E\S*\.128", code) or not fill


def test_place(tmp_path):
    for rows, block in ((1, 1024), (64, 16)):
        constants = {"ROWS": rows, "BLOCK_M": block}
        code_of(constrained.place_kernel, tmp_path, "fp32", constants, num_warps=4)


@pytest.mark.parametrize(("dtype", "block"), [("bf16", 128), ("fp32", 128), ("fp32", 64)])
def test_product(tmp_path, dtype, block):
    constants = {"HIDDEN": 1024, "HAS_BIAS": False, "BLOCK_B": block, "BLOCK_N": block,
                 "BLOCK_H": 64 if dtype == "bf16" else 32}  # fmt: skip
    code = code_of(constrained.product_kernel, tmp_path, dtype, constants, num_warps=block // 16,
                   num_stages=3)  # fmt: skip
    assert "HGMMA" in code


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_spread(tmp_path, dtype):
    code = code_of(constrained.spread_kernel, tmp_path, dtype, {"BLOCK": 4096, "BLOCK_M": 512},
                   num_warps=4)  # fmt: skip
    assert "BAR.SYNC" in code


@pytest.mark.parametrize(
    ("draw", "k", "block", "warps"),
    [
        (False, 1, 2048, 8),
        (True, 1, 2048, 8),
        (False, 64, 2048, 4),
        (False, 64, 256, 1),
        (True, 64, 2048, 4),
        (False, 512, 512, 2),
        (True, 512, 512, 2),
    ],
)
def test_select(tmp_path, draw, k, block, warps):
    constants = {"HEATED": True, "DRAW": draw, "K": k, "BLOCK": block}
    code_of(selection.select_kernel, tmp_path, "fp32", constants, num_warps=warps)


def test_long_rows(tmp_path):
    constants = {"HEATED": True, "DRAW": True, "K": 64, "BLOCK": 2048}
    code_of(selection.part_kernel, tmp_path, "fp32", constants, num_warps=8)
    code_of(selection.merge_kernel, tmp_path, "fp32", {"K": 64, "BLOCK": 2048}, num_warps=8)
    code_of(selection.stats_kernel, tmp_path, "fp32", {"HEATED": True, "BLOCK": 2048}, num_warps=8)
    code_of(selection.merge_kernel, tmp_path, "fp32", {"K": 512, "BLOCK": 2048}, num_warps=8)
    code_of(selection.emit_kernel, tmp_path, "fp32", {"HEATED": False, "K": 64}, num_warps=4)


@pytest.mark.parametrize(
    ("levels", "rows", "exact"),
    [(1, 3_000, True), (4, 5_000, True), (1, 65_536, True), (4, 65_536, True), (1, 65_536, False)],
)
def test_nearest(tmp_path, levels, rows, exact):
    chosen = settings_for(rows, levels, 132, 512)
    assert chosen.parts == 1
    constants = {"LEVELS": levels, "DIM": 256, "EXACT": exact, "WITH_DISTANCE": False,
                 "BLOCK_B": chosen.rows, "BLOCK_N": chosen.codes, "BLOCK_D": chosen.dims,
                 "LENGTH_D": chosen.length_dims, "LOOK_N": chosen.look_codes,
                 "LOOK_D": chosen.look_dims}  # fmt: skip
    # The widest tiles spill a few registers between products; smaller ones without were slower.
    code = code_of(nearest.nearest_kernel, tmp_path, "fp32", constants,
                   24 if levels == 1 else 0, num_warps=chosen.warps,
                   num_stages=chosen.stages)  # fmt: skip
    assert ("HGMMA" if chosen.rows >= 64 else "HMMA") in code


@pytest.mark.parametrize(("rows", "span"), [(32, 64), (1_000, 128)])
def test_nearest_in_parts(tmp_path, rows, span):
    chosen = settings_for(rows, 1, 132, 512)
    assert triton.cdiv(512, chosen.parts) == span
    constants = {"DIM": 256, "EXACT": True, "BLOCK_B": chosen.rows, "BLOCK_N": span,
                 "BLOCK_D": chosen.dims, "LENGTH_D": chosen.length_dims,
                 "LOOK_N": chosen.look_codes, "LOOK_D": chosen.look_dims}  # fmt: skip
    code = code_of(nearest.part_kernel, tmp_path, "fp32", constants, num_warps=chosen.warps,
                   num_stages=chosen.stages)  # fmt: skip
    assert "HMMA" in code
    code_of(nearest.merge_kernel, tmp_path, "fp32", {"PARTS": 8, "BLOCK_B": 32}, num_warps=1)


def test_split(tmp_path):
    constants = {"DIM": 256, "BLOCK_N": 4, "BLOCK_D": 256}
    code_of(nearest.split_kernel, tmp_path, "fp32", constants, num_warps=4)
