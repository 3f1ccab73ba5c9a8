"""The TurboQuant kernels compile for Hopper without a GPU: tensor cores used, registers enough."""

import re
import subprocess
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rectokens._turboquant.codec import block_rotation, codec_for, hadamard_rotation
from rectokens.kernels.turboquant import decode_kernel, encode_kernel
from rectokens.kernels.turboquant_decode_ptx import decode_ptx
from rectokens.kernels.turboquant_encode_ptx import encode_ptx
from rectokens.kernels.turboquant_launch import (
    boundary_guess,
    decode_settings,
    encode_settings,
    tile_shape,
)
from rectokens.kernels.turboquant_warp_launch import decode_settings as decode_warp_settings
from rectokens.kernels.turboquant_warp_launch import encode_settings as encode_warp_settings
from rectokens.kernels.warp_rows import (
    SLICE,
)

turboquant_warp = pytest.importorskip("rectokens.kernels.turboquant_warp")
gluon_runtime = pytest.importorskip("triton.experimental.gluon._runtime")

HOPPER = GPUTarget("cuda", 90, 32)
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
SHARED_MEMORY_LIMIT = 227 * 1024
REGISTERS_OF_AN_SM = 65536


def rotation_of(dim):
    return hadamard_rotation(dim, 42) if "/hd2/" in codec_for(dim) else block_rotation(dim, 42)


def compile_kernel(kernel, pointers, scalars, constants, settings, tmp_path):
    """Registers, stack bytes, local bytes, shared bytes and machine code of the compiled kernel."""
    constants = {**constants, "PERSISTENT": int(settings.programs_per_sm > 0)}
    signature = {**pointers, **scalars, **dict.fromkeys(constants, "constexpr")}
    place = kernel.arg_names.index
    source = ASTSource(
        fn=kernel,
        signature={name: signature[name] for name in kernel.arg_names},
        constexprs={(place(name),): value for name, value in constants.items()},
        attrs={
            (place(name),): [["tt.divisibility", 16]]
            for name in (*pointers, "x_stride")
            if name in signature
        },
    )
    compiled = triton.compile(source, target=HOPPER, options={"num_warps": settings.num_warps})
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    usage = run("--dump-resource-usage", cubin)
    registers, stack, local = (
        int(re.search(rf"{name}:(\d+)", usage).group(1)) for name in ("REG", "STACK", "LOCAL")
    )
    return registers, stack, local, compiled.metadata.shared, run("-sass", cubin)


def run(option, cubin):
    return subprocess.run(
        [str(TOOLS / "cuobjdump"), option, str(cubin)], capture_output=True, text=True, check=True
    ).stdout


def compile_encode(dim, bits, dtype, tmp_path):
    rotation = rotation_of(dim)
    settings = encode_settings(rotation, bits)
    constants = {
        **tile_shape(rotation).constants,
        "BITS": bits,
        "GUESS_TERMS": boundary_guess(dim, bits).numel(),
        "STAGES": settings.stages,
    }
    pointers = {
        "x_ptr": f"*{dtype}",
        "packed_ptr": "*u8",
        "norms_ptr": "*fp32",
        "first_signs_ptr": "*fp16",
        "second_signs_ptr": "*fp16",
        "boundaries_ptr": "*fp32",
        "guess_ptr": "*fp32",
    }
    scalars = {"num_rows": "i32", "x_stride": "i64", "gain": "fp32"}
    return settings, compile_kernel(encode_kernel, pointers, scalars, constants, settings, tmp_path)


def compile_decode(dim, bits, tmp_path):
    rotation = rotation_of(dim)
    settings = decode_settings(rotation, bits)
    constants = {**tile_shape(rotation).constants, "BITS": bits}
    pointers = {
        "packed_ptr": "*u8",
        "norms_ptr": "*fp32",
        "out_ptr": "*fp32",
        "first_signs_ptr": "*fp16",
        "second_signs_ptr": "*fp16",
        "centroids_ptr": "*fp16",
    }
    scalars = {"num_rows": "i32", "gain": "fp32"}
    return settings, compile_kernel(decode_kernel, pointers, scalars, constants, settings, tmp_path)


def check(settings, compiled, *, allowed_spill=0):
    registers, stack, local, shared, code = compiled
    assert stack + local <= allowed_spill
    assert shared <= SHARED_MEMORY_LIMIT
    threads = settings.num_warps * 32
    assert registers * threads * max(1, settings.programs_per_sm) <= REGISTERS_OF_AN_SM
    assert shared * max(1, settings.programs_per_sm) <= SHARED_MEMORY_LIMIT
    assert "HMMA" in code


@pytest.mark.parametrize(
    ("dim", "bits", "dtype"),
    [
        (4096, 1, "bf16"),
        (4096, 2, "bf16"),
        (4096, 4, "bf16"),
        (4096, 4, "fp32"),
        (4096, 8, "bf16"),
        (1024, 4, "bf16"),
        (8192, 4, "bf16"),
        (8192, 8, "bf16"),
        (16384, 4, "bf16"),
        (2560, 4, "bf16"),
        (5120, 8, "bf16"),
    ],
)
def test_encode(dim, bits, dtype, tmp_path):
    check(*compile_encode(dim, bits, dtype, tmp_path))


