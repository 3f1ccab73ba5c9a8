"""Measures what a model has to beat, on all users and over all items; takes a gin file.

Leave one out: the last item of a user is asked for, with everything before it as history; counted
are the training parts alone. ``python -m examples.scripts.eval.baselines
examples/configs/evaluation/baselines_beauty.gin``
"""

from __future__ import annotations

import json
from pathlib import Path

import gin
from rich.console import Console
from rich.table import Table

from examples.data.amazon import AmazonReviews
from examples.evaluation.baselines import rank_figures, standard_baselines, target_ranks
from examples.utils import run
from rectokens.cli.progress import progress_bar
from rectokens.core.atomic_file import atomic_file

COLUMNS = ("recall@5", "ndcg@5", "recall@10", "ndcg@10")


@gin.configurable
def main(
    root: str = "data/amazon", split: str = "beauty", output: str | None = None
) -> dict[str, dict[str, dict[str, float]]]:
    """Rank every user's test item by every baseline, and print the table.

    Args:
        root: folder of the data.
        split: ``beauty``, ``sports`` or ``toys``.
        output: also write the figures to this JSON file.

    Returns:
        By name of the baseline and then by ``history_left_out`` and ``all_items``: Recall and
        NDCG at 5 and 10.
    """
    reviews = AmazonReviews(root, split)
    questions = reviews.leave_one_out.test
    scorers = standard_baselines(reviews.leave_one_out.train, reviews.data.embeddings)
    figures = {}
    with progress_bar("ranking", len(scorers)) as show:
        for done, (name, scorer) in enumerate(scorers.items()):
            show(done, name)
            ranks = target_ranks(scorer, questions)
            figures[name] = {
                "history_left_out": rank_figures(ranks.history_left_out),
                "all_items": rank_figures(ranks.all_items),
            }
    _print(figures, f"{len(questions):,} users, {reviews.num_items:,} items")
    if output is not None:
        content = {
            "data": str(reviews.folder.name),
            "users": len(questions),
            "skipped_users": reviews.skipped_users,
            "items": reviews.num_items,
            "figures": figures,
        }
        with atomic_file(Path(output)) as partial:
            partial.write_text(json.dumps(content, indent=2) + "\n")
    return figures


def _print(figures: dict[str, dict[str, dict[str, float]]], title: str) -> None:
    table = Table(title=f"{title}; history left out, then all items ranked", title_justify="left")
    table.add_column("baseline")
    for column in (*COLUMNS, *COLUMNS):
        table.add_column(column, justify="right")
    for name, one in figures.items():
        values = [
            one[way][column] for way in ("history_left_out", "all_items") for column in COLUMNS
        ]
        table.add_row(name, *(f"{value:.4f}" for value in values))
    console = Console(width=max(Console().width, 130))
    console.print(table)


if __name__ == "__main__":
    run(main)
