"""A service without weights: the real HTTP, batching and catalog around an engine made to order.

Fixtures use its parts; run as a script it is a server process whose engine behaves as its
second argument says.
"""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import dataclass

import numpy as np
import polars as pl
import structlog
import torch
from numpy.typing import NDArray

from rectokens.artifacts.model import RetrievalSpec
from rectokens.catalog.build import build_catalog
from rectokens.prompts.parts import BuiltPrompt, ItemPart, Part, TextPart
from rectokens.prompts.recipe import PromptRecipe
from rectokens.prompts.registry import prompt_builder
from rectokens.schemas.catalog_trie import CatalogTrie
from rectokens.schemas.item_tokens import ItemTokens
from rectokens.schemas.search import SearchHit, SearchRequest, SearchResult, Shortfall
from server.engine.types import (
    BatchOutcome,
    EngineFault,
    HasLeft,
    PrefixCacheStats,
    RunningBatch,
    nobody_left,
)
from server.release import Release

NUM_ITEMS = 30
FINGERPRINT = "ab" * 32
# Nothing takes so long unless it hangs, whatever else the machine does.
LIMIT_S = 240
ITEM_IDS = [f"B{i:03d}" for i in range(NUM_ITEMS)]
ITEM_TOKENS = ItemTokens(
    offset=10, level_stride=4, num_levels=3, codebook_size=4, start_token_id=1, end_token_id=2
)


@dataclass(frozen=True)
class DummyBatch:
    requests: tuple[SearchRequest, ...]
    trie: CatalogTrie
    thread: str


