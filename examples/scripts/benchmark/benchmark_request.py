"""What one request costs the service beside the engine: CPU time of each step of it.

    python -m examples.scripts.benchmark.benchmark_request
    python -m examples.scripts.benchmark.benchmark_request --items 20000000 --histories 250

Every history is a fresh one, drawn from a catalog of --items; between two requests a few megabytes
are read, as a server's other work does, so that the catalog's tables have left the nearest caches.
Prompts are first compared with those that are built item by item. Nothing is searched: the model is
tiny and is asked once, for an answer to present.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import orjson
import typer
from rich.console import Console
from rich.table import Table

from examples.scripts.benchmark.benchmark_service import Histories, WrongAnswerError
from examples.scripts.benchmark.kernel_timing import write_csv
from examples.scripts.benchmark.random_release import ReleaseShape, make_random_release
from rectokens.prompts.parts import ItemPart
from rectokens.schemas.search import SearchResult
from server.api.limits import to_query
from server.api.schemas import RecommendRequest
from server.recommender import prepare, present
from server.release import Release, load_release
from server.settings import Settings, load_settings

STEPS = ("json_ms", "checked_ms", "query_ms", "prompt_ms", "answer_ms")
COLUMNS = ("items", "history", *STEPS, "all_ms")
_OTHER_WORK = 4_000_000  # bytes
_KV_MEMORY_MIB = 64


def check(release: Release, settings: Settings, bodies: list[bytes]) -> None:
    """Compare prompts with those of the same items, built one by one.

    Raises:
        WrongAnswerError: they differ.
    """
    for body in bodies:
        request = RecommendRequest.model_validate(json.loads(body))
        index = release.catalog.index_of(request.history or [])
        parts = [ItemPart(tuple(codes)) for codes in release.catalog.codes_of(index).tolist()]
        found = prepare(to_query(request, settings, time.monotonic()), release)
        if found.search.prompt != release.prompts.build(parts).token_ids:
            raise WrongAnswerError("the prompt is not that of its items")


def measure(
    release: Release, settings: Settings, bodies: list[bytes], result: SearchResult
) -> dict[str, float]:
    """Median milliseconds of each step, and of all."""
    noise = np.random.default_rng(0).integers(0, 255, _OTHER_WORK, dtype=np.uint8)
    taken: dict[str, list[float]] = {name: [] for name in STEPS}

    def timed(name: str, step: Callable[[], Any]) -> Any:
        started = time.thread_time()
        value = step()
        taken[name].append(1e3 * (time.thread_time() - started))
        return value

    for body in bodies:
        noise.sum()
        content = timed("json_ms", lambda body=body: json.loads(body))
        request = timed("checked_ms", lambda content=content: RecommendRequest(**content))
        query = timed(
            "query_ms", lambda request=request: to_query(request, settings, time.monotonic())
        )
        timed("prompt_ms", lambda query=query: prepare(query, release))
        timed(
            "answer_ms",
            lambda query=query: orjson.dumps(
                [
                    {"item_id": one.item_id, "score": one.score, "semantic_id": one.semantic_id}
                    for one in present(result, query, release.catalog)
                ]
            ),
        )
    totals = [sum(times) for times in zip(*taken.values(), strict=True)]
    medians = {name: statistics.median(times) for name, times in taken.items()}
    return {**medians, "all_ms": statistics.median(totals)}


def main(
    items: Annotated[int, typer.Option(min=1, help="Items of the catalog.")] = 1_500_000,
    histories: Annotated[str, typer.Option(help="Items of a history.")] = "50,250,1250",
    levels: Annotated[int, typer.Option(min=1, help="Codes of an item.")] = 3,
    codebook_size: Annotated[int, typer.Option(min=2, help="Codes of a level.")] = 8_192,
    requests: Annotated[int, typer.Option(min=8, help="Of each length.")] = 200,
    output: Annotated[Path | None, typer.Option(help="CSV file for the table.")] = None,
) -> None:
    """Compare prompts, then measure."""
    lengths = [int(word) for word in histories.split(",")]
    shape = ReleaseShape(1, 64, items, levels, codebook_size, max(lengths), seed=0)
    console = Console()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = make_random_release(Path(folder), shape)
        settings = load_settings(
            {"release": str(path), "device": "cpu", "engine": {"kv_memory_mib": _KV_MEMORY_MIB}}
        )
        release = load_release(settings)
        for length in lengths:
            source = Histories(release, length, 16, seed=length)
            bodies = [orjson.dumps(source.body()) for _ in range(requests)]
            check(release, settings, bodies[:4])
            query = to_query(RecommendRequest(**json.loads(bodies[0])), settings, time.monotonic())
            search = prepare(query, release).search
            (result,) = release.engine.search([search], release.trie).results
            if not isinstance(result, SearchResult):
                raise WrongAnswerError(result.message)
            row = measure(release, settings, bodies, result)
            rows.append({"items": items, "history": length, **row})
    table = Table(title="a request beside the engine, milliseconds")
    for name in COLUMNS:
        table.add_column(name.removesuffix("_ms"), justify="right")
    for row in rows:
        table.add_row(*(f"{row[n]:.3f}" if n.endswith("_ms") else f"{row[n]:,}" for n in COLUMNS))
    console.print(table)
    if output is not None:
        write_csv(output, COLUMNS, [{k: round(v, 4) for k, v in row.items()} for row in rows])


if __name__ == "__main__":
    typer.run(main)
