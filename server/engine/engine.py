"""The decode engine: prefill once per request, one constrained beam step per level."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rectokens.decoding.beam_step import Beams, StepOptions, beam_step
from rectokens.decoding.filters import BatchFilters
from rectokens.schemas.catalog_trie import CatalogTrie
from rectokens.schemas.item_tokens import ItemTokens
from rectokens.schemas.search import SearchRequest, SearchResult
from server.engine.base import LEFT, EngineBase, soundness
from server.engine.prompt_leases import Prompts
from server.engine.runners import DecodeSession, Runner
from server.engine.selection import collect_results
from server.engine.types import (
    BatchOutcome,
    EngineFault,
    HasLeft,
    PrefixCacheStats,
    nobody_left,
)


@dataclass(frozen=True, slots=True)
class PreparedBatch:
    """A batch before its turn.

    Attributes:
        requests: the sound ones, in order.
        rows: place of each in the batch.
        faults: one a request of the batch, None for the sound ones.
        trie: the catalog.
        prompts: one a sound request.
        filters: theirs, on the device.
        options: theirs, on the device.
    """

    requests: tuple[SearchRequest, ...]
    rows: tuple[int, ...]
    faults: tuple[EngineFault | None, ...]
    trie: CatalogTrie
    prompts: Prompts
    filters: BatchFilters
    options: StepOptions


class Engine(EngineBase):
    """A loaded model that searches catalogs. Not thread-safe: one thread owns it.

    Args:
        model: the causal LM, in eval mode, on its device.
        item_tokens: where the item tokens lie in its vocabulary.
        runner: how the model is run.
    """

    def __init__(self, model: Any, item_tokens: ItemTokens, runner: Runner) -> None:
        super().__init__(model, item_tokens)
        self._runner = runner

    @property
    def prefix_cache(self) -> PrefixCacheStats | None:
        """What is kept of earlier prompts; None where nothing is. Any thread may read it."""
        cache = self._runner.prefix_cache
        return None if cache is None else cache.stats()

    def search(self, requests: Sequence[SearchRequest], trie: CatalogTrie) -> BatchOutcome:
        """Answer a batch: see :meth:`prepare` and :meth:`run`."""
        return self.run(self.prepare(requests, trie))

    def prepare(self, requests: Sequence[SearchRequest], trie: CatalogTrie) -> PreparedBatch:
        """Check a batch and copy what it brings to the device. Any thread may, at any time.

        Args:
            requests: may differ in everything; the order of the answers is theirs.
            trie: the catalog, on the engine's device.

        Raises:
            ValueError: a trie that does not fit the model, or a filter of another catalog.
            EngineBrokenError: the device does not work any more.
        """
        with self._watching_device():
            return self._prepare(requests, trie)

    def _prepare(self, requests: Sequence[SearchRequest], trie: CatalogTrie) -> PreparedBatch:
        self._check_trie(trie)
        faults = tuple(self._prompt_fault(request) for request in requests)
        rows = tuple(row for row, fault in enumerate(faults) if fault is None)
        sound = tuple(requests[row] for row in rows)
        with self._copying():
            return PreparedBatch(
                requests=sound,
                rows=rows,
                faults=faults,
                trie=trie,
                prompts=[r.prompt if r.prompt_embeds is None else r.prompt_embeds for r in sound],
                filters=BatchFilters.from_requests(
                    sound, trie.num_items, self.device, self._prefixes
                ),
                options=StepOptions.from_requests(sound, self.device),
            )

    def run(self, prepared: PreparedBatch, has_left: HasLeft = nobody_left) -> BatchOutcome:
        """Answer a prepared batch.

        Args:
            prepared: by this engine.
            has_left: looked at between levels: a request whose caller has left costs nothing
                from there on, and a batch that everybody has left ends.

        Returns:
            One result a request. A request that is at fault by itself (a prompt the model
            cannot take, NaN logits) gets an ``EngineFault``; its neighbours are answered.

        Raises:
            EngineBrokenError: the device does not work any more.
        """
        results: list[SearchResult | EngineFault | None] = list(prepared.faults)
        cached_tokens = [0] * len(results)
        prefill_s = decode_s = 0.0
        if prepared.requests:
            with self._watching_device():
                answers, prefill_s, decode_s, cached = self._run_session(prepared, has_left)
            for row, answer, tokens in zip(prepared.rows, answers, cached, strict=True):
                results[row], cached_tokens[row] = answer, tokens
        return BatchOutcome(
            tuple(r for r in results if r is not None), prefill_s, decode_s, tuple(cached_tokens)
        )

    def _run_session(
        self, batch: PreparedBatch, has_left: HasLeft
    ) -> tuple[Sequence[SearchResult | EngineFault], float, float, Sequence[int]]:
        session = self._runner.session()
        answers: Sequence[SearchResult | EngineFault] = ()
        try:
            answers, prefill_s, decode_s = self._run(session, batch, has_left)
        finally:
            session.close([soundness(answer) for answer in answers])
        return answers, prefill_s, decode_s, session.cached_tokens

    @torch.inference_mode()
    def _run(
        self, session: DecodeSession, batch: PreparedBatch, has_left: HasLeft
    ) -> tuple[Sequence[SearchResult | EngineFault], float, float]:
        started = time.perf_counter()
        trie, requests = batch.trie, batch.requests
        with_vocab_norm = any(request.normalization == "vocab" for request in requests)
        level = session.prefill(batch.prompts, with_vocab_norm=with_vocab_norm)
        self._synchronize()
        prefilled = time.perf_counter()

        left = [False] * len(requests)
        beams = Beams.root(len(requests), self.device)
        codes = torch.empty(len(requests), 1, 0, dtype=torch.long, device=self.device)
        code_scores = torch.empty(len(requests), 1, 0, dtype=torch.float32, device=self.device)
        for depth in range(trie.num_levels):
            left = [was or has_left(row) for was, row in zip(left, batch.rows, strict=True)]
            if all(left):
                return [LEFT] * len(requests), prefilled - started, time.perf_counter() - prefilled
            if any(left):
                beams = _without(beams, left)
            step = beam_step(
                trie, depth, beams, level.logits, batch.options, batch.filters, level.vocab_log_norm
            )
            width = self._width(step.alive, step.codes.shape[1])
            parents, chosen = step.parents[:, :width], step.codes[:, :width]
            beams = step.beams.narrow(width)
            codes = _follow(codes, parents, chosen)
            code_scores = _follow(code_scores, parents, step.code_scores[:, :width])
            if depth + 1 < trie.num_levels:
                level = session.advance(parents, chosen, depth + 1, with_vocab_norm=with_vocab_norm)
        results = collect_results(requests, trie, beams, codes, code_scores)
        results = tuple(LEFT if gone else r for gone, r in zip(left, results, strict=True))
        return results, prefilled - started, time.perf_counter() - prefilled

    def _width(self, alive: Tensor, width: int) -> int:
        """Slots worth running: on a CPU, where looking is free, only as many as are alive."""
        return width if self.device.type != "cpu" else max(int(alive.max()), 1)

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _without(beams: Beams, left: Sequence[bool]) -> Beams:
    """The beams without those of the requests that are not wanted any more."""
    gone = torch.tensor(left, device=beams.scores.device)[:, None]
    return replace(beams, scores=beams.scores.masked_fill(gone, -torch.inf))


def _follow(history: Tensor, parents: Tensor, new: Tensor) -> Tensor:
    """(B, W, t) along the surviving beams, with the newest (B, W') appended: (B, W', t + 1)."""
    index = parents[..., None].expand(-1, -1, history.shape[-1])
    return torch.cat([history.gather(1, index), new[..., None]], dim=-1)