class DummyEngine:
    """Returns the first items that the filters allow, item i with score -(i + 1).

    Attributes:
        batches: every batch it was asked, in order.
        gate: closed (cleared), a search waits until it is opened again.
        on_search: called with the requests of each batch; may raise.
        fault_if: a request for which it holds gets an EngineFault.
        prepared: every batch it prepared, and the name of the thread.
        run_ahead: every batch it ran that another thread had prepared.
        left: for every batch, which of its callers had left once the gate was open.
    """

    def __init__(self) -> None:
        self.max_prompt_tokens = 64
        self.prefix_cache: PrefixCacheStats | None = None
        self.vocab_size, self.hidden_size = 24, 8
        self.dtype = torch.float32
        self.batches: list[list[SearchRequest]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.on_search: Callable[[Sequence[SearchRequest]], None] = lambda requests: None
        self.fault_if: Callable[[SearchRequest], bool] = lambda request: False
        self.prepared: list[tuple[str, list[SearchRequest]]] = []
        self.run_ahead: list[list[SearchRequest]] = []
        self.left: list[list[bool]] = []
        self._changed = threading.Condition()

    @property
    def modules(self) -> Set[object]:
        return set()

    def get_ready(self, trie: CatalogTrie) -> None:
        """Needs nothing."""

    def let_go(self, trie: CatalogTrie) -> None:
        """Has nothing."""

    def prepare(self, requests: Sequence[SearchRequest], trie: CatalogTrie) -> DummyBatch:
        thread = threading.current_thread().name
        with self._changed:
            self.prepared.append((thread, list(requests)))
            self._changed.notify_all()
        return DummyBatch(tuple(requests), trie, thread)

    def search(self, requests: Sequence[SearchRequest], trie: CatalogTrie) -> BatchOutcome:
        return self.run(self.prepare(requests, trie))

    def run(self, prepared: DummyBatch, has_left: HasLeft = nobody_left) -> BatchOutcome:
        requests, trie = prepared.requests, prepared.trie
        with self._changed:
            self.batches.append(list(requests))
            if prepared.thread != threading.current_thread().name:
                self.run_ahead.append(list(requests))
            self._changed.notify_all()
        if not self.gate.wait(timeout=LIMIT_S):
            raise RuntimeError("nobody opened the gate")
        self.left.append([has_left(row) for row in range(len(requests))])
        self.on_search(requests)
        results = [
            EngineFault("made to order") if self.fault_if(r) else first_allowed(r, trie)
            for r in requests
        ]
        return BatchOutcome(tuple(results), prefill_s=0.001, decode_s=0.002)

    def begin(self, prepared: DummyBatch, has_left: HasLeft = nobody_left) -> RunningBatch | None:
        return None

    def wait_for_prepared(self, requests: Sequence[SearchRequest]) -> None:
        """Block until exactly that batch has been prepared ahead."""
        with self._changed:
            if not self._changed.wait_for(
                lambda: ("prefetch", list(requests)) in self.prepared, timeout=LIMIT_S
            ):
                raise TimeoutError(f"prepared are {self.prepared}")

    def wait_for_batches(self, count: int) -> None:
        """Block until that many batches have begun."""
        with self._changed:
            if not self._changed.wait_for(lambda: len(self.batches) >= count, timeout=LIMIT_S):
                raise TimeoutError(f"{len(self.batches)} batches after {LIMIT_S} s, wanted {count}")


class Turns:
    """Lets batches pass as it is told, line by line: ``hold`` none, ``step`` one more, ``go`` all.

    Each line is logged once it holds.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._left = math.inf

    def take(self, requests: Sequence[SearchRequest]) -> None:
        """Wait until a batch may pass."""
        with self._changed:
            self._changed.wait_for(lambda: self._left > 0)
            self._left -= 1

    def follow(self, lines: Iterable[str]) -> None:
        """Do as they say, until there are no more."""
        for line in lines:
            word = line.strip()
            with self._changed:
                self._left = {"hold": 0, "step": self._left + 1, "go": math.inf}[word]
                self._changed.notify_all()
            structlog.get_logger(__name__).info(word)


def first_allowed(request: SearchRequest, trie: CatalogTrie) -> SearchResult:
    excluded = set() if request.excluded_items is None else set(request.excluded_items.tolist())
    prefix, listed = request.allowed_prefix, request.allowed_items
    candidates = range(trie.num_items) if listed is None else listed.tolist()
    items = [
        i for i in candidates if i not in excluded and (prefix is None or prefix[i + 1] > prefix[i])
    ][: request.top_k]
    leaves = torch.searchsorted(trie.leaf_item_ptrs, torch.tensor(items).int(), right=True) - 1
    hits = tuple(
        SearchHit(item, tuple(codes), -(item + 1.0), (-(item + 1.0), 0.0, 0.0))
        for item, codes in zip(items, trie.leaf_codes(leaves).tolist(), strict=True)
    )
    if len(hits) == request.top_k:
        return SearchResult(hits)
    return SearchResult(hits, Shortfall("filters", len(hits)))


class TextBuilder:
    """Takes items and texts: three tokens an item, one a text."""

    name, version, max_prompt_tokens = "dummy_text", 1, 1_000

    def build(self, parts: Sequence[Part], *, max_tokens: int | None = None) -> BuiltPrompt:
        ids = [0]
        for part in parts:
            ids += [3] if isinstance(part, TextPart) else [4, 5, 6]
        items = sum(isinstance(part, ItemPart) for part in parts)
        return BuiltPrompt(tuple(ids), items_used=items, items_truncated=0)

    def build_items(
        self, codes: NDArray[np.integer], *, max_tokens: int | None = None
    ) -> BuiltPrompt:
        return self.build([ItemPart(tuple(row)) for row in codes.tolist()], max_tokens=max_tokens)

    def target(self, codes: Sequence[int]) -> list[int]:
        return [0, *codes]

    def training_sequence(self, parts: Sequence[Part]) -> tuple[list[int], list[int]]:
        raise NotImplementedError


def make_release(
    engine: DummyEngine | None = None,
    *,
    takes_text: bool = False,
    num_items: int = NUM_ITEMS,
    model_version: str = "model0000000000a",
) -> Release:
    """A catalog whose item index is the number in the item id, around a dummy engine."""
    ids = [f"B{i:03d}" for i in range(num_items)]
    codes = torch.tensor([[i // 16 % 4, i // 4 % 4, i % 4] for i in range(num_items)])
    catalog = build_catalog(
        ids,
        codes,
        codebook_size=4,
        tokenizer_fingerprint=FINGERPRINT,
        metadata=pl.DataFrame({"title": [f"title of {name}" for name in ids]}),
        constraint_sets={"even": ids[::2], "early": ids[: num_items // 3]},
    )
    recipe = PromptRecipe("item_history", 1, {"max_items": 8})
    return Release(
        model_name="dummy",
        model_version=model_version,
        created_s=1_700_000_000,
        spec=RetrievalSpec(FINGERPRINT, ITEM_TOKENS, recipe),
        catalog=catalog,
        trie=catalog.trie,
        prompts=TextBuilder() if takes_text else prompt_builder(recipe, ITEM_TOKENS),
        engine=engine or DummyEngine(),
    )


def main(port: str, behaviour: str, *flags: str) -> int:
    """Serve on a port.

    Behaviour is ok, slow (half a second a batch), told (see Turns, by stdin), broken (cannot load)
    or loading (for as long as anybody looks).
    """
    from server.release import ReleaseError
    from server.run import run_service
    from server.settings import load_settings

    engine = DummyEngine()
    if behaviour == "slow":
        engine.on_search = lambda requests: time.sleep(0.5)
    if behaviour == "told":
        turns = Turns()
        engine.on_search = turns.take
        threading.Thread(target=turns.follow, args=(sys.stdin,), daemon=True).start()

    def load() -> Release:
        if behaviour == "broken":
            raise ReleaseError("the model folder is empty")
        if behaviour == "loading":
            time.sleep(3_600)
        return make_release(engine)

    options = dict(flag.split("=", 1) for flag in flags)
    return run_service(
        load_settings({"port": port, **options}), load, lambda url: print(url, flush=True)
    )


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
