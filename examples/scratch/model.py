"""The language model: its vocabulary, its fresh weights, and the loss of a batch of windows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.scratch.settings import DropoutSettings, ModelSettings, OptimizerSettings
from examples.scratch.teacher import Teacher
from examples.scratch.windows import PADDING
from rectokens.prompts.recipe import PromptRecipe
from rectokens.schemas.item_tokens import ItemTokens

PAD_ID, BOS_ID, START_ID, _FIRST_CODE = 0, 1, 2, 3


def item_tokens(num_levels: int, codebook_size: int) -> ItemTokens:
    """The vocabulary: padding, beginning, item start, then a block of codes for each level."""
    return ItemTokens(
        offset=_FIRST_CODE,
        level_stride=codebook_size,
        num_levels=num_levels,
        codebook_size=codebook_size,
        start_token_id=START_ID,
    )


def prompt_recipe(max_items: int) -> PromptRecipe:
    """How a history becomes a prompt, in training as in serving."""
    return PromptRecipe(
        builder="item_history",
        version=1,
        params={"max_items": max_items, "bos_token_id": BOS_ID, "end_token": False},
    )


def new_model(
    tokens: ItemTokens, shape: ModelSettings, dropout: DropoutSettings, seed: int
) -> nn.Module:
    """A Qwen3 causal LM with fresh weights and tied embeddings; dropout works in training only."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    width = 1 + tokens.num_levels
    positions = 2 + (shape.max_items + 1) * width
    config = Qwen3Config(
        vocab_size=tokens.end,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size or 4 * shape.hidden_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_heads,
        head_dim=shape.hidden_size // shape.num_heads,
        max_position_embeddings=1 << (positions - 1).bit_length(),
        tie_word_embeddings=True,
        # Of unit scale at the head: normalised states times rows of this size.
        initializer_range=shape.hidden_size**-0.5,
        attention_dropout=dropout.attention,
        bos_token_id=BOS_ID,
        eos_token_id=None,
        pad_token_id=PAD_ID,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = Qwen3ForCausalLM(config)
    if dropout.layer > 0:
        for block in model.model.layers:
            for part in (block.self_attn.o_proj, block.mlp.down_proj):
                part.register_forward_hook(_Dropped(dropout.layer))
    return model


class _Dropped:
    """Forward hook: dropout of a module's output while it trains."""

    def __init__(self, share: float) -> None:
        self._share = share

    def __call__(self, module: nn.Module, _: Any, output: Tensor) -> Tensor:
        return F.dropout(output, self._share, module.training)


@dataclass(frozen=True)
class Siblings:
    """Which codes the catalog has behind each prefix.

    Attributes:
        node: int64 (L, N), number of each item's prefix of each length from 0.
        allowed: for each level bool (prefixes, K).
    """

    node: Tensor
    allowed: tuple[Tensor, ...]

    @classmethod
    def of(cls, codes: Tensor, codebook_size: int) -> Siblings:
        """From all items' semantic IDs, int64 (N, L)."""
        nodes, allowed = [], []
        node = torch.zeros(len(codes), dtype=torch.long, device=codes.device)
        for level in range(codes.shape[1]):
            mask = torch.zeros(
                int(node.max()) + 1, codebook_size, dtype=torch.bool, device=codes.device
            )
            mask[node, codes[:, level]] = True
            nodes.append(node)
            allowed.append(mask)
            _, node = torch.unique(node * codebook_size + codes[:, level], return_inverse=True)
        return cls(torch.stack(nodes), tuple(allowed))


class Objective:
    """The loss of predicting every item of a window from those before it.

    Args:
        model: see :func:`new_model`.
        tokens: its vocabulary.
        codes: int64 (N, L) on the model's device.
        dropout, settings: how to train.
        teacher: has a say in the targets, by its settings' ``weight``; None has none.

    Raises:
        ValueError: as many level weights as levels are needed, or none.
    """

    def __init__(
        self,
        model: Any,
        tokens: ItemTokens,
        codes: Tensor,
        dropout: DropoutSettings,
        settings: OptimizerSettings,
        teacher: Teacher | None = None,
    ) -> None:
        weights = settings.level_weights or (1.0,) * tokens.num_levels
        if len(weights) != tokens.num_levels:
            raise ValueError(
                f"level_weights has {len(weights)} values; the model has {tokens.num_levels} levels"
            )
        self._model, self._tokens, self._codes = model, tokens, codes
        self._weights, self._dropout, self._settings = weights, dropout, settings
        levels = torch.arange(tokens.num_levels, device=codes.device)
        self._token_ids = codes + tokens.offset + levels * tokens.level_stride
        self._teacher = teacher if teacher is not None and teacher.settings.weight > 0 else None
        self._siblings = None
        if settings.softmax == "children":
            self._siblings = Siblings.of(codes, tokens.codebook_size)

    def token_ids(self, windows: Tensor) -> Tensor:
        """``[bos] S a0 .. S b0 ..`` of windows (B, M): int64 (B, 1 + M (1 + L))."""
        B, M = windows.shape
        inside = windows != PADDING
        ids = torch.full(
            (B, M, 1 + self._tokens.num_levels), START_ID, dtype=torch.long, device=windows.device
        )
        ids[:, :, 1:] = self._token_ids[windows.clamp(min=0)]
        ids = ids.masked_fill(~inside[:, :, None], PAD_ID).flatten(1)
        return F.pad(ids, (1, 0), value=BOS_ID)

    def __call__(self, windows: Tensor) -> Tensor:
        """Mean loss, in nats an item.

        Args:
            windows: int64 (B, M), rows of the data, ``PADDING`` at the end.
        """
        B, M = windows.shape
        width = 1 + self._tokens.num_levels
        inside = windows != PADDING
        embedded = self._model.get_input_embeddings()(self.token_ids(windows))
        if self._dropout.item > 0:
            keep = torch.rand(B, M, device=windows.device) >= self._dropout.item
            keep = F.pad(keep.repeat_interleave(width, dim=1), (1, 0), value=True)
            embedded = embedded * keep[..., None]
        embedded = F.dropout(embedded, self._dropout.embedding)
        # Padding stands at the end, where causal attention never looks from inside.
        hidden = self._model.model(inputs_embeds=embedded, use_cache=False).last_hidden_state
        hidden = F.dropout(hidden, self._dropout.output)
        hidden = hidden[:, 1:].reshape(B, M, width, -1)[inside]
        items = windows[inside]
        guesses = None
        if self._teacher is not None:
            guessed, weights = self._teacher.guesses(windows)
            guesses = (guessed[inside], weights[inside])
        head = self._model.get_output_embeddings().weight
        total = hidden.new_zeros((), dtype=torch.float32)
        for level, weight in enumerate(self._weights):
            logits = (hidden[:, level] @ head[self._tokens.level_slice(level)].T).float()
            allowed = None
            if self._siblings is not None:
                allowed = self._siblings.allowed[level][self._siblings.node[level, items]]
                logits = logits.masked_fill(~allowed, -torch.inf)
            log_probs = logits.log_softmax(dim=1)
            if allowed is not None:
                log_probs = log_probs.masked_fill(~allowed, 0.0)
            loss = self._hard(log_probs, allowed, self._codes[items, level])
            if guesses is not None:
                loss = self._soften(loss, log_probs, guesses, items, level)
            total = total + weight * loss.mean()
        return total

    def _hard(self, log_probs: Tensor, allowed: Tensor | None, target: Tensor) -> Tensor:
        """Cross-entropy (n,) with the true codes, smoothed over the codes that compete."""
        loss = -log_probs.gather(1, target[:, None])[:, 0]
        smoothing = self._settings.label_smoothing
        if smoothing == 0:
            return loss
        competing = log_probs.shape[1] if allowed is None else allowed.sum(dim=1)
        return (1.0 - smoothing) * loss - smoothing * log_probs.sum(dim=1) / competing

    def _soften(
        self,
        loss: Tensor,
        log_probs: Tensor,
        guesses: tuple[Tensor, Tensor],
        items: Tensor,
        level: int,
    ) -> Tensor:
        """Mix in the cross-entropy with the teacher's guesses that share the true prefix.

        Where there are none, the true code stands alone.
        """
        assert self._teacher is not None
        guessed, weights = guesses
        for before in range(level):
            same = self._codes[guessed, before] == self._codes[items, before][:, None]
            weights = weights * same
        mass = weights.sum(dim=1)
        expected = log_probs.gather(1, self._codes[guessed, level])
        soft = -(weights * expected).sum(dim=1) / mass.clamp(min=1e-9)
        return torch.where(mass > 0, torch.lerp(loss, soft, self._teacher.settings.weight), loss)
