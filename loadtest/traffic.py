"""Requests as visitors of a shop make them. Knows nothing of Locust."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

RECOMMEND, SCORE, BATCH = "/v1/recommend", "/v1/score", "/v1/recommend/batch"

# Mostly single recommendations; a re-ranking of candidates or a mailing's batch now and then.
_ROUTES = {RECOMMEND: 94, SCORE: 4, BATCH: 2}
_TOP_K = {10: 60, 20: 25, 50: 12, 100: 3}
# Half of all new visitors have at most so many items behind them.
_MEDIAN_HISTORY = 8
_HISTORY_SIGMA = 1.0
_MAX_NEW_HISTORY = 150
_RETURNING = 0.7
# A visitor who was answered does not come back with this probability.
_LEAVES = 0.1
_EXCLUDES, _MAX_EXCLUDED = 0.2, 20
_IN_A_SET = 0.15
_ALLOWS, _ALLOWED = 0.05, 100
_SCORED = 50
_BATCHED = 8


@dataclass(slots=True)
class Visitor:
    """Somebody with a history, oldest item first."""

    history: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Visit:
    """One request to be made.

    Attributes:
        path: of the route.
        body: of the request.
        visitor: who makes it; None where many users are asked for at once.
    """

    path: str
    body: dict[str, Any]
    visitor: Visitor | None


class Traffic:
    """Visitors who come, take some of what is recommended, and come back with a longer history.

    - Item popularity falls as one over the rank, in the order of ``items``.
    - New visitors' histories have a log-normal length, at least 0 and at most 150 items.
    - Seven in ten visits are by somebody who was here before, and whose history has grown.
    - One in five leaves out a few items, one in seven asks within a constraint set, one in twenty
      within a list of items.

    Args:
        items: item ids of the catalog, at least one, the most popular first.
        constraint_sets: names of sets that may be asked for; may be empty.
        seed: of all draws.
        max_top_k: of the server; larger ones are not asked for.
        max_visitors: remembered at once; beyond that they do not come back.
        timeout_ms: of each request; None leaves it out.
    """

    def __init__(
        self,
        items: Sequence[str],
        constraint_sets: Sequence[str] = (),
        *,
        seed: int = 0,
        max_top_k: int = 100,
        max_visitors: int = 10_000,
        timeout_ms: int | None = None,
    ) -> None:
        if not items:
            raise ValueError("there are no items to ask about")
        self._items = list(items)
        self._sets = list(constraint_sets)
        self._rng = random.Random(seed)
        self._top_k = {k: weight for k, weight in _TOP_K.items() if k <= max_top_k} or {1: 1}
        self._max_visitors = max_visitors
        self._timeout_ms = timeout_ms
        self._away: list[Visitor] = []

    def visit(self) -> Visit:
        """The next request."""
        path = self._choose(_ROUTES)
        if path == BATCH:
            bodies = [self._recommend(self._new_visitor()) for _ in range(_BATCHED)]
            return Visit(path, {"requests": bodies}, None)
        visitor = self._somebody()
        if path == SCORE:
            body = {"history": visitor.history[:], "items": self._some(_SCORED)}
            return Visit(path, self._timed(body), visitor)
        return Visit(path, self._timed(self._recommend(visitor)), visitor)

    def answered(self, visit: Visit, recommended: Sequence[str]) -> None:
        """The visitor takes up to three items, mostly recommended ones, and may come back.

        Args:
            visit: what was asked; whoever gets no answer does not come back.
            recommended: item ids of the answer.
        """
        visitor = visit.visitor
        if visitor is None:
            return
        for _ in range(self._rng.randint(1, 3)):
            if recommended and self._rng.random() < 0.7:
                visitor.history.append(self._rng.choice(recommended))
            else:
                visitor.history.append(self._item())
        if self._rng.random() >= _LEAVES and len(self._away) < self._max_visitors:
            self._away.append(visitor)

    def _recommend(self, visitor: Visitor) -> dict[str, Any]:
        body: dict[str, Any] = {
            "history": visitor.history[:],
            "top_k": self._choose(self._top_k),
            "exclude_history": True,
        }
        if self._rng.random() < _EXCLUDES:
            body["exclude_items"] = self._some(self._rng.randint(1, _MAX_EXCLUDED))
        if self._sets and self._rng.random() < _IN_A_SET:
            body["constraint_set"] = self._rng.choice(self._sets)
        elif self._rng.random() < _ALLOWS:
            body["allow_items"] = self._some(_ALLOWED)
        return body

    def _somebody(self) -> Visitor:
        if self._away and self._rng.random() < _RETURNING:
            # Swapped with the last one: somebody at random, in constant time.
            place = self._rng.randrange(len(self._away))
            self._away[place], self._away[-1] = self._away[-1], self._away[place]
            return self._away.pop()
        return self._new_visitor()

    def _new_visitor(self) -> Visitor:
        length = self._rng.lognormvariate(math.log(_MEDIAN_HISTORY), _HISTORY_SIGMA)
        return Visitor([self._item() for _ in range(min(round(length), _MAX_NEW_HISTORY))])

    def _some(self, count: int) -> list[str]:
        return [self._item() for _ in range(count)]

    def _item(self) -> str:
        count = len(self._items)
        # Uniform in the logarithm: probability falls as one over the rank.
        return self._items[min(int((count + 1) ** self._rng.random()) - 1, count - 1)]

    def _choose(self, weights: dict[Any, int]) -> Any:
        (choice,) = self._rng.choices(list(weights), list(weights.values()))
        return choice

    def _timed(self, body: dict[str, Any]) -> dict[str, Any]:
        return body if self._timeout_ms is None else {**body, "timeout_ms": self._timeout_ms}


def recommended_items(visit: Visit, answer: dict[str, Any]) -> list[str]:
    """Item ids of an answer to a single recommendation; none of any other."""
    if visit.path != RECOMMEND:
        return []
    return [item["item_id"] for item in answer["items"]]


def what_is_wrong(visit: Visit, answer: Any) -> str | None:
    """Why a 200 is no right answer to a visit; None where it is one.

    Args:
        visit: what was asked.
        answer: the JSON of the body, a list of its lines for a batch.
    """
    if visit.path == BATCH:
        requests = visit.body["requests"]
        if sorted(line["index"] for line in answer) != list(range(len(requests))):
            return f"a batch of {len(requests)} was answered with {len(answer)} lines"
        # A request refused within a batch is no wrong answer; its status says what it is.
        wrong = (
            _wrong_items(requests[line["index"]], line["answer"])
            for line in answer
            if line["status"] == 200
        )
        return next(filter(None, wrong), None)
    if visit.path == SCORE:
        scored = [item["item_id"] for item in answer["items"]]
        asked = visit.body["items"]
        return None if scored == asked else f"{len(asked)} items were to be scored, not {scored}"
    return _wrong_items(visit.body, answer)


def _wrong_items(body: dict[str, Any], answer: dict[str, Any]) -> str | None:
    found = [item["item_id"] for item in answer["items"]]
    if len(set(found)) != len(found):
        return "an item came twice"
    if len(found) > body["top_k"] or (len(found) < body["top_k"] and not answer["shortfall"]):
        return f"{len(found)} items for top_k {body['top_k']}, shortfall {answer['shortfall']}"
    if barred := set(found) & {*body.get("exclude_items", ()), *body["history"]}:
        return f"{min(barred)!r} was to be left out"
    if "allow_items" in body and not set(found) <= set(body["allow_items"]):
        return "an item that was not allowed"
    return None
