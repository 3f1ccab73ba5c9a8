"""How the model is run: prompt once, then one step per level for all beams.

Two runners with one interface. ``SharedContextRunner`` stores each prompt once and lays the
beams side by side; it is right for models whose layers mix positions by attention alone.
``PerBeamRunner`` gives every beam a cache of its own, request by request; it is right for most
models that transformers can generate with, recurrent layers included, and slower. For the others
there is ``recompute_runner.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from rectokens.decoding.model_cache import cache_argument, named_parameters, returned_cache
from rectokens.schemas.item_tokens import ItemTokens
from server.engine.context_attention import (
    ATTENTION_NAME,
    BeamKV,
    CachedPrefix,
    ContextKV,
    decoding,
    prefilling,
    register,
)
from server.engine.head import LevelHead, LevelLogits, level_of_vocab_logits
from server.engine.packing import PackedRows, model_inputs
from server.engine.pooled_prompts import PooledPrompts, PromptPool
from server.engine.prefix_cache import PrefixCache
from server.engine.prompt_leases import Prompts


class DecodeSession(Protocol):
    """One batch from its prompts to its last level. Close it whatever happens."""

    @property
    def cached_tokens(self) -> Sequence[int]:
        """Tokens of each prompt that were not computed, (B,); after ``prefill``."""
        ...

    def prefill(self, prompts: Prompts, *, with_vocab_norm: bool) -> LevelLogits:
        """Run the prompts; logits of level 0, W = 1."""
        ...

    def advance(
        self, parents: Tensor, codes: Tensor, depth: int, *, with_vocab_norm: bool
    ) -> LevelLogits:
        """Feed the codes just chosen; logits of level ``depth``.

        Args:
            parents: int64 (B, W), slot of the previous step each beam continues.
            codes: int64 (B, W), code of level ``depth - 1`` it took.
            depth: codes chosen so far, 1 to L - 1.
            with_vocab_norm: also normalise over the vocabulary.
        """
        ...

    def close(self, sound: Sequence[bool | None] = ()) -> None:
        """End the batch.

        Args:
            sound: whether each request went well, so that what was computed of its prompt may
                serve others, (B,); None where nobody can say; empty where that is so of all.
        """
        ...


class Runner(Protocol):
    """Makes a session per batch."""

    @property
    def prefix_cache(self) -> PrefixCache | None:
        """What is kept of earlier prompts; None where nothing is."""
        ...

    def session(self) -> DecodeSession:
        """A fresh session."""
        ...


class SharedContextRunner:
    """Runs attention-only models with each prompt stored once.

    Args:
        model: a causal LM of transformers; its attention implementation is set to ours.
        item_tokens: where the item tokens lie.

    Attributes:
        pool: prompts of earlier batches, so that those that begin alike are not computed again;
            None for none.
    """

    def __init__(self, model: Any, item_tokens: ItemTokens) -> None:
        register()
        self.pool: PromptPool | None = None
        model.set_attn_implementation(ATTENTION_NAME)
        self.decoder = model.get_decoder()
        self.embed = model.get_input_embeddings()
        self.head = LevelHead(model, item_tokens)
        self.item_tokens = item_tokens
        self.device: torch.device = model.device

    @property
    def prefix_cache(self) -> PrefixCache | None:
        """What is kept of earlier prompts."""
        return None if self.pool is None else self.pool.cache

    def session(self) -> DecodeSession:
        """A fresh session."""
        return _SharedContextSession(self)

    def context_of(self, prompts: Prompts) -> ContextKV:
        """Keys and values of some prompts, computed anew."""
        rows = PackedRows.of([len(prompt) for prompt in prompts], [0] * len(prompts))
        return self.run_prompts(prompts, rows)[0]

    def run_prompts(
        self, suffixes: Prompts, rows: PackedRows, cached: CachedPrefix | None = None
    ) -> tuple[ContextKV, Tensor]:
        """One forward pass of packed prompts.

        Args:
            suffixes: what of each prompt is not cached.
            rows: where they lie.
            cached: keys and values of the positions before.

        Returns:
            Context KV of the whole prompts, and hidden states (B, 1, H) of their last positions.
        """
        context = ContextKV(torch.tensor(rows.lengths, device=self.device))
        with prefilling(context, rows, cached):
            hidden = self.decoder(
                **model_inputs(suffixes, self.embed, self.device),
                position_ids=rows.positions(self.device),
                use_cache=False,
            ).last_hidden_state
        return context, hidden[0, rows.last(self.device)][:, None]


class _SharedContextSession:
    def __init__(self, runner: SharedContextRunner) -> None:
        self._runner = runner
        self._beams = BeamKV()
        self._context: ContextKV | None = None
        self._pooled: PooledPrompts | None = None
        self.cached_tokens: Sequence[int] = ()

    def prefill(self, prompts: Prompts, *, with_vocab_norm: bool) -> LevelLogits:
        runner = self._runner
        self.cached_tokens, suffixes, cached = [0] * len(prompts), prompts, None
        if runner.pool is not None:
            self._pooled = runner.pool.lease(prompts)
            self.cached_tokens, cached = self._pooled.cached_tokens, self._pooled.cached
            suffixes = self._pooled.suffixes(prompts)
        rows = PackedRows.of([len(prompt) for prompt in prompts], self.cached_tokens)
        self._context, last = runner.run_prompts(suffixes, rows, cached)
        return runner.head(last, 0, with_vocab_norm=with_vocab_norm)

    def advance(
        self, parents: Tensor, codes: Tensor, depth: int, *, with_vocab_norm: bool
    ) -> LevelLogits:
        if self._context is None:
            raise RuntimeError("advance was called before prefill")
        batch_size, width = codes.shape
        tokens = codes + self._runner.item_tokens.token_id(depth - 1, 0)
        positions = (self._context.lengths + depth - 1)[:, None].expand(batch_size, width)
        self._beams.reorder(parents)
        with decoding(self._context, self._beams):
            hidden = self._runner.decoder(
                input_ids=tokens, position_ids=positions, use_cache=False
            ).last_hidden_state
        self._beams.append_step(width, batch_size, codes.device)
        return self._runner.head(hidden, depth, with_vocab_norm=with_vocab_norm)

    def close(self, sound: Sequence[bool | None] = ()) -> None:
        pooled, self._pooled = self._pooled, None
        if pooled is None:
            return
        try:
            if sound and self._context is not None:
                pooled.keep(self._context.keys, self._context.values, sound)
        finally:
            pooled.close()


class PerBeamRunner:
    """Runs any model with one cache row a beam, each request by itself.

    Args:
        model: a causal LM of transformers.
        item_tokens: where the item tokens lie.
        head: the model's, for a level's codes alone; None has the model compute all its logits,
            which every model can.

    Attributes:
        head: as given.
        embed: the model's input embeddings.
    """

    def __init__(self, model: Any, item_tokens: ItemTokens, head: LevelHead | None = None) -> None:
        self.head = head
        self.embed = model.get_input_embeddings()
        self.item_tokens = item_tokens
        self.device: torch.device = model.device
        self.prefix_cache: PrefixCache | None = None
        self._model = model if head is None else model.get_decoder()
        self._takes_positions = "position_ids" in named_parameters(self._model)

    def session(self) -> DecodeSession:
        """A fresh session."""
        return _PerBeamSession(self)

    def run(self, inputs: dict[str, Tensor], first: int, cache: Any = None) -> tuple[Tensor, Any]:
        """Run rows of one length through the model.

        Positions are told, because not every model reads off its cache how long it is: one with
        recurrent layers before the first attention layer may begin at 0 again.

        Args:
            inputs: token ids (R, S) or embeddings (R, S, H), by the model's name for them.
            first: position of the first of them.
            cache: of the positions before; None where there are none.

        Returns:
            Of each row's last position the hidden state (R, H), or the logits (R, V) where there
            is no head; and the cache.
        """
        rows, length = next(iter(inputs.values())).shape[:2]
        named = dict(inputs)
        if self._takes_positions:
            positions = torch.arange(first, first + length, device=self.device)
            named["position_ids"] = positions.expand(rows, -1)
        if cache is not None:
            named |= cache_argument(self._model, cache)
        if self.head is None:
            output = self._model(**named, use_cache=True, logits_to_keep=1)
            return output.logits[:, -1], returned_cache(output)
        output = self._model(**named, use_cache=True)
        return output.last_hidden_state[:, -1], returned_cache(output)

    def level(self, states: Tensor, level: int, *, with_vocab_norm: bool) -> LevelLogits:
        """Logits of a level from what ``run`` gave, (B, W, H) or (B, W, V)."""
        if self.head is not None:
            return self.head(states, level, with_vocab_norm=with_vocab_norm)
        return level_of_vocab_logits(
            states, self.item_tokens, level, with_vocab_norm=with_vocab_norm
        )


class _PerBeamSession:
    def __init__(self, runner: PerBeamRunner) -> None:
        self._runner = runner
        self._caches: list[Any] = []
        self._lengths: list[int] = []
        self.cached_tokens: Sequence[int] = ()

    def prefill(self, prompts: Prompts, *, with_vocab_norm: bool) -> LevelLogits:
        runner = self._runner
        self.cached_tokens = [0] * len(prompts)
        self._lengths = [len(prompt) for prompt in prompts]
        states = []
        for prompt in prompts:
            last, cache = runner.run(model_inputs([prompt], runner.embed, runner.device), 0)
            self._caches.append(cache)
            states.append(last)
        return runner.level(torch.stack(states), 0, with_vocab_norm=with_vocab_norm)

    def advance(
        self, parents: Tensor, codes: Tensor, depth: int, *, with_vocab_norm: bool
    ) -> LevelLogits:
        runner = self._runner
        tokens = codes + runner.item_tokens.token_id(depth - 1, 0)
        states = []
        for row, cache in enumerate(self._caches):
            cache.reorder_cache(parents[row])
            place = self._lengths[row] + depth - 1
            last, self._caches[row] = runner.run({"input_ids": tokens[row, :, None]}, place, cache)
            states.append(last)
        return runner.level(torch.stack(states), depth, with_vocab_norm=with_vocab_norm)

    def close(self, sound: Sequence[bool | None] = ()) -> None:
        self._caches.clear()
