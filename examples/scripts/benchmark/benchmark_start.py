"""How long an engine takes to start: a model that is in memory, until its first batch is answered.

    TRITON_CACHE_DIR=$(mktemp -d) python -m examples.scripts.benchmark.benchmark_start

With an empty cache everything is compiled, as on a new machine; a second run without the variable
shows a machine that has started before. ``--no-ahead`` compiles each kernel when it is first
launched, which is what the default is compared with. ``kernels`` are those compiled in a step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from examples.scripts.benchmark.benchmark_engine import Subject, users
from examples.scripts.benchmark.benchmark_prefix_cache import MODELS, build
from examples.scripts.benchmark.kernel_timing import write_csv
from rectokens.kernels import compile_ahead
from rectokens.ops.dispatch import triton_is_installed
from server.engine.device.engine import DeviceOptions
from server.engine.loading import build_engine
from server.engine.pool_setup import PoolOptions
from server.engine.types import EngineFault

COLUMNS = ("model", "ahead", "step", "seconds", "kernels")


@contextmanager
def counting() -> Iterator[list[str]]:
    """Names of the kernels that Triton compiles meanwhile."""
    names: list[str] = []
    if not triton_is_installed():
        yield names
        return
    import triton

    runtime = triton.knobs.runtime
    before = runtime.jit_post_compile_hook
    runtime.jit_post_compile_hook = lambda **known: names.append(known["fn"].name)
    try:
        yield names
    finally:
        runtime.jit_post_compile_hook = before


def steps_of(
    lm: Any, tokens: Any, trie: Any, memory_mib: int, beam_width: int
) -> dict[str, Callable[[], None]]:
    """What starting consists of, and a batch after that."""
    made: list[Subject] = []

    def start() -> None:
        pool = PoolOptions(memory_bytes=memory_mib << 20)
        engine = build_engine(lm, tokens, pool, DeviceOptions())
        made.append(Subject("", lm, tokens, trie, engine))

    def search() -> None:
        (subject,) = made
        batch = users(subject, 40, 1, beam_width, 1, "children")
        (result,) = subject.engine.search(batch, trie).results
        if isinstance(result, EngineFault):
            raise RuntimeError(f"the engine failed: {result.message}")

    return {"the model is tried": start, "the first batch": search, "another batch": search}


def main(
    model: Annotated[str, typer.Option(help="Configuration.")] = "qwen3-1.7b",
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda",
    dtype: Annotated[str, typer.Option(help="Of the model.")] = "bfloat16",
    beam_width: Annotated[int, typer.Option(min=1, help="Beams, and items wanted.")] = 256,
    levels: Annotated[int, typer.Option(min=2, help="Codes of an item.")] = 3,
    codebook_size: Annotated[int, typer.Option(min=2, help="Codes of a level.")] = 8_192,
    items: Annotated[int, typer.Option(min=1, help="Items of the catalog.")] = 1_500_000,
    memory_mib: Annotated[int, typer.Option(min=1, help="For context KV.")] = 8_192,
    ahead: Annotated[bool, typer.Option(help="Compile kernels side by side.")] = True,
    out: Annotated[Path | None, typer.Option(help="CSV to write or to append to.")] = None,
) -> None:
    """Start once, and time it."""
    if model not in MODELS:
        raise typer.BadParameter(f"{model!r} is not one of {', '.join(MODELS)}")
    console = Console(width=120)
    if not ahead:
        compile_ahead.can_compile = lambda: False
    lm, tokens, trie = build(model, device, getattr(torch, dtype), levels, codebook_size, items)
    rows = []
    with counting() as names:
        for step, run in steps_of(lm, tokens, trie, memory_mib, beam_width).items():
            before, started = len(names), time.perf_counter()
            run()
            if device != "cpu":
                torch.cuda.synchronize()
            seconds = time.perf_counter() - started
            row = (model, ahead, step, round(seconds, 3), len(names) - before)
            rows.append(dict(zip(COLUMNS, row, strict=True)))
            console.print(f"{step}: {seconds:.2f} s, {len(names) - before} kernels compiled")
    if out is not None:
        write_csv(out, COLUMNS, rows, append=True)


if __name__ == "__main__":
    typer.run(main)
