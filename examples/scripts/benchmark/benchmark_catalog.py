"""How long a catalog takes to build, save, load and update, and what it weighs on the device.

    python -m examples.scripts.benchmark.benchmark_catalog --num-items 100000 --num-items 1000000
    python -m examples.scripts.benchmark.benchmark_catalog --num-items 20000000 --trie-only

Codes are drawn at random, which is the worst case for the trie: real semantic IDs share prefixes
more often. Every size runs in a process of its own, so that the peak memory is its own too.
"""

from __future__ import annotations

import multiprocessing
import platform
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Annotated, TypeVar

import polars as pl
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from examples.scripts.benchmark.kernel_timing import write_csv
from rectokens.catalog.artifact import load_catalog, save_catalog
from rectokens.catalog.build import build_catalog
from rectokens.catalog.edit_sets import put_constraint_sets
from rectokens.catalog.predicates import Predicate
from rectokens.catalog.update import ItemUpserts, update_catalog
from rectokens.schemas.catalog_trie import CatalogTrie

T = TypeVar("T")

FINGERPRINT = "0" * 64
DEFAULT_SIZES = (100_000, 1_000_000)


@dataclass(frozen=True, slots=True)
class Case:
    """What is measured.

    Attributes:
        num_items: N.
        num_levels: L.
        codebook_size: K.
        num_updates: items upserted, half of them new.
        threads: torch computes with.
        device: where the trie is built.
        trie_only: leave out everything that needs item ids.
        folder: where catalogs are written.
    """

    num_items: int
    num_levels: int
    codebook_size: int
    num_updates: int
    threads: int
    device: str
    trie_only: bool
    folder: Path


@dataclass(slots=True)
class Figures:
    """What was found; None for what was left out. Times in seconds.

    Attributes:
        num_items: N.
        trie_s: from codes in any order to a trie on the device.
        bytes_per_item: of the trie on the device, item map included.
        build_s: from ids, codes, priors and metadata to a catalog.
        save_s: written, flushed and renamed.
        load_s: read, hashed and checked.
        disk_bytes_per_item: of the artifact.
        update_s: upserts merged, one rule evaluated again.
        update_live_s: updated, saved and loaded.
        peak_gib: most memory the process held.
    """

    num_items: int
    trie_s: float
    bytes_per_item: float
    build_s: float | None = None
    save_s: float | None = None
    load_s: float | None = None
    disk_bytes_per_item: float | None = None
    update_s: float | None = None
    update_live_s: float | None = None
    peak_gib: float = 0.0


def main(
    num_items: Annotated[
        list[int] | None, typer.Option(help="Items; repeat for several sizes.")
    ] = None,
    num_levels: Annotated[int, typer.Option(min=1, help="Levels of a semantic ID.")] = 4,
    codebook_size: Annotated[int, typer.Option(min=1, max=65_536, help="Codes a level.")] = 8_192,
    num_updates: Annotated[int, typer.Option(min=1, help="Items upserted, half new.")] = 1_000,
    threads: Annotated[int, typer.Option(min=1, help="Threads torch computes with.")] = 2,
    device: Annotated[str, typer.Option(help="Where the trie is built: cpu or cuda.")] = "cpu",
    trie_only: Annotated[bool, typer.Option(help="Only from codes to a ready trie.")] = False,
    folder: Annotated[
        Path | None, typer.Option(help="Where catalogs are written; default a temporary one.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="CSV file to write.")] = None,
) -> None:
    """Measure every size in turn and print one row each."""
    rows = []
    for size in num_items or list(DEFAULT_SIZES):
        with _workspace(folder) as place:
            case = Case(
                size, num_levels, codebook_size, num_updates, threads, device, trie_only, place
            )
            rows.append(_in_own_process(case))
    console = Console()
    console.print(
        f"{num_levels} levels of {codebook_size} codes, {threads} threads, {device}, "
        f"torch {torch.__version__}, {platform.machine()}"
    )
    console.print(_table(rows))
    if output is not None:
        write_csv(output, [field.name for field in fields(Figures)], [asdict(row) for row in rows])


def measure(case: Case) -> Figures:
    """Run one case."""
    torch.set_num_threads(case.threads)
    generator = torch.Generator().manual_seed(0)
    shape = (case.num_items, case.num_levels)
    codes = torch.randint(0, case.codebook_size, shape, generator=generator, dtype=torch.int32)
    there = codes.to(case.device)
    if case.device != "cpu":
        CatalogTrie.from_codes(there[:1000], case.codebook_size)  # kernels are loaded once
    build_trie = partial(CatalogTrie.from_codes, there, case.codebook_size)
    trie_s, (trie, _) = _timed(build_trie, case.device)
    figures = Figures(case.num_items, trie_s, trie.nbytes / case.num_items)
    del trie, there, build_trie
    if not case.trie_only:
        _measure_catalog(case, codes, generator, figures)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux tells kibibytes.
    figures.peak_gib = peak / 2**20
    return figures


def _measure_catalog(
    case: Case, codes: Tensor, generator: torch.Generator, figures: Figures
) -> None:
    ids = pl.select(("B" + pl.int_range(case.num_items).cast(pl.String)).alias("id")).to_series()
    build = partial(
        build_catalog,
        ids,
        codes,
        codebook_size=case.codebook_size,
        tokenizer_fingerprint=FINGERPRINT,
        prior=torch.rand(case.num_items, generator=generator),
        metadata=_metadata(case.num_items),
    )
    figures.build_s, built = _timed(build)
    del build
    rule = Predicate("in_stock = true and region = 'EU'")
    built = put_constraint_sets(built, {"buyable": rule})
    figures.save_s, path = _timed(partial(save_catalog, case.folder, built))
    del built
    size = sum(file.stat().st_size for file in path.iterdir())
    figures.disk_bytes_per_item = size / case.num_items
    figures.load_s, catalog = _timed(partial(load_catalog, path))

    new = case.num_updates // 2
    old = min(case.num_updates - new, case.num_items)
    upserts = ItemUpserts(
        [f"new {i}" for i in range(new)] + ids[:old].to_list(),
        torch.randint(0, case.codebook_size, (new + old, case.num_levels), generator=generator),
        torch.rand(new + old, generator=generator),
        _metadata(new + old),
    )
    figures.update_s, updated = _timed(partial(update_catalog, catalog, upserts))
    saved_s, path = _timed(partial(save_catalog, case.folder, updated))
    del catalog, updated
    loaded_s, _ = _timed(partial(load_catalog, path))
    figures.update_live_s = figures.update_s + saved_s + loaded_s


def _metadata(num_rows: int) -> pl.DataFrame:
    row = pl.int_range(num_rows)
    return pl.select(
        price=row / 7,
        in_stock=row % 3 > 0,
        region=pl.when(row % 2 == 0).then(pl.lit("EU")).otherwise(pl.lit("US")),
    )


def _timed(action: Callable[[], T], device: str = "cpu") -> tuple[float, T]:
    started = time.perf_counter()
    result = action()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - started, result


def _in_own_process(case: Case) -> Figures:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure, (case,))


@contextmanager
def _workspace(folder: Path | None) -> Iterator[Path]:
    place = Path(tempfile.mkdtemp(prefix="benchmark-catalog-", dir=folder))
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _table(rows: list[Figures]) -> Table:
    """A column for each size."""
    table = Table(show_header=False)
    for field in fields(Figures):
        table.add_row(field.name, *(_shown(getattr(row, field.name)) for row in rows))
    return table


def _shown(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.2f}"


if __name__ == "__main__":
    typer.run(main)
