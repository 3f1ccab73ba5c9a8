"""The model card of a release: what it was made of and how well it does."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from server.demo.data import DemoData, Split


def model_card(
    *,
    summary: str,
    protocol: Sequence[str],
    data: Mapping[str, Any],
    parameters: int,
    settings: Mapping[str, Any],
    report: Mapping[str, Any],
    validation: Mapping[str, float],
    test: Mapping[str, Mapping[str, float]] | None,
    commit: str,
) -> str:
    """The card, Markdown.

    Args:
        summary: what the model is; ``{parameters}`` stands for their number.
        protocol: paragraphs before the figures: how they were made.
        data: as of :func:`data_facts`.
        parameters: of the model.
        settings: every gin parameter, by its dotted name.
        report: how training went.
        validation: figures on validation users; they chose the weights.
        test: figures on test users by how the history was treated; None where not measured.
        commit: of the code.
    """
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [generative-retrieval, semantic-ids, recommender-system]",
        "---",
        "",
        f"# Generative retrieval over {data['name']}",
        "",
        summary.format(parameters=f"{parameters:,}"),
        "",
        "## Data",
        "",
        *_table(data, "what", "value"),
        "",
        "Leave one out: a user's last item is test, the one before validation; training sees "
        "the rest. Semantic IDs, priors and weights come from training parts and item texts.",
        "",
        "## Figures",
        "",
        *(line for paragraph in protocol for line in (paragraph, "")),
        "Validation users:",
        "",
        *_table({n: f"{v:.4f}" for n, v in validation.items()}, "figure", "value"),
    ]
    for title, figures in (test or {}).items():
        lines += ["", f"All test users, {title}:", ""]
        lines += _table({n: f"{v:.4f}" for n, v in figures.items()}, "figure", "value")
    lines += ["", "## Training", "", *_table({**report, "commit": commit}, "what", "value")]
    lines += ["", "## Parameters", "", *_table(settings, "parameter", "value"), ""]
    return "\n".join(lines)


def data_facts(data: DemoData, split: Split, collision_rate: float) -> dict[str, Any]:
    """What a card tells of the data: name, counts, and how well semantic IDs tell items apart."""
    return {
        "name": data.name,
        "items": f"{len(data.item_ids):,}",
        "users": f"{len(split.train):,}",
        "users left out (fewer than three items)": split.skipped,
        "collision rate of the semantic IDs": f"{collision_rate:.4f}",
    }


def commit_of(folder: Path) -> str:
    """Commit of the code in a folder, ``-dirty`` behind it where files differ; else unknown."""
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return found.stdout.strip() or "unknown"


def _table(values: Mapping[str, Any], left: str, right: str) -> list[str]:
    rows = [f"| {name} | {value} |" for name, value in values.items()]
    return [f"| {left} | {right} |", "|---|---|", *rows]