def test_encode_of_the_largest_rows_at_eight_bits(tmp_path):
    # 512 threads of 128 registers: a few bytes spill, once a row of 48 KB.
    check(*compile_encode(16384, 8, "bf16", tmp_path), allowed_spill=64)


@pytest.mark.parametrize(
    ("dim", "bits"), [(4096, 4), (4096, 8), (1024, 1), (8192, 4), (16384, 4), (2560, 4)]
)
def test_decode(dim, bits, tmp_path):
    check(*compile_decode(dim, bits, tmp_path))


def test_the_main_encode_kernel_moves_wide_words(tmp_path):
    _, (_, _, _, _, code) = compile_encode(4096, 4, "bf16", tmp_path)
    # Rows come in 16 bytes a thread, prefetched; the bytes of a row leave in wide stores.
    assert re.search(r"LDGSTS\S*\.128", code)
    assert re.search(r"STG\.E\.(64|128)", code)


def compile_warp(kernel, types, constants, settings, tmp_path):
    """Registers, spilled bytes and machine code of a kernel in which warps hold a row."""
    constants = {**constants, "ROWS": settings.rows, "TEAM": settings.team}
    signature = {**types, **dict.fromkeys(constants, "constexpr")}
    place = kernel.arg_names.index
    source = gluon_runtime.GluonASTSource(
        fn=kernel,
        signature={name: signature[name] for name in kernel.arg_names},
        constexprs={(place(name),): value for name, value in constants.items()},
        attrs={
            (place(name),): [["tt.divisibility", 16]]
            for name, kind in types.items()
            if kind.startswith("*")
        },
    )
    warps = settings.rows * settings.team
    compiled = triton.compile(source, target=HOPPER, options={"num_warps": warps})
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    usage = run("--dump-resource-usage", cubin)
    registers, stack, local = (
        int(re.search(rf"{name}:(\d+)", usage).group(1)) for name in ("REG", "STACK", "LOCAL")
    )
    return registers, stack + local, run("-sass", cubin)


@pytest.mark.parametrize(
    ("dim", "bits", "kind", "most_registers"),
    [
        (4096, 4, "bf16", 128),
        (4096, 1, "fp16", 128),
        (4096, 8, "bf16", 128),
        (4096, 4, "fp32", 192),
        (1024, 4, "fp32", 80),
        (512, 2, "bf16", 64),
        (2560, 4, "bf16", 96),
        (5120, 8, "fp32", 192),
        (8192, 4, "bf16", 224),
        (8192, 8, "bf16", 224),
        (8192, 4, "fp32", 192),
        (16384, 4, "bf16", 224),
        (16384, 8, "fp32", 192),
        (14336, 4, "fp32", 255),
    ],
)
def test_encode_in_a_warp(dim, bits, kind, most_registers, tmp_path):
    team, (registers, spilled, code) = compile_warp_encode(dim, bits, kind, tmp_path)
    assert spilled == 0
    assert registers <= most_registers
    # Rows come in 16 bytes a lane.
    wide = dim // SLICE // team * (2 if kind == "fp32" else 1)
    assert len(re.findall(r"LDG\S*\.128", code)) >= wide


def compile_warp_encode(dim, bits, kind, tmp_path):
    types = {
        "x_ptr": f"*{kind}",
        "packed_ptr": "*u8",
        "norms_ptr": "*fp32",
        "signs_ptr": "*i32",
        "num_rows": "i32",
        "x_stride": "i32",
        "gain": "fp32",
    }
    rotation = rotation_of(dim)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[kind]
    settings = encode_warp_settings(rotation, bits, dtype)
    text = encode_ptx(dim, rotation.block, bits, kind, settings.fused, settings.team, settings.wide)
    constants = {"ROW_BYTES": dim * bits // 8, "PTX": text}
    kernel = turboquant_warp.encode_warp_kernel
    return settings.team, compile_warp(kernel, types, constants, settings, tmp_path)


@pytest.mark.parametrize(
    ("dim", "bits", "most_registers"),
    [(4096, 4, 128), (4096, 8, 128), (512, 2, 64), (2560, 1, 96), (8192, 4, 224), (16384, 8, 224)],
)
def test_decode_in_a_warp(dim, bits, most_registers, tmp_path):
    types = {
        "packed_ptr": "*u8",
        "norms_ptr": "*fp32",
        "out_ptr": "*fp32",
        "signs_ptr": "*i32",
        "centroids_ptr": "*fp16",
        "num_rows": "i32",
        "gain": "fp32",
    }
    rotation = rotation_of(dim)
    settings = decode_warp_settings(rotation)
    text = decode_ptx(dim, rotation.block, bits, settings.fused, settings.team)
    registers, spilled, code = compile_warp(
        turboquant_warp.decode_warp_kernel,
        types,
        {"DIM": dim, "ROW_BYTES": dim * bits // 8, "PTX": text},
        settings,
        tmp_path,
    )
    assert spilled == 0
    assert registers <= most_registers
    # Whole lines are written: 16 bytes a lane, lanes next to each other.
    assert len(re.findall(r"STG\S*\.128", code)) == 2 * dim // SLICE // settings.team
