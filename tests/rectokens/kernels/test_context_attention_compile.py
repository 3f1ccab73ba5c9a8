"""The context attention kernels compile for Hopper without a GPU and without a spill."""

import re
import subprocess
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rectokens.kernels import context_attention_launch as launch
from rectokens.kernels import context_attention_triton as kernels

HOPPER = GPUTarget("cuda", 90, 32)
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
SHARED_MEMORY_LIMIT = 227 * 1024
INTS = ("request", "start", "starts", "length", "table", "path")
FLOATS = ("part", "part_norm")
TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def code_of(kernel, tmp_path, dtype, constants, spilled=0, **options):
    """Machine code, after the checks that all kernels must pass."""

    def kind(name):
        if name in constants:
            return "constexpr"
        if name.endswith("_desc"):
            block = f"[{constants['BLOCK_N']}, {constants['DIM']}]"
            return f"tensordesc<{TYPES[dtype]}{block}>" if constants["BULK"] else "*i8"
        if not name.endswith("_ptr"):
            return "fp32" if name in ("scale", "softcap") else "i32"
        stem = name.removesuffix("_ptr")
        if stem in FLOATS:
            return "*fp32"
        return "*i32" if stem.rpartition("_")[2] in INTS else f"*{TYPES[dtype]}"

    signature = {name: kind(name) for name in kernel.arg_names}
    place = kernel.arg_names.index
    aligned = [
        name for name in signature
        if name.endswith(("_ptr", "query_row", "out_row", "page_stride", "head_stride", "own_step"))
    ]  # fmt: skip
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
    assert stack + local <= spilled, usage
    assert compiled.metadata.shared <= SHARED_MEMORY_LIMIT
    return cuobjdump("-sass", cubin)


def cuobjdump(option, cubin):
    return subprocess.run(
        [str(CUOBJDUMP), option, str(cubin)], capture_output=True, text=True, check=True
    ).stdout


def streaming(dim, tile, dtype, rule, bulk=False):
    return {
        "BULK": bulk,
        "GROUP": 2,
        "HAS_WINDOW": "window" in rule,
        "HAS_SOFTCAP": "softcap" in rule,
        "PAGE_SIZE": 64,
        "DIM": dim,
        "BLOCK_M": tile.rows,
        "BLOCK_N": tile.positions,
        "BLOCK_D": triton.next_power_of_2(dim),
        "PRECISION": "tf32x3" if dtype == torch.float32 else "tf32",
    }


CASES = [
    (torch.bfloat16, 128, ""),
    (torch.bfloat16, 64, ""),
    (torch.float16, 80, ""),
    (torch.bfloat16, 256, "window softcap"),
    (torch.float32, 128, ""),
    (torch.float32, 64, "window softcap"),
]


@pytest.mark.parametrize(("dtype", "dim", "rule"), CASES)
def test_prompt(tmp_path, dtype, dim, rule):
    tile = launch.prompt_tile(dim, dtype)
    constants = streaming(dim, tile, dtype, rule)
    # Four warps keep a few registers in memory and are faster all the same than eight that do not.
    code = code_of(kernels.prompt_kernel, tmp_path, dtype, constants, spilled=128,
                   num_warps=tile.warps, num_stages=tile.stages)  # fmt: skip
    assert re.search("HG?MMA", code)


@pytest.mark.parametrize("rows", [1024, 5000])
def test_bulk_copies(tmp_path, rows, monkeypatch):
    monkeypatch.setattr(launch, "multiprocessors", lambda device, interpreted: 132)
    dtype, device = torch.bfloat16, torch.device("cuda")
    prompt = launch.prompt_tile_in_use(16, 128, rows, dtype, device, bulk=True)
    assert launch.prompt_tile(128, dtype).rows % prompt.rows == 0
    for kernel, tile in (
        (kernels.prompt_kernel, prompt),
        (kernels.context_kernel, launch.beam_tile(128, dtype)),
    ):
        code = code_of(kernel, tmp_path, dtype, streaming(128, tile, dtype, "", bulk=True),
                       spilled=192, num_warps=tile.warps, num_stages=tile.stages)  # fmt: skip
        assert "HGMMA" in code
        assert "UTMALDG" in code


@pytest.mark.parametrize(("dtype", "dim", "rule"), CASES)
def test_context(tmp_path, dtype, dim, rule):
    tile = launch.beam_tile(dim, dtype)
    constants = streaming(dim, tile, dtype, rule)
    code = code_of(kernels.context_kernel, tmp_path, dtype, constants,
                   num_warps=tile.warps, num_stages=tile.stages)  # fmt: skip
    assert re.search("HG?MMA", code)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dim", [128, 256])
def test_merge(tmp_path, dtype, dim):
    constants = {"GROUP": 2, "HAS_WINDOW": True, "HAS_SOFTCAP": True, "DIM": dim,
                 "BLOCK_R": 16, "BLOCK_D": dim}  # fmt: skip
    code_of(kernels.merge_kernel, tmp_path, dtype, constants, num_warps=4)
