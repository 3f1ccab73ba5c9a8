"""Measures a running server's recommendations on held-out items, through HTTP."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import httpx
import numpy as np
from rich.table import Table

from server.demo.baselines import Figures, figures_of_ranks, popularity_ranks
from server.demo.data import DemoData, HeldOut, item_counts, leave_one_out

_MAX_RETRIES = 5
# The server is the first to give up, since it can say why.
_GRACE_S = 5.0


class EvaluationError(RuntimeError):
    """The server did not answer a question as it should have."""


@dataclass(frozen=True, slots=True)
class EvaluationSettings:
    """How the questions are asked.

    Attributes:
        top_k: items asked for, and the k of Recall@k and NDCG@k.
        beam_width: of the search.
        normalization: score rule, or None for the server's default.
        concurrency: requests in flight at a time.
        exclude_history: whether the history's items are left out of the answers.
        timeout_s: of one request; at most the server's own limit.
        users: questions asked, a seeded sample; None asks all.
        seed: of the sample.
    """

    top_k: int = 10
    beam_width: int = 50
    normalization: str | None = None
    concurrency: int = 16
    exclude_history: bool = True
    timeout_s: float = 60.0
    users: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("top_k", "beam_width", "concurrency"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.users is not None and self.users < 1:
            raise ValueError(f"users is {self.users}; it must be at least 1")
        if not self.timeout_s >= 0.001:
            raise ValueError(f"timeout_s is {self.timeout_s}; it must be at least 0.001")


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Figures of the model and of popularity on the same questions.

    Attributes:
        data: name of the data set.
        model: measured through the endpoint, items of the history left out.
        popularity: counts of the training parts, ties at their mean rank, the same items left out.
        seconds: the questions took, all together.
        questions: in the data set; ``model.users`` of them were asked.
    """

    data: str
    model: Figures
    popularity: Figures
    seconds: float
    questions: int

    @property
    def requests_per_second(self) -> float:
        """Answers a second over the whole run."""
        return self.model.users / max(self.seconds, 1e-9)

    def table(self) -> Table:
        """For people."""
        k = self.model.k
        sample = "all" if self.model.users == self.questions else "a sample of"
        table = Table(
            title=f"{self.data}: held-out last items of {sample} {self.model.users:,} users",
            caption=(
                f"history left out; measured through HTTP in {self.seconds:.0f} s, "
                f"{self.requests_per_second:.1f} requests/s"
            ),
            min_width=72,  # the title's, which would be wrapped to the columns otherwise
        )
        table.add_column("")
        table.add_column(f"Recall@{k}", justify="right")
        table.add_column(f"NDCG@{k}", justify="right")
        for name, figures in (("model", self.model), ("popularity", self.popularity)):
            table.add_row(name, f"{figures.recall:.4f}", f"{figures.ndcg:.4f}")
        return table


def measure(
    base_url: str,
    data: DemoData,
    settings: EvaluationSettings | None = None,
    *,
    progress: Callable[[int], None] | None = None,
) -> Evaluation:
    """Ask a running server for what followed each user's history, and compare with popularity.

    Args:
        base_url: of the server, for example ``http://127.0.0.1:8000``.
        data: the data the served model was built from.
        settings: how to ask.
        progress: called with the number of new answers.

    Raises:
        EvaluationError: the server cannot be reached, or answers with an error.
    """
    settings = settings or EvaluationSettings()
    split = leave_one_out(data.sequences)
    questions = sample_questions(split.test, settings.users, settings.seed)
    started = time.perf_counter()
    ranks = endpoint_ranks(base_url, data.item_ids, questions, settings, progress=progress)
    seconds = time.perf_counter() - started
    counts = item_counts(split.train, len(data.item_ids))
    return Evaluation(
        data=data.name,
        model=figures_of_ranks(ranks, settings.top_k),
        popularity=figures_of_ranks(popularity_ranks(questions, counts), settings.top_k),
        seconds=seconds,
        questions=len(split.test),
    )


