"""How the model is run: prompt once, then one step per level for all beams.

Two runners with one interface. ``SharedContextRunner`` stores each prompt once and lays the
beams side by side; it is right for models whose layers mix positions by attention alone.
``PerBeamRunner`` gives every beam a cache of its own, request by request; it is right for any
model that transformers can generate with, recurrent layers included, and slower.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from rectokens.schemas.item_tokens import ItemTokens
from server.engine.context_attention import (
    ATTENTION_NAME,
    BeamKV,
    ContextKV,
    decoding,
    prefilling,
    register,
)
from server.engine.head import LevelHead, LevelLogits, level_of_vocab_logits

# Token ids, or input embeddings (T, H). A batch may hold both kinds.
Prompt = Sequence[int] | Tensor
Prompts = Sequence[Prompt]


class DecodeSession(Protocol):
    """One batch from its prompts to its last level."""

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


class Runner(Protocol):
    """Makes a session per batch."""

    def session(self) -> DecodeSession:
        """A fresh session."""
        ...


class SharedContextRunner:
    """Runs attention-only models with each prompt stored once.

    Args:
        model: a causal LM of transformers; its attention implementation is set to ours.
        item_tokens: where the item tokens lie.
    """

    def __init__(self, model: Any, item_tokens: ItemTokens) -> None:
        register()
        model.set_attn_implementation(ATTENTION_NAME)
        self.decoder = model.get_decoder()
        self.embed = model.get_input_embeddings()
        self.head = LevelHead(model, item_tokens)
        self.item_tokens = item_tokens
        self.device: torch.device = model.device

    def session(self) -> DecodeSession:
        """A fresh session."""
        return _SharedContextSession(self)


class _SharedContextSession:
    def __init__(self, runner: SharedContextRunner) -> None:
        self._runner = runner
        self._beams = BeamKV()
        self._context: ContextKV | None = None

    def prefill(self, prompts: Prompts, *, with_vocab_norm: bool) -> LevelLogits:
        device = self._runner.device
        # Right padding needs no mask: under causal attention no real position sees the pads.
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        self._context = ContextKV(lengths)
        with prefilling(self._context):
            hidden = self._runner.decoder(
                **_padded(prompts, self._runner.embed, device), use_cache=False
            ).last_hidden_state
        index = (lengths - 1)[:, None, None].expand(-1, 1, hidden.shape[-1])
        return self._runner.head(hidden.gather(1, index), 0, with_vocab_norm=with_vocab_norm)

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


class PerBeamRunner:
    """Runs any model with one cache row a beam, each request by itself.

    Args:
        model: a causal LM of transformers.
        item_tokens: where the item tokens lie.
    """

    def __init__(self, model: Any, item_tokens: ItemTokens) -> None:
        self.model = model
        self.item_tokens = item_tokens
        self.device: torch.device = model.device

    def session(self) -> DecodeSession:
        """A fresh session."""
        return _PerBeamSession(self)


class _PerBeamSession:
    def __init__(self, runner: PerBeamRunner) -> None:
        self._runner = runner
        self._caches: list[Any] = []

    def prefill(self, prompts: Prompts, *, with_vocab_norm: bool) -> LevelLogits:
        rows = []
        embed = self._runner.model.get_input_embeddings()
        for prompt in prompts:
            output = self._runner.model(
                **_padded([prompt], embed, self._runner.device), use_cache=True, logits_to_keep=1
            )
            self._caches.append(output.past_key_values)
            rows.append(output.logits[:, -1:])
        return self._level(torch.cat(rows), 0, with_vocab_norm)

    def advance(
        self, parents: Tensor, codes: Tensor, depth: int, *, with_vocab_norm: bool
    ) -> LevelLogits:
        tokens = codes + self._runner.item_tokens.token_id(depth - 1, 0)
        rows = []
        for cache, parent, token in zip(self._caches, parents, tokens, strict=True):
            cache.reorder_cache(parent)
            output = self._runner.model(
                input_ids=token[:, None], past_key_values=cache, use_cache=True, logits_to_keep=1
            )
            rows.append(output.logits[:, -1])
        return self._level(torch.stack(rows), depth, with_vocab_norm)

    def _level(self, logits: Tensor, level: int, with_vocab_norm: bool) -> LevelLogits:
        return level_of_vocab_logits(
            logits, self._runner.item_tokens, level, with_vocab_norm=with_vocab_norm
        )


def _padded(prompts: Prompts, embed: nn.Module, device: torch.device) -> dict[str, Tensor]:
    """The model's input of a batch, padded on the right by repeating each prompt's last position.

    ``input_ids`` (B, T) where all prompts are token ids. Where one is embeddings, the others are
    embedded by the model's own layer, so that a prompt means the same in either form:
    ``inputs_embeds`` (B, T, H).
    """
    longest = max(len(prompt) for prompt in prompts)
    if not any(isinstance(prompt, Tensor) for prompt in prompts):
        rows = [[*prompt, *([prompt[-1]] * (longest - len(prompt)))] for prompt in prompts]
        return {"input_ids": torch.tensor(rows, device=device)}
    dtype = next(embed.parameters()).dtype
    embeds = []
    for prompt in prompts:
        if isinstance(prompt, Tensor):
            row = prompt.to(device, dtype)
        else:
            row = embed(torch.tensor(list(prompt), device=device))
        embeds.append(torch.cat([row, row[-1:].expand(longest - len(row), -1)]))
    return {"inputs_embeds": torch.stack(embeds)}
