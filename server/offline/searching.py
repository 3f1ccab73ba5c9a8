"""Answers for many users from a release, in full batches, without a server around it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import structlog

from rectokens.schemas.search import SearchRequest, SearchResult
from server.api.schemas import MAX_SEED
from server.batching.policy import BatchLimits, Waiting, form_batch
from server.engine.types import EngineBrokenError, EngineFault, RunningBatch
from server.errors import ErrorKind, ServiceError
from server.offline.users import User
from server.queries import RecommendQuery
from server.recommender import Item, PreparedSearch, prepare, present
from server.release import Release
from server.settings_serving import DefaultSettings

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class UserAnswer:
    """What became of one user.

    Attributes:
        user_id: as in the file.
        items: best first; empty where there is an error.
        shortfall: why there are fewer than asked for, None where there are not.
        unknown_items: history items that the catalog does not know.
        truncated_items: history items that the prompt had no room for, the oldest.
        error: code of the error, None where there is none.
        error_message: what was found and what is allowed, None where there is no error.
    """

    user_id: str | None
    items: tuple[Item, ...] = ()
    shortfall: str | None = None
    unknown_items: int = 0
    truncated_items: int = 0
    error: str | None = None
    error_message: str | None = None


@dataclass(frozen=True, slots=True)
class Task:
    """A user's search, ready or refused."""

    user: User
    query: RecommendQuery | None = None
    prepared: PreparedSearch | None = None
    error: ServiceError | None = None


@dataclass(frozen=True, slots=True)
class _Begun:
    """A batch: place and search of each task.

    Attributes:
        batch: of it.
        prepared: by the engine; None if it has yet to be.
        running: what the engine has begun of it; None where it has yet to be run.
    """

    batch: Sequence[tuple[int, SearchRequest]]
    prepared: Any = None
    running: RunningBatch | None = None


