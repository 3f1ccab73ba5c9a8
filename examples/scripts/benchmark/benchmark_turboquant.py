"""Speed of TurboQuant encode and decode beside the copy rate of the device.

``python -m examples.scripts.benchmark.benchmark_turboquant --csv out.csv``

Before any time is taken, codes and decoded rows of that size are compared with the CPU path on
fresh random rows; a difference beyond the stated rate ends the run. On CUDA a time is that of one
launch inside a replayed graph of launches over several sets of buffers, so that caches hold no
row, once the device has been busy for 20 ms; elsewhere it is the median of plain calls. Bytes are
those an ideal kernel moves: each row read once, packed bytes and norms written once (or the
reverse). ``share`` is bytes per second over the measured copy rate, which counts bytes read and
written.

Arms: ``kernel``, what the library uses; ``dense``, the rotation alone as one matrix product in the
rows' type, without norm, assignment or packing; ``two-step``, norms, two Hadamard transforms,
assignment and packing in PyTorch, one after the other. Its transform is that of
``fast_hadamard_transform`` where that is installed, else two products with small fp16 matrices.
``--sweep`` times the kernels under other launch settings as well.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from examples.scripts.benchmark.turboquant_arms import (
    buffer_sets,
    dense_arm,
    kernel_arms,
    rotation_of,
    tile_arms,
    two_step_arm,
    warp_arms,
)
from rectokens._turboquant.backends import make_backend
from rectokens._turboquant.codec import codec_for
from rectokens._turboquant.packing import unpack
from rectokens.turboquant import packed_dim, quantizer_for

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DIMS = (1024, 2048, 2560, 4096, 5120, 8192, 16384)
ROWS = (1, 8, 64, 256, 1024, 4096, 8192, 16384, 65536)
MAX_DIFFERING = {1: 0.001, 2: 0.001, 4: 0.003, 8: 0.03}
_CHECKED_ELEMENTS = 1 << 18
_LAUNCHES = 16
# An idle device needs some work before its clocks are what they are under load.
_WARM_UP_S = 0.02


@dataclass(frozen=True)
class Record:
    """One line of the table; times in microseconds, rates in GB/s (1e9 bytes)."""

    direction: str
    arm: str
    dim: int
    bits: int
    dtype: str
    rows: int
    microseconds: float
    megabytes: float
    gb_per_s: float
    share_of_copy: float
    differing: float


def timed(calls: Sequence[Callable[[], Any]], device: torch.device, repeats: int) -> float:
    """Median seconds of one call; `calls` do the same on different buffers."""
    if device.type != "cuda":
        times = []
        for call in itertools.islice(itertools.cycle(calls), repeats + 1):
            started = time.perf_counter()
            call()
            times.append(time.perf_counter() - started)
        return statistics.median(times[1:])
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:  # Compile and warm up before capture.
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in itertools.islice(itertools.cycle(calls), _LAUNCHES):
            call()
    until = time.perf_counter() + _WARM_UP_S
    while time.perf_counter() < until:
        graph.replay()
        torch.cuda.synchronize()
    times = []
    for _ in range(repeats + 1):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1000 / _LAUNCHES)
    return statistics.median(times[1:])


def copy_rate(device: torch.device, repeats: int) -> float:
    """Bytes read and written per second by a large copy on the device."""
    source = torch.randn((1 << 29) if device.type == "cuda" else (1 << 24), device=device)
    target = torch.empty_like(source)
    # A kernel that reads and writes: in a graph, a plain copy would be the slower copy engine's.
    return 2 * source.nbytes / timed([lambda: torch.neg(source, out=target)], device, repeats)


def check(dim: int, bits: int, dtype: torch.dtype, device: torch.device) -> float:
    """Compare both directions with the CPU on fresh rows; the share of differing indices.

    Raises:
        RuntimeError: they differ by more than rounding explains.
    """
    quantizer = quantizer_for(dim, bits, codec_for(dim))
    x = torch.randn(max(64, _CHECKED_ELEMENTS // dim), dim, dtype=torch.float32).to(dtype)
    packed, norms = quantizer.encode(x)
    on_device = quantizer.encode(x.to(device))
    levels = unpack(packed, bits, dim).int() - unpack(on_device[0].cpu(), bits, dim).int()
    differing = float(levels.ne(0).double().mean())
    decoded = quantizer.decode(packed.to(device), norms.to(device)).cpu()
    expected = quantizer.decode(packed, norms)
    error = float((decoded - expected).norm() / expected.norm())
    if differing > MAX_DIFFERING[bits] or int(levels.abs().max()) > 1 or error > 1e-3:
        raise RuntimeError(
            f"dim {dim}, {bits} bits, {dtype}: {differing:.4%} of indices differ, by up to "
            f"{int(levels.abs().max())}; decoded rows differ by {error:.2e}"
        )
    if not torch.allclose(norms, on_device[1].cpu(), rtol=4e-6):
        raise RuntimeError(f"dim {dim}, {bits} bits, {dtype}: norms differ")
    return differing


def ideal_bytes(direction: str, dim: int, bits: int, itemsize: int, rows: int) -> int:
    """Bytes an ideal kernel moves; decoded rows are float32."""
    row = dim * (itemsize if direction == "encode" else 4)
    return rows * (row + packed_dim(dim, bits) + 4)


def measure(
    dim: int, bits: int, dtype: str, rows: int, device: torch.device, rate: float,
    differing: float, options: argparse.Namespace,
) -> Iterator[Record]:  # fmt: skip
    """Every arm at one size."""
    sets = buffer_sets(dim, bits, DTYPES[dtype], rows, device)
    backend = make_backend(dim, bits, rotation_of(dim), device)
    arms = list(kernel_arms(backend, sets))
    if options.dense:
        arms.append(("dense", "encode", dense_arm(dim, DTYPES[dtype], sets)))
    several = two_step_arm(dim, bits, sets) if options.two_step else None
    if several:
        arms.append(("two-step", "encode", several))
    if options.sweep:
        arms += [*warp_arms(dim, bits, sets), *tile_arms(dim, bits, sets)]
    for arm, direction, calls in arms:
        try:
            seconds = timed(calls, device, options.repeats)
        except Exception as error:
            if not options.sweep or not arm.startswith(("warp ", "tile ")):
                raise
            print(f"{arm}: {type(error).__name__}", file=sys.stderr)
            continue
        moved = ideal_bytes(direction, dim, bits, DTYPES[dtype].itemsize, rows)
        yield Record(
            direction,
            arm,
            dim,
            bits,
            dtype,
            rows,
            round(seconds * 1e6, 2),
            round(moved / 1e6, 3),
            round(moved / seconds / 1e9, 1),
            round(moved / seconds / rate, 3),
            round(differing, 6),
        )


def sizes(device: torch.device, rate: float, options: argparse.Namespace) -> Iterator[Record]:
    """Every size that fits, its results checked first."""
    for dim, bits, dtype in itertools.product(options.dims, options.bits, options.dtypes):
        differing = check(dim, bits, DTYPES[dtype], device)
        for rows in options.rows:
            if 2 * ideal_bytes("decode", dim, bits, 4, rows) * 2 > options.max_gib * (1 << 30):
                print(f"skipped: dim {dim}, {rows} rows, over {options.max_gib} GiB")
                continue
            yield from measure(dim, bits, dtype, rows, device, rate, differing, options)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", help="cuda or cpu (default: cuda)")
    parser.add_argument("--dims", type=int, nargs="+", default=DIMS)
    parser.add_argument("--bits", type=int, nargs="+", default=(1, 2, 4, 8), choices=(1, 2, 4, 8))
    parser.add_argument("--dtypes", nargs="+", default=("bf16", "fp32"), choices=DTYPES)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--repeats", type=int, default=15, help="timed runs a median is of")
    parser.add_argument("--max-gib", type=float, default=24.0, help="skip sizes that need more")
    parser.add_argument("--dense", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--two-step", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--sweep", action="store_true", help="also time other launch settings")
    parser.add_argument("--csv", type=Path, help="write every record here")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> list[Record]:
    """Check, measure, print, write."""
    options = parse(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device; --device cpu times the plain path")
    device = torch.device(options.device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    rate = copy_rate(device, options.repeats)
    print(f"{name}, torch {torch.__version__}, copy {rate / 1e9:.0f} GB/s")
    records: list[Record] = []
    with contextlib.ExitStack() as stack:
        writer = None
        if options.csv:
            # Written as it goes: a run that is cut short leaves what it measured.
            file = stack.enter_context(options.csv.open("w", newline="", buffering=1))
            writer = csv.DictWriter(file, [field.name for field in fields(Record)])
            writer.writeheader()
        for record in sizes(device, rate, options):
            records.append(record)
            if writer:
                writer.writerow(asdict(record))
            print(
                f"{record.direction} {record.arm:<10} d={record.dim:<6} {record.bits} bits "
                f"{record.dtype} {record.rows:>6} rows {record.microseconds:>10.2f} us "
                f"{record.gb_per_s:>8.1f} GB/s {record.share_of_copy:>6.1%} of copy",
                flush=True,
            )
    return records


if __name__ == "__main__":
    main()
