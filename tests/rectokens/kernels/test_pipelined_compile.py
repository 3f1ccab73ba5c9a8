"""Attention kernels in Gluon compile for Hopper without a GPU and overlap what they should."""

import re
import subprocess
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from rectokens.kernels import paired_attention, paired_beams, paired_launch
from rectokens.kernels import pipelined_attention as kernels
from rectokens.kernels import pipelined_launch as launch

HOPPER = GPUTarget("cuda", 90, 32)
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
CUOBJDUMP, PTXAS = TOOLS / "cuobjdump", TOOLS / "ptxas"
SHARED_MEMORY_LIMIT = 227 * 1024
ALIGNED = ("_ptr", "query_row", "out_row", "own_step")
TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16"}


def compile_(kernel, tmp_path, constants, width, dtype):
    """The compiled kernel, after the checks that all must pass; bulk copies are so wide."""
    constants = {"GROUP": 2, "PAGE": 64, **constants}
    layout = gl.NVMMASharedLayout(128, 16, 2)

    def kind(name):
        if name in constants:
            return "constexpr"
        if name.endswith("_desc"):
            return f"tensordesc<{TYPES[dtype]}[{launch.BLOCK}, {width}],{layout!r}>"
        if name in ("query_ptr", "out_ptr", "own_key_ptr", "own_value_ptr"):
            return f"*{TYPES[dtype]}"
        if name in ("part_ptr", "part_norm_ptr"):
            return "*fp32"
        return "*i32" if name.endswith("_ptr") else "fp32" if name == "scale" else "i32"

    place = kernel.arg_names.index
    aligned = [name for name in kernel.arg_names if name.endswith(ALIGNED)]
    source = GluonASTSource(
        fn=kernel,
        signature={name: kind(name) for name in kernel.arg_names},
        constexprs={(place(name),): value for name, value in constants.items()},
        attrs={(place(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    compiled = triton.compile(source, target=HOPPER, options={"num_warps": 4})
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    usage = subprocess.run(
        [str(CUOBJDUMP), "--dump-resource-usage", str(cubin)],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    stack, local = (int(re.search(rf"{name}:(\d+)", usage).group(1)) for name in ("STACK", "LOCAL"))
    assert stack + local == 0, usage
    assert compiled.metadata.shared <= SHARED_MEMORY_LIMIT
    return compiled


@pytest.mark.parametrize("kernel", [kernels.prompt_kernel, kernels.context_kernel])
@pytest.mark.parametrize(("dim", "dtype"), [(128, torch.bfloat16), (64, torch.float16)])
def test_compiles_and_overlaps(tmp_path, kernel, dim, dtype):
    tile = launch.TILE
    assert tile.warps == 4
    compiled = compile_(kernel, tmp_path, {"M": tile.rows, "STAGES": tile.stages}, dim, dtype)
    assert_overlaps(compiled, tmp_path)


@pytest.mark.parametrize("kernel", [paired_attention.prompt_kernel, paired_beams.beam_kernel])
@pytest.mark.parametrize(("dim", "dtype"), [(128, torch.bfloat16), (64, torch.float16)])
def test_paired_compiles_and_overlaps(tmp_path, kernel, dim, dtype):
    tile = paired_launch.TILE
    constants = {
        "M": tile.rows // 2,
        "DIM": dim,
        "STAGES": tile.stages,
        "GROUP_REGISTERS": tile.group_registers,
        "COPY_REGISTERS": tile.copy_registers,
    }
    compiled = compile_(kernel, tmp_path, constants, 64, dtype)
    assert_overlaps(compiled, tmp_path)
    ptx = compiled.asm["ptx"]
    # Two groups of four warps, and the copying one with what fills up its own four.
    assert compiled.metadata.num_warps == 12
    assert f"setmaxnreg.inc.sync.aligned.u32 \t{tile.group_registers}" in ptx
    # One thread tells that a group has read something, for all four warps.
    told = re.findall(r"(wgmma\.wait_group|bar\.sync|mbarrier\.arrive\.shared)", ptx)
    before = [told[i - 1] for i, event in enumerate(told) if event.startswith("mbarrier.arrive")]
    assert len(before) >= 6
    assert set(before) == {"bar.sync"}


def assert_overlaps(compiled, tmp_path):
    assert "cp.async.bulk.tensor" in compiled.asm["ptx"]
    source = tmp_path / "kernel.ptx"
    source.write_text(compiled.asm["ptx"])
    target = ["--gpu-name", "sm_90a", "-o", str(tmp_path / "again.cubin")]
    assembled = subprocess.run(
        [str(PTXAS), "-v", *target, str(source)], capture_output=True, text=True, check=True
    ).stderr
    # The assembler says so where it waits after every product, whatever the source says.
    assert "registers" in assembled
    assert "serialized" not in assembled


@pytest.mark.parametrize(
    ("changed", "taken"),
    [
        ({}, True),
        ({"dtype": torch.float32}, False),
        ({"dim": 96}, False),
        ({"page": 48}, False),
        ({"capability": (8, 0)}, False),
        ({"capability": (10, 0)}, False),
        ({"version": "3.9.0"}, False),
        ({"device": "cpu"}, False),
    ],
)
def test_takes_what_it_was_tried_with(monkeypatch, changed, taken):
    given = {"dim": 128, "dtype": torch.bfloat16, "page": 64, "capability": (9, 0),
             "version": "3.6.0", "device": "cuda", **changed}  # fmt: skip
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: given["capability"])
    monkeypatch.setattr(triton, "__version__", given["version"])
    found = launch.takes(given["dim"], given["dtype"], given["page"], torch.device(given["device"]))
    assert found is taken
