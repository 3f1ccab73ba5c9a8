"""The decode engine: prefill once per request, one constrained beam step per level."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rectokens.decoding.beam_step import Beams, StepOptions, beam_step
from rectokens.decoding.device_prefixes import DevicePrefixes
from rectokens.decoding.filters import BatchFilters
from rectokens.schemas.catalog_trie import CatalogTrie
from rectokens.schemas.item_tokens import ItemTokens
from rectokens.schemas.search import SearchRequest, SearchResult
from server.engine.runners import Prompts, Runner
from server.engine.selection import collect_results
from server.engine.types import BatchOutcome, EngineFault


class Engine:
    """A loaded model that searches catalogs. Not thread-safe: one thread owns it.

    Args:
        model: the causal LM, in eval mode, on its device.
        item_tokens: where the item tokens lie in its vocabulary.
        runner: how the model is run.
    """

    def __init__(self, model: Any, item_tokens: ItemTokens, runner: Runner) -> None:
        self._runner = runner
        self._item_tokens = item_tokens
        self.device: torch.device = model.device
        self._prefixes = DevicePrefixes(self.device)
        self._vocab_size, self._hidden_size = map(int, model.get_input_embeddings().weight.shape)
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self._max_prompt_tokens = int(limit or 1 << 20) - item_tokens.num_levels + 1

    @property
    def max_prompt_tokens(self) -> int:
        """Longest prompt it takes; the generated positions are already set aside."""
        return self._max_prompt_tokens

    @property
    def vocab_size(self) -> int:
        """V, rows of the input embeddings."""
        return self._vocab_size

    @property
    def hidden_size(self) -> int:
        """H of the input embeddings that a prompt may be given as."""
        return self._hidden_size

    def search(self, requests: Sequence[SearchRequest], trie: CatalogTrie) -> BatchOutcome:
        """Answer a batch.

        Args:
            requests: may differ in everything; the order of the answers is theirs.
            trie: the catalog, on the engine's device.

        Returns:
            One result a request. A request that is at fault by itself (a prompt the model
            cannot take, NaN logits) gets an ``EngineFault``; its neighbours are answered.

        Raises:
            ValueError: a trie that does not fit the model.
        """
        if (trie.num_levels, trie.codebook_size) != (
            self._item_tokens.num_levels,
            self._item_tokens.codebook_size,
        ):
            raise ValueError(
                f"the catalog has {trie.num_levels} levels of {trie.codebook_size} codes; the "
                f"model has {self._item_tokens.num_levels} of {self._item_tokens.codebook_size}"
            )
        faults = [self._prompt_fault(request) for request in requests]
        sound = [request for request, fault in zip(requests, faults, strict=True) if fault is None]
        results: list[SearchResult | EngineFault] = []
        prefill_s = decode_s = 0.0
        if sound:
            answers, prefill_s, decode_s = self._search(sound, trie)
            remaining = iter(answers)
            results = [fault or next(remaining) for fault in faults]
        else:
            results = [fault for fault in faults if fault is not None]
        return BatchOutcome(tuple(results), prefill_s, decode_s)

    @torch.inference_mode()
    def _search(
        self, requests: Sequence[SearchRequest], trie: CatalogTrie
    ) -> tuple[tuple[SearchResult | EngineFault, ...], float, float]:
        started = time.perf_counter()
        filters = BatchFilters.from_requests(requests, trie.num_items, self.device, self._prefixes)
        options = StepOptions.from_requests(requests, self.device)
        with_vocab_norm = any(request.normalization == "vocab" for request in requests)
        session = self._runner.session()
        prompts: Prompts = [
            r.prompt if r.prompt_embeds is None else r.prompt_embeds for r in requests
        ]
        level = session.prefill(prompts, with_vocab_norm=with_vocab_norm)
        self._synchronize()
        prefilled = time.perf_counter()

        beams = Beams.root(len(requests), self.device)
        codes = torch.empty(len(requests), 1, 0, dtype=torch.long, device=self.device)
        code_scores = torch.empty(len(requests), 1, 0, device=self.device)
        for depth in range(trie.num_levels):
            step = beam_step(
                trie, depth, beams, level.logits, options, filters, level.vocab_log_norm
            )
            width = self._width(step.alive, step.codes.shape[1])
            parents, chosen = step.parents[:, :width], step.codes[:, :width]
            beams = step.beams.narrow(width)
            codes = _follow(codes, parents, chosen)
            code_scores = _follow(code_scores, parents, step.code_scores[:, :width])
            if depth + 1 < trie.num_levels:
                level = session.advance(parents, chosen, depth + 1, with_vocab_norm=with_vocab_norm)
        results = collect_results(requests, trie, beams, codes, code_scores)
        return results, prefilled - started, time.perf_counter() - prefilled

    def _width(self, alive: Tensor, width: int) -> int:
        """Slots worth running: on a CPU, where looking is free, only as many as are alive."""
        return width if self.device.type != "cpu" else max(int(alive.max()), 1)

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _prompt_fault(self, request: SearchRequest) -> EngineFault | None:
        if request.prompt_length > self._max_prompt_tokens:
            return EngineFault(
                f"prompt has {request.prompt_length} tokens; "
                f"the model takes {self._max_prompt_tokens}"
            )
        if request.prompt_embeds is not None:
            found = request.prompt_embeds.shape[1]
            if found == self._hidden_size:
                return None
            return EngineFault(
                f"prompt_embeds have hidden size {found}; the model's is {self._hidden_size}"
            )
        low, high = min(request.prompt), max(request.prompt)
        if low < 0 or high >= self._vocab_size:
            return EngineFault(
                f"prompt has token ids {low} to {high}; allowed are 0 to {self._vocab_size - 1}"
            )
        return None


def _follow(history: Tensor, parents: Tensor, new: Tensor) -> Tensor:
    """(B, W, t) along the surviving beams, with the newest (B, W') appended: (B, W', t + 1)."""
    index = parents[..., None].expand(-1, -1, history.shape[-1])
    return torch.cat([history.gather(1, index), new[..., None]], dim=-1)
