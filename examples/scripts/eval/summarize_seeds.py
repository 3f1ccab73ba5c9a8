"""Mean and spread of several runs that differ in their seed alone, as one JSON file.

``python -m examples.scripts.eval.summarize_seeds --command "..." --out docs/benchmarks/beauty.json
out/seed0/figures.json out/seed1/figures.json out/seed2/figures.json``
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from examples.evaluation.release import MODES
from rectokens.core.atomic_file import atomic_file

COLUMNS = ("recall@5", "ndcg@5", "recall@10", "ndcg@10")
_EXCLUDED, _ALL = MODES


def figures_of(content: Mapping[str, Any], path: Path) -> Mapping[str, Mapping[str, float]]:
    """By way to rank, of a run's ``figures.json`` or of the output of ``eval_retrieval``.

    Raises:
        ValueError: neither; names the file.
    """
    for name in ("server", "library", "test"):
        found = content.get(name)
        if isinstance(found, dict) and _EXCLUDED in found:
            return found
    raise ValueError(
        f"{path} has no figures on test users: expected figures.json of train_scratch or the "
        "output of eval_retrieval"
    )


def summarize(runs: Sequence[Path], command: str) -> dict[str, Any]:
    """Means over runs with the history left out, and what they are made of.

    Args:
        runs: JSON files, one a seed.
        command: that makes such a run.

    Returns:
        The four figures; ``spread``, their standard deviation over the runs; ``all_items``, the
        means with nothing left out; ``seeds``, each run's figures; ``command``.

    Raises:
        ValueError: no files, or one without figures.
        OSError: a file that cannot be read.
    """
    if not runs:
        raise ValueError("there are no runs to summarize")
    found, seeds = [], []
    for number, path in enumerate(runs):
        content = json.loads(path.read_text(encoding="utf-8"))
        figures = figures_of(content, path)
        found.append(figures)
        kept = {name: round(figures[_EXCLUDED][name], 4) for name in COLUMNS}
        seeds.append({"seed": content.get("seed", number), **kept})

    def mean(mode: str) -> dict[str, float]:
        return {
            name: round(statistics.mean(one[mode][name] for one in found), 4) for name in COLUMNS
        }

    spread = {
        name: round(statistics.stdev(one[_EXCLUDED][name] for one in found), 4)
        for name in COLUMNS
        if len(found) > 1
    }
    return {
        **mean(_EXCLUDED),
        "spread": spread,
        "all_items": mean(_ALL),
        "seeds": seeds,
        "command": command,
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Write the summary, and print it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", help="figures.json, or eval_retrieval's")
    parser.add_argument("--command", required=True, help="that makes such a run")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    given = parser.parse_args(argv)
    try:
        summary = summarize(given.runs, given.command)
        with atomic_file(given.out) as partial:
            partial.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    except (ValueError, OSError) as error:
        parser.exit(1, f"{parser.prog}: error: {error}\n")
    print(json.dumps(summary, indent=2))


if __name__ == "__main__":
    main()
