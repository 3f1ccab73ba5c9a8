"""Measures recommendations on the held-out last items of all users; takes a gin file.

Of a release, through the library and, with ``base_url``, through a running server that serves
it, every item of the catalog competing: ``python -m examples.scripts.eval.eval_retrieval
examples/configs/evaluation/eval_release_beauty.gin``
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gin
from rich.console import Console
from rich.table import Table

from examples.data.amazon import AmazonReviews
from examples.evaluation.release import (
    Asking,
    differing,
    figures_by_mode,
    held_out,
    library_ranks,
    server_ranks,
)
from examples.utils import run
from rectokens.cli.progress import progress_bar
from rectokens.core.atomic_file import atomic_file


@gin.configurable
def main(
    release: str | None = None,
    base_url: str | None = None,
    root: str = "data/amazon",
    split: str = "beauty",
    num_examples: int | None = None,
    beam_size: int = 50,
    batch_size: int = 64,
    concurrency: int = 16,
    device: str = "auto",
    seed: int = 42,
    output: str | None = None,
) -> dict[str, Any]:
    """Print Recall@{1,5,10,20} and NDCG@{5,10,20}, items of the history left out and not.

    Items that share a semantic ID are ranked in the order of the catalog. An item that the
    search did not find among its first 20 counts as not found.

    Args:
        release: a release folder; asked through the library.
        base_url: of a running server that serves the same release; asked too. Alone, only the
            server is asked.
        root, split: the data, as of :class:`~examples.data.amazon.AmazonReviews`.
        num_examples: test users asked about, a seeded sample; None for all.
        beam_size: W of the search, at least 20.
        batch_size: users searched for together by the library.
        concurrency: requests in flight at a time to the server.
        device: for the library.
        seed: of the sample.
        output: JSON file for the figures.

    Returns:
        The figures: ``library`` and ``server`` by way to rank, ``users``, and
        ``different_ranks`` where both were asked.

    Raises:
        ValueError: neither a release nor a server; ``beam_size`` below 20.
        EvaluationError: the server does not answer.
    """
    if release is None and base_url is None:
        raise ValueError("give release, base_url or both; there is nothing to ask")
    if beam_size < 20:
        raise ValueError(f"beam_size is {beam_size}; it must be at least 20, the largest k")
    data = AmazonReviews(root, split).data
    questions = held_out(data, num_examples, seed)
    asking = Asking(beam_width=beam_size, batch_size=batch_size, concurrency=concurrency)
    found: dict[str, Any] = {}
    seconds: dict[str, float] = {}
    for name in ("library", "server"):
        started = time.perf_counter()
        with progress_bar(f"asking the {name}", 2 * len(questions)) as show:
            done = 0

            def count(more: int, show: Any = show) -> None:
                nonlocal done
                done += more
                show(done)

            if name == "library" and release is not None:
                found[name] = library_ranks(
                    Path(release), data, questions, asking, device=device, progress=count
                )
            elif name == "server" and base_url is not None:
                found[name] = server_ranks(base_url, data, questions, asking, progress=count)
        seconds[name] = round(time.perf_counter() - started, 1)
    result: dict[str, Any] = {
        "data": data.name,
        "users": len(questions),
        "beam_size": beam_size,
        **{name: figures_by_mode(ranks) for name, ranks in found.items()},
        "seconds": {name: seconds[name] for name in found},
    }
    if len(found) == 2:
        result["different_ranks"] = differing(found["library"], found["server"])
    _show(result, list(found))
    if output is not None:
        with atomic_file(Path(output)) as partial:
            partial.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


def _show(result: Mapping[str, Any], names: list[str]) -> None:
    columns = list(next(iter(result[names[0]].values())))
    table = Table(title=f"{result['data']}: held-out last items of {result['users']:,} users")
    table.add_column("")
    for column in columns:
        table.add_column(column, justify="right")
    for name in names:
        for title, values in result[name].items():
            table.add_row(f"{name}, {title}", *(f"{values[column]:.4f}" for column in columns))
    console = Console(width=120)
    console.print(table)
    if "different_ranks" in result:
        console.print(
            f"ranks that differ between library and server: {result['different_ranks']} "
            f"of {2 * result['users']:,}"
        )


if __name__ == "__main__":
    run(main)
