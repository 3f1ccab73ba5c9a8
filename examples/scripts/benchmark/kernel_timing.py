"""What the kernel benchmarks share: two ways to time a call, heatmaps; and CSV files for all."""

from __future__ import annotations

import csv
import importlib
import importlib.util
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

WARMUP_MS = 10
EVENT_MS = 50
# Of one replay; there are ten of them.
GRAPH_MS = 20


@dataclass(frozen=True)
class Timing:
    """Median milliseconds of one call: inside a replayed graph, and between two events."""

    graph: float
    event: float


def time_call(call: Callable[[], Any], device: torch.device, *, graph: bool = True) -> Timing:
    """Time ``call``, which has run before, so that nothing is compiled here.

    ``graph=False``: the call waits for the host and cannot be captured; its graph time is NaN. On
    a CPU both are the median of three plain calls, good for a trial of the script only.
    """
    if device.type != "cuda":
        times = []
        for _ in range(3):
            started = time.perf_counter()
            call()
            times.append((time.perf_counter() - started) * 1000)
        return Timing(statistics.median(times), statistics.median(times))
    from triton import testing

    event = testing.do_bench(call, warmup=WARMUP_MS, rep=EVENT_MS, return_mode="median")
    if not graph:
        return Timing(math.nan, event)
    with torch.cuda.stream(torch.cuda.Stream()):
        replay = testing.do_bench_cudagraph(call, rep=GRAPH_MS, return_mode="median")
    return Timing(replay, event)


def compiled(function: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """``torch.compile`` for one shape on CUDA; the function itself on a CPU."""
    if device.type != "cuda":
        return function
    torch.compiler.reset()  # Else a new shape is compiled with dynamic sizes, which is slower.
    result: Callable[..., Any] = torch.compile(function, dynamic=False)
    return result


def rate_of(device: torch.device, *, copy: bool) -> float:
    """Bytes per second of a large fill (written) or copy (read and written) on the device.

    Copied by a kernel, a negation of float32: the device's own copy can be a third slower.
    """
    size = (2 << 30) if device.type == "cuda" else (16 << 20)
    target = torch.empty(size // 4, device=device)
    source = torch.randn(size // 4, device=device)
    if copy:
        taken = time_call(lambda: torch.neg(source, out=target), device)
        return 2 * size / taken.graph * 1000
    return size / time_call(lambda: target.fill_(7.0), device).graph * 1000


def device_of(name: str) -> torch.device:
    """The device asked for.

    Raises:
        SystemExit: CUDA asked for and not there.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device; --device cpu tries the script out")
    return torch.device(name)


def describe(device: torch.device) -> str:
    """Hardware and versions, for the head of a table."""
    if device.type != "cuda":
        return f"CPU, torch {torch.__version__}"
    import triton

    name = torch.cuda.get_device_name(device)
    return f"{name}, torch {torch.__version__}, triton {triton.__version__}"


def ratio(slow: float | None, fast: float | None) -> float | None:
    """How many times faster; None where either was not measured."""
    if slow is None or fast is None or math.isnan(slow) or math.isnan(fast):
        return None
    return round(slow / fast, 3)


def write_csv(
    path: Path,
    columns: Sequence[str],
    rows: Sequence[Mapping[str, Any]],
    *,
    append: bool = False,
) -> None:
    """Write ``rows``; what is None or missing is an empty field.

    Args:
        path: of the file; its folder is made.
        columns: of the file, in order; a row may have no others.
        rows: one line each.
        append: to what the file holds already, of earlier runs with the same columns.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    begun = append and path.exists()
    with path.open("a" if append else "w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="")
        if not begun:
            writer.writeheader()
        writer.writerows(rows)
    print(f"wrote {path}")


def write_tables(
    folder: Path,
    stem: str,
    columns: Sequence[str],
    details: Sequence[str],
    rows: Sequence[Mapping[str, Any]],
) -> None:
    """``<stem>.csv`` with ``columns``, and ``<stem>_details.csv`` with everything."""
    picked = [{name: row.get(name, "") for name in columns} for row in rows]
    write_csv(folder / f"{stem}.csv", columns, picked)
    write_csv(folder / f"{stem}_details.csv", [*columns, *details], rows)


def floors(
    a: Tensor, weight: Tensor, tokens: Tensor, width: int | None, device: torch.device
) -> dict[str, float]:
    """What no form of the same work can do without, measured here, milliseconds.

    Args:
        a: (B, H).
        weight: (V, H).
        tokens: int64 (M,), children of all rows.
        width: V where logits (B, V) must be written, else None.
        device: of all tensors.

    Returns:
        ``floor_ms_product``: the children's weight rows gathered once and multiplied, in the dtype
        of ``a``; ``floor_ms_product_bf16``: in bfloat16; ``floor_ms_write``, with a width: -inf
        into (B, V) float32.
    """
    found = {}
    for name, dtype in (("product", a.dtype), ("product_bf16", torch.bfloat16)):
        left, right = a.to(dtype), weight.to(dtype)
        taken = time_call(partial(_gather_product, left, right, tokens), device)
        found[f"floor_ms_{name}"] = round(taken.graph, 5)
    if width is not None:
        out = torch.empty(a.shape[0], width, device=device)
        found["floor_ms_write"] = round(time_call(partial(out.fill_, -math.inf), device).graph, 5)
    return found


def _gather_product(a: Tensor, weight: Tensor, tokens: Tensor) -> Tensor:
    return a @ weight.index_select(0, tokens).T


def heatmaps(
    path: Path, rows: Sequence[Mapping[str, Any]], x: str, y: str, values: Sequence[str]
) -> None:
    """One PNG, a panel for each column of ``values``; skipped with a message without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        print(f"skipped {path}: matplotlib is not installed")
        return
    importlib.import_module("matplotlib").use("Agg")
    plt: Any = importlib.import_module("matplotlib.pyplot")
    xs, ys = (sorted({row[name] for row in rows}) for name in (x, y))
    figure, axes = plt.subplots(1, len(values), figsize=(5 * len(values), 4), squeeze=False)
    for axis, value in zip(axes[0], values, strict=True):
        cells = {(row[x], row[y]): row.get(value) for row in rows}
        grid = [[cells.get((a, b)) or math.nan for a in xs] for b in ys]
        axis.imshow(grid, aspect="auto", origin="lower")
        axis.set(title=value, xlabel=x, ylabel=y)
        axis.set_xticks(range(len(xs)), xs)
        axis.set_yticks(range(len(ys)), ys)
        for i, line in enumerate(grid):
            for j, cell in enumerate(line):
                axis.text(j, i, f"{cell:.3g}", ha="center", va="center", color="white")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    print(f"wrote {path}")
