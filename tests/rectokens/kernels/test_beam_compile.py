"""The beam-step kernels compile for Hopper without a GPU and without a spill."""

import re
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("triton")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rectokens.kernels import beam_ends_triton as ends
from rectokens.kernels import beam_select_triton as select
from rectokens.kernels import beam_triton as kernels

HOPPER = GPUTarget("cuda", 90, 32)
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
INT64 = ("table_ptr", "keys_ptr", "candidates_ptr", "prefixes_ptr", "seed_ptr", "logits_batch",
         "logits_beam", "hidden_batch", "hidden_beam", "weight_code")  # fmt: skip
FLOAT32 = ("scores_ptr", "log_probs_ptr", "perturbed_ptr", "vocab_ptr", "level_ptr",
           "temperature_ptr", "rows_ptr", "parts_ptr", "new_scores_ptr", "new_code_scores_ptr",
           "new_log_probs_ptr", "new_perturbed_ptr", "code_scores_ptr")  # fmt: skip
DATA = ("logits_ptr", "hidden_ptr", "weight_ptr", "bias_ptr")
SIZES = {"COUNTERS_": kernels.COUNTERS, "BINS_": kernels.BINS}


def compile_(kernel, tmp_path, dtype="fp32", warps=4, **constants):
    if "EARLY" in kernel.arg_names:
        constants["EARLY"] = True

    def kind(name):
        if name in constants:
            return "constexpr"
        if name in ("factor", "softcap"):
            return "fp32"
        if name == "out_ptr" or name in FLOAT32:
            return "*fp32"
        if name in DATA:
            return f"*{dtype}"
        wide = "i64" if name in INT64 else "i32"
        return f"*{wide}" if name.endswith("_ptr") else wide

    source = ASTSource(
        fn=kernel,
        signature={name: kind(name) for name in kernel.arg_names},
        constexprs={(kernel.arg_names.index(k),): value for k, value in constants.items()},
    )
    compiled = triton.compile(source, target=HOPPER, options={"num_warps": warps})
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    usage = subprocess.run(
        [str(TOOLS / "cuobjdump"), "--dump-resource-usage", str(cubin)],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    stack, local = (int(re.search(rf"{name}:(\d+)", usage).group(1)) for name in ("STACK", "LOCAL"))
    assert stack + local == 0, usage
    assert compiled.metadata.shared <= 227 * 1024


@pytest.mark.parametrize(("rows", "block", "warps"), [(1, 512, 4), (2, 16, 1), (1, 1024, 8)])
@pytest.mark.parametrize("compact", [False, True])
def test_score_of_whole_rows(tmp_path, rows, block, warps, compact):
    compile_(kernels.score_kernel, tmp_path, "bf16", warps, BELOW=2, COMPACT=compact,
             HAS_VOCAB=True, HAS_LEVEL=compact, PARTS=0, COUNT=not compact, ROWS=rows,
             BLOCK=block, LEVEL_BLOCK=1024 // rows, **SIZES)  # fmt: skip


@pytest.mark.parametrize(
    ("parts", "block", "warps", "stats_block"), [(1, 1024, 8, 4096), (16, 128, 1, 512)]
)
def test_score_of_cut_rows(tmp_path, parts, block, warps, stats_block):
    forms = {"BELOW": 1, "COMPACT": False, "HAS_LEVEL": False, "PARTS": parts}
    compile_(kernels.score_kernel, tmp_path, warps=warps, HAS_VOCAB=False, COUNT=True, ROWS=1,
             BLOCK=block, LEVEL_BLOCK=1024, **forms, **SIZES)  # fmt: skip
    compile_(kernels.stats_kernel, tmp_path, warps=min(16, stats_block // 64), BLOCK=stats_block,
             **forms)  # fmt: skip


def test_selection(tmp_path):
    compile_(select.pick_kernel, tmp_path, warps=8, BLOCK=1024, **SIZES)


@pytest.mark.parametrize("direct", [False, True])
def test_rank(tmp_path, direct):
    compile_(select.rank_kernel, tmp_path, "bf16", COMPACT=direct, DIRECT=direct, LEVELS=4,
             OWN=16, BLOCK=256, **SIZES)  # fmt: skip


def test_ends(tmp_path):
    compile_(ends.begin_kernel, tmp_path, LEVELS=4, BLOCK=1024, COUNTERS_=kernels.COUNTERS)
    compile_(ends.finish_kernel, tmp_path, warps=8, LEVELS=4, BLOCK=1024)
    compile_(ends.child_logits_kernel, tmp_path, "bf16", SLOTS=16, HAS_BIAS=True,
             HAS_SOFTCAP=True, BLOCK_M=4, BLOCK_H=512)  # fmt: skip