def endpoint_ranks(
    base_url: str,
    item_ids: Sequence[str],
    questions: Sequence[HeldOut],
    settings: EvaluationSettings,
    *,
    progress: Callable[[int], None] | None = None,
) -> list[int | None]:
    """Rank of each question's target in a running server's answer, from 1, None where missing.

    Args:
        base_url: of the server.
        item_ids: of the rows that questions name.
        questions: all of them are asked.
        settings: how; ``users`` and ``seed`` are not used.
        progress: called with the number of new answers.

    Raises:
        EvaluationError: the server cannot be reached, or answers with an error.
    """
    return asyncio.run(_ask_all(base_url, item_ids, questions, settings, progress))


def sample_questions(
    questions: Sequence[HeldOut], users: int | None, seed: int
) -> tuple[HeldOut, ...]:
    """``users`` of the questions, drawn without replacement; all where there are no more."""
    if users is None or users >= len(questions):
        return tuple(questions)
    chosen = np.random.default_rng(seed).choice(len(questions), size=users, replace=False)
    return tuple(questions[index] for index in np.sort(chosen))


async def _ask_all(
    base_url: str,
    item_ids: Sequence[str],
    questions: Sequence[HeldOut],
    settings: EvaluationSettings,
    progress: Callable[[int], None] | None,
) -> list[int | None]:
    """Rank of each question's target in the answer, from 1, None where it is missing."""
    ranks: list[int | None] = [None] * len(questions)
    waiting = iter(range(len(questions)))
    limits = httpx.Limits(max_connections=settings.concurrency)
    async with httpx.AsyncClient(
        base_url=base_url, timeout=settings.timeout_s + _GRACE_S, limits=limits, trust_env=False
    ) as client:

        async def worker() -> None:
            for index in waiting:
                ranks[index] = await _ask(client, item_ids, questions[index], settings)
                if progress is not None:
                    progress(1)

        try:
            async with asyncio.TaskGroup() as tasks:
                for _ in range(min(settings.concurrency, len(questions))):
                    tasks.create_task(worker())
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
    return ranks


async def _ask(
    client: httpx.AsyncClient,
    item_ids: Sequence[str],
    question: HeldOut,
    settings: EvaluationSettings,
) -> int | None:
    body: dict[str, object] = {
        "history": [item_ids[row] for row in question.history],
        "top_k": settings.top_k,
        "beam_width": settings.beam_width,
        "exclude_history": settings.exclude_history,
        "timeout_ms": int(1000 * settings.timeout_s),
    }
    if settings.normalization is not None:
        body["normalization"] = settings.normalization
    response = await _post(client, body)
    wanted = item_ids[question.target]
    answer = [item["item_id"] for item in response.json()["items"]]
    return answer.index(wanted) + 1 if wanted in answer else None


async def _post(client: httpx.AsyncClient, body: dict[str, object]) -> httpx.Response:
    """One request; a server that is full is asked again when it says so."""
    for attempt in range(_MAX_RETRIES + 1):
        try:
            response = await client.post("/v1/recommend", json=body)
        except httpx.HTTPError as error:
            raise EvaluationError(
                f"no answer from {client.base_url}: {type(error).__name__} {error}"
            ) from error
        if response.status_code == httpx.codes.OK:
            return response
        if response.status_code != httpx.codes.TOO_MANY_REQUESTS or attempt == _MAX_RETRIES:
            raise EvaluationError(f"the server answered {response.status_code}: {response.text}")
        await asyncio.sleep(_retry_after_s(response))
    raise AssertionError("unreachable: the last attempt returns or raises")


def _retry_after_s(response: httpx.Response) -> float:
    """Seconds a full server asks for, at most ten."""
    try:
        return min(max(float(response.headers.get("Retry-After", "1")), 0.05), 10.0)
    except ValueError:
        return 1.0
