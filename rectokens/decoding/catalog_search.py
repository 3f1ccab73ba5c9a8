"""Catalog beam search the slow, obvious way: the definition of what the engine must return.

Nothing here is shared with the fast path but the counter-based noise: prefixes live in
dictionaries, allowed items are counted one by one, every beam runs its whole sequence through
the model again, without a cache. Use it to check, never to serve.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rectokens.ops.counter_rng import gumbel
from rectokens.schemas.item_tokens import ItemTokens
from rectokens.schemas.search import SearchHit, SearchRequest, SearchResult, Shortfall

Prefix = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Beam:
    codes: Prefix
    level_scores: tuple[float, ...]
    log_prob: float
    perturbed: float

    @property
    def score(self) -> float:
        return math.fsum(self.level_scores)


class ReferenceSearch:
    """Searches the semantic IDs of N items with a causal LM, one request at a time.

    Args:
        model: a causal LM; called as ``model(input_ids=(rows, T), use_cache=False)``, and for
            prompts of embeddings as ``model(inputs_embeds=(rows, T, H), use_cache=False)``.
        item_tokens: where the item tokens lie in its vocabulary.
        codes: int64 (N, L), semantic ID of each item in catalog order (lexicographic, best
            prior first among items that share one).

    Raises:
        ValueError: codes that do not fit ``item_tokens`` or are not in lexicographic order.
    """

    def __init__(self, model: nn.Module, item_tokens: ItemTokens, codes: Tensor) -> None:
        self._model = model
        self._item_tokens = item_tokens
        self._items = [tuple(row) for row in codes.tolist()]
        if any(len(item) != item_tokens.num_levels for item in self._items):
            raise ValueError(
                f"codes have {codes.shape[1]} levels; the model has {item_tokens.num_levels}"
            )
        if self._items != sorted(self._items):
            raise ValueError("codes are not in lexicographic order")
        prefixes = {item[:depth] for item in self._items for depth in range(len(item) + 1)}
        # Breadth first, siblings by code: the node numbering the noise is keyed on.
        ordered = sorted(prefixes, key=lambda prefix: (len(prefix), prefix))
        self._node = {prefix: node for node, prefix in enumerate(ordered)}
        self._children: dict[Prefix, list[Prefix]] = {prefix: [] for prefix in ordered}
        for prefix in ordered[1:]:
            self._children[prefix[:-1]].append(prefix)

    @torch.inference_mode()
    def search(self, request: SearchRequest) -> SearchResult:
        """The best items of one request."""
        allowed = [index for index in range(len(self._items)) if _is_allowed(request, index)]
        reachable = {
            self._items[index][:depth]
            for index in allowed
            for depth in range(self._item_tokens.num_levels + 1)
        }
        beams = [_Beam((), (), 0.0, 0.0)]
        for _ in range(self._item_tokens.num_levels):
            candidates: list[_Beam] = []
            for beam, logits in zip(beams, self._logits(request, beams), strict=True):
                candidates.extend(self._extend(request, beam, logits, reachable))
            stochastic = request.temperature > 0
            candidates.sort(key=lambda b: -(b.perturbed if stochastic else b.score))
            beams = candidates[: request.beam_width]
        hits = [
            SearchHit(index, beam.codes, beam.score, beam.level_scores)
            for beam in beams
            for index in allowed
            if self._items[index] == beam.codes
        ][: request.top_k]
        return SearchResult(tuple(hits), _shortfall(request, len(hits), len(self._items)))

    def _logits(self, request: SearchRequest, beams: Sequence[_Beam]) -> Tensor:
        """Next-token logits after each beam: float32 (beams, V)."""
        if not beams:
            return torch.empty(0, dtype=torch.float32)
        device = next(self._model.parameters()).device
        rows = [
            [self._item_tokens.token_id(lvl, code) for lvl, code in enumerate(beam.codes)]
            for beam in beams
        ]
        if request.prompt_embeds is None:
            ids = torch.tensor([[*request.prompt, *row] for row in rows], device=device)
            output = self._model(input_ids=ids, use_cache=False)
        else:
            embed = self._model.get_input_embeddings()  # type: ignore[operator]
            generated = embed(torch.tensor(rows, dtype=torch.long, device=device))
            prompt = request.prompt_embeds.to(generated).expand(len(rows), -1, -1)
            embeds = torch.cat([prompt, generated], dim=1)
            output = self._model(inputs_embeds=embeds, use_cache=False)
        logits: Tensor = output.logits[:, -1].float().cpu()
        return logits

    def _extend(
        self, request: SearchRequest, beam: _Beam, logits: Tensor, reachable: set[Prefix]
    ) -> list[_Beam]:
        level = len(beam.codes)
        children = self._children[beam.codes]
        tokens = [self._item_tokens.token_id(level, child[-1]) for child in children]
        if request.normalization == "vocab":
            norm = logits.logsumexp(0)
        elif request.normalization == "level":
            norm = logits[self._item_tokens.level_slice(level)].logsumexp(0)
        else:
            norm = logits[tokens].logsumexp(0)
        code_scores = (logits[tokens] - norm).tolist()

        live = [i for i, child in enumerate(children) if child in reachable]
        if not live:
            return []
        log_probs = [0.0] * len(live)
        perturbed = [0.0] * len(live)
        if request.temperature > 0:
            heated = torch.log_softmax(
                logits[[tokens[i] for i in live]].double() / request.temperature, dim=0
            )
            log_probs = [beam.log_prob + value for value in heated.tolist()]
            nodes = torch.tensor([self._node[children[i]] for i in live])
            noise = gumbel(request.seed, nodes).tolist()
            gumbels = [value + g for value, g in zip(log_probs, noise, strict=True)]
            largest = max(gumbels)
            # Gumbels conditioned on their maximum being the parent's (Kool et al., 2019, eq. 8):
            # the textbook form, in float64.
            perturbed = [
                -math.log(math.exp(-beam.perturbed) - math.exp(-largest) + math.exp(-g))
                for g in gumbels
            ]
        return [
            _Beam(
                children[i],
                (*beam.level_scores, code_scores[i]),
                log_probs[rank],
                perturbed[rank],
            )
            for rank, i in enumerate(live)
        ]


def _is_allowed(request: SearchRequest, index: int) -> bool:
    prefix = request.allowed_prefix
    if prefix is not None and prefix[index + 1] == prefix[index]:
        return False
    if request.allowed_items is not None and index not in request.allowed_items.tolist():
        return False
    return request.excluded_items is None or index not in request.excluded_items.tolist()


def _shortfall(request: SearchRequest, returned: int, num_items: int) -> Shortfall | None:
    if returned >= request.top_k:
        return None
    reason = "catalog_exhausted" if num_items < request.top_k else "filters"
    return Shortfall(reason, returned)  # type: ignore[arg-type]