class OfflineSearch:
    """Searches for users; the same users give the same answers, however the run is cut up.

    Args:
        release: what is searched.
        defaults: top k, beam width and so on, for every user.
        limits: of one batch.
        seed: the samples of temperatures above 0 depend on it and on the row.
    """

    def __init__(
        self, release: Release, defaults: DefaultSettings, limits: BatchLimits, seed: int
    ) -> None:
        self._release = release
        self._defaults = defaults
        self._limits = limits
        self._seed = seed

    def task(self, user: User) -> Task:
        """Everything before the engine. May be called from another thread."""
        if user.fault is not None:
            return Task(user, error=ServiceError(ErrorKind.INVALID_VALUE, user.fault))
        query = self._query(user)
        try:
            return Task(user, query, prepare(query, self._release))
        except ServiceError as error:
            return Task(user, query, error=error)

    def answers(self, tasks: Sequence[Task]) -> list[UserAnswer]:
        """Search for all of them; in their order.

        Raises:
            EngineBrokenError: the device does not work any more.
        """
        results: dict[int, SearchResult | EngineFault] = {}
        ready = [
            (place, task.prepared.search)
            for place, task in enumerate(tasks)
            if task.prepared is not None
        ]
        batches = self._batches(ready)
        engine, trie = self._release.engine, self._release.trie
        with ThreadPoolExecutor(1, thread_name_prefix="ahead") as ahead:

            def submit(batch: Sequence[tuple[int, SearchRequest]]) -> Future[Any]:
                return ahead.submit(engine.prepare, [search for _, search in batch], trie)

            submitted = [submit(batch) for batch in batches[:1]]
            running: _Begun | None = None
            for number, batch in enumerate(batches):
                submitted += [submit(following) for following in batches[number + 1 : number + 2]]
                begun = self._begin(batch, submitted.pop(0))
                if running is not None:
                    results.update(self._finish(running))
                running = begun
            if running is not None:
                results.update(self._finish(running))
        return [self._answer(task, results.get(place)) for place, task in enumerate(tasks)]

    def _batches(
        self, ready: Sequence[tuple[int, SearchRequest]]
    ) -> list[list[tuple[int, SearchRequest]]]:
        """Full batches of similar prompts: sorted by length, cut by the service's own policy."""
        rest = sorted(ready, key=lambda one: (-one[1].prompt_length, one[0]))
        batches = []
        while rest:
            window = rest[: self._limits.max_requests]
            waiting = [
                Waiting(i, float("inf"), search.beam_width, search.prompt_length, None)
                for i, (_, search) in enumerate(window)
            ]
            # They are sorted, so the policy takes them from the front.
            taken = set(form_batch(waiting, self._limits, now_s=0.0).run)
            batches.append([one for i, one in enumerate(window) if i in taken])
            rest = [one for i, one in enumerate(window) if i not in taken] + rest[len(window) :]
        return batches

    def _begin(self, batch: Sequence[tuple[int, SearchRequest]], prepared: Future[Any]) -> _Begun:
        """A batch, begun behind the one that runs where the engine begins batches."""
        try:
            ready = prepared.result()
            return _Begun(batch, ready, self._release.engine.begin(ready))
        except EngineBrokenError:
            raise
        except Exception as error:
            # It is tried again when its turn comes, and its halves after that.
            _log.debug("batch not begun", failure=f"{type(error).__name__}: {error}")
        return _Begun(batch)

    def _finish(self, begun: _Begun) -> dict[int, SearchResult | EngineFault]:
        """What came of a batch, by place."""
        searches = [search for _, search in begun.batch]
        found = self._run(searches, begun.prepared, begun.running)
        return dict(zip((place for place, _ in begun.batch), found, strict=True))

    def _run(
        self,
        searches: Sequence[SearchRequest],
        prepared: Any = None,
        running: RunningBatch | None = None,
    ) -> Sequence[SearchResult | EngineFault]:
        """A batch; where it fails, its halves, so that what breaks it fails alone."""
        engine, trie = self._release.engine, self._release.trie
        try:
            if running is not None:
                return running.finish().results
            ready = engine.prepare(searches, trie) if prepared is None else prepared
            return engine.run(ready).results
        except EngineBrokenError:
            raise
        except Exception as error:
            failure = f"{type(error).__name__}: {error}"
        # The error is gone by now, and with its traceback what the failed batch held.
        if len(searches) == 1:
            return [EngineFault(failure)]
        _log.warning("batch failed; running its halves", requests=len(searches), failure=failure)
        middle = len(searches) // 2
        return [*self._run(searches[:middle]), *self._run(searches[middle:])]

    def _answer(self, task: Task, result: SearchResult | EngineFault | None) -> UserAnswer:
        user_id, error = task.user.user_id, task.error
        if error is not None:
            return UserAnswer(user_id, error=error.kind.value, error_message=error.message)
        if result is None or task.query is None or task.prepared is None:
            raise RuntimeError(f"row {task.user.row} was not searched for")
        unknown = len(task.prepared.unknown_items)
        truncated = task.prepared.prompt.items_truncated
        if isinstance(result, EngineFault):
            code = ErrorKind.ENGINE_FAULT.value
            return UserAnswer(user_id, (), None, unknown, truncated, code, result.message)
        items = present(result, task.query, self._release.catalog)
        shortfall = None if result.shortfall is None else result.shortfall.reason
        return UserAnswer(user_id, items, shortfall, unknown, truncated)

    def _query(self, user: User) -> RecommendQuery:
        defaults = self._defaults
        return RecommendQuery(
            parts=tuple(user.history),
            parts_param="history",
            top_k=defaults.top_k,
            beam_width=max(defaults.beam_width, defaults.top_k),
            temperature=defaults.temperature,
            seed=_drawn_seed(self._seed, user.row) if user.seed is None else user.seed,
            exclude_history=defaults.exclude_history,
            exclude_items=user.exclude_items,
            allow_items=user.allow_items,
            constraint_sets=tuple(sorted(set(user.constraint_sets))),
            normalization=defaults.normalization,
            with_metadata=False,
            with_level_scores=False,
            deadline_s=float("inf"),
            cut_long_prompt=defaults.long_prompt == "truncate",
        )


def _drawn_seed(seed: int, row: int) -> int:
    digest = hashlib.blake2b(f"{seed}:{row}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") & MAX_SEED
