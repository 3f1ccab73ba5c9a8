"""How well a release does on held-out items: through the library, and through a running server."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from examples.evaluation.ranks import LARGEST_K, figures, held_out_searches
from server.demo.data import DemoData, HeldOut, leave_one_out
from server.demo.evaluate import EvaluationSettings, endpoint_ranks, sample_questions
from server.release import load_release
from server.settings import Settings

MODES = {"history left out": True, "all items ranked": False}
"""Title of each way to rank, and whether the history's items are left out."""

Ranks = Mapping[str, list[int | None]]
Progress = Callable[[int], None]


@dataclass(frozen=True)
class Asking:
    """How questions are put.

    Attributes:
        beam_width: of the search.
        batch_size: questions searched for together by the library.
        concurrency: requests in flight at a time to a server.
        timeout_s: of one request to it.
    """

    beam_width: int = 50
    batch_size: int = 64
    concurrency: int = 16
    timeout_s: float = 60.0


def held_out(data: DemoData, users: int | None, seed: int) -> tuple[HeldOut, ...]:
    """Test questions: of all users, or of a seeded sample.

    Raises:
        ValueError: no user has three items.
    """
    questions = sample_questions(leave_one_out(data.sequences).test, users, seed)
    if not questions:
        raise ValueError(f"no user of {data.name} has three items; there is nothing to ask")
    return questions


def library_ranks(
    release: Path,
    data: DemoData,
    questions: Sequence[HeldOut],
    asking: Asking,
    *,
    device: str = "auto",
    progress: Progress | None = None,
) -> Ranks:
    """Ranks of the targets by the engine that a server would have, by the titles of ``MODES``.

    Raises:
        ReleaseError: the release cannot be served.
        ValueError: its catalog lacks an item of the data.
    """
    loaded = load_release(Settings(release=release, device=device))
    engine: Any = loaded.engine
    return {
        title: held_out_searches(
            loaded.catalog,
            loaded.prompts,
            data.item_ids,
            questions,
            exclude_history=excluded,
            beam_width=asking.beam_width,
            max_prompt_tokens=engine.max_prompt_tokens,
        ).ranks(engine, loaded.trie, batch_size=asking.batch_size, progress=progress)
        for title, excluded in MODES.items()
    }


def server_ranks(
    base_url: str,
    data: DemoData,
    questions: Sequence[HeldOut],
    asking: Asking,
    *,
    progress: Progress | None = None,
) -> Ranks:
    """The same ranks by the answers of a running server.

    Raises:
        EvaluationError: it cannot be reached, or answers with an error.
    """
    return {
        title: endpoint_ranks(
            base_url,
            data.item_ids,
            questions,
            EvaluationSettings(
                top_k=LARGEST_K,
                beam_width=asking.beam_width,
                normalization="children",
                concurrency=asking.concurrency,
                exclude_history=excluded,
                timeout_s=asking.timeout_s,
            ),
            progress=progress,
        )
        for title, excluded in MODES.items()
    }


def figures_by_mode(ranks: Ranks, largest: int = LARGEST_K) -> dict[str, dict[str, float]]:
    """Recall and NDCG of each way to rank, no k above ``largest``."""
    return {title: figures(found, largest) for title, found in ranks.items()}


def differing(one: Ranks, other: Ranks) -> int:
    """How many targets have different ranks in two evaluations of the same questions."""
    return sum(a != b for title in MODES for a, b in zip(one[title], other[title], strict=True))
