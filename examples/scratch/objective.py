"""The loss of a batch of windows: every item predicted from those before it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from examples.scratch.model import BOS_ID, PAD_ID, START_ID
from examples.scratch.settings import DropoutSettings, OptimizerSettings
from examples.scratch.teacher import NO_TARGET, Teacher
from rectokens.schemas.item_tokens import ItemTokens


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

    With a teacher there are branches too: behind every place a drawn target of its own, which
    sees the window up to there and no other branch. A branch costs its own tokens only, and
    teaches exactly what a prompt that ends there would.

    Args:
        model: see :func:`examples.scratch.model.new_model`.
        tokens: its vocabulary.
        codes: int64 (N, L) on the model's device.
        dropout, settings: how to train.
        max_items: longest history that a prompt holds.
        teacher: draws targets; None for the true ones alone.

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
        *,
        max_items: int = 20,
        teacher: Teacher | None = None,
    ) -> None:
        weights = settings.level_weights or (1.0,) * tokens.num_levels
        if len(weights) != tokens.num_levels:
            raise ValueError(
                f"level_weights has {len(weights)} values; the model has {tokens.num_levels} levels"
            )
        self._model, self._tokens, self._codes = model, tokens, codes
        self._weights, self._dropout, self._settings = weights, dropout, settings
        self._max_items, self._teacher = max_items, teacher
        levels = torch.arange(tokens.num_levels, device=codes.device)
        self._token_ids = codes + tokens.offset + levels * tokens.level_stride
        self._siblings = None
        if settings.softmax == "children":
            self._siblings = Siblings.of(codes, tokens.codebook_size)
        self._layouts: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def token_ids(self, windows: Tensor) -> Tensor:
        """``[bos] S a0 .. S b0 ..`` of windows (B, M): int64 (B, 1 + M (1 + L))."""
        return F.pad(self._items_as_tokens(windows), (1, 0), value=BOS_ID)

    def __call__(self, windows: Tensor) -> Tensor:
        """Mean loss, in nats an item; with a teacher the weighted sum of both means.

        Args:
            windows: int64 (B, M), rows of the data, ``PADDING`` at the end.
        """
        M = windows.shape[1]
        width = 1 + self._tokens.num_levels
        embedded = self._embed(self.token_ids(windows))
        if self._dropout.item > 0:
            keep = torch.rand(windows.shape, device=windows.device) >= self._dropout.item
            keep = F.pad(keep.repeat_interleave(width, dim=1), (1, 0), value=True)
            embedded = embedded * keep[..., None]
        if self._teacher is None:
            # Padding stands at the end, where causal attention never looks from inside.
            hidden = self._states(embedded)
            return self._loss(hidden[:, 1:], windows, self._settings.label_smoothing)
        how = self._teacher.settings
        # Longer than a prompt is the context of no search.
        contexts = windows[:, : self._max_items]
        drawn = torch.stack([self._teacher.targets(contexts) for _ in range(how.draws)], dim=2)
        drawn = drawn.flatten(1)
        branches = self._embed(self._items_as_tokens(drawn))
        visible, positions = self._layout(M, contexts.shape[1])
        hidden = self._states(
            torch.cat([embedded, branches], dim=1),
            attention_mask=visible.expand(len(windows), 1, -1, -1),
            position_ids=positions.expand(len(windows), -1),
        )
        trunk = 1 + M * width
        loss = how.weight * self._loss(hidden[:, trunk:], drawn, 0.0)
        if how.trunk_weight > 0:
            smoothing = self._settings.label_smoothing
            loss = loss + how.trunk_weight * self._loss(hidden[:, 1:trunk], windows, smoothing)
        return loss

    def _items_as_tokens(self, items: Tensor) -> Tensor:
        """``S a0 .. S b0 ..``: int64 (B, M (1 + L)); padding where an item is none."""
        B, M = items.shape
        ids = torch.full(
            (B, M, 1 + self._tokens.num_levels), START_ID, dtype=torch.long, device=items.device
        )
        ids[:, :, 1:] = self._token_ids[items.clamp(min=0)]
        return ids.masked_fill((items < 0)[:, :, None], PAD_ID).flatten(1)

    def _embed(self, ids: Tensor) -> Tensor:
        embedded: Tensor = self._model.get_input_embeddings()(ids)
        return F.dropout(embedded, self._dropout.embedding)

    def _states(self, embedded: Tensor, **layout: Tensor) -> Tensor:
        states = self._model.model(inputs_embeds=embedded, use_cache=False, **layout)
        return F.dropout(states.last_hidden_state, self._dropout.output)

    def _layout(self, items: int, contexts: int) -> tuple[Tensor, Tensor]:
        """What sees what, bool (1, 1, T, T), and positions (1, T), of a trunk and its branches."""
        assert self._teacher is not None
        if (items, contexts) not in self._layouts:
            width, device = 1 + self._tokens.num_levels, self._codes.device
            trunk = torch.arange(1 + items * width, device=device)
            branch = torch.arange(contexts * self._teacher.settings.draws, device=device)
            step = torch.arange(width, device=device).repeat(len(branch))
            begins = 1 + (branch // self._teacher.settings.draws + 1) * width
            begins, branch = begins.repeat_interleave(width), branch.repeat_interleave(width)
            size = len(trunk) + len(branch)
            visible = torch.zeros(size, size, dtype=torch.bool, device=device)
            visible[: len(trunk), : len(trunk)] = trunk <= trunk[:, None]
            visible[len(trunk) :, : len(trunk)] = trunk < begins[:, None]
            same = branch == branch[:, None]
            visible[len(trunk) :, len(trunk) :] = same & (step <= step[:, None])
            positions = torch.cat([trunk, begins + step])
            self._layouts[items, contexts] = visible[None, None], positions[None]
        return self._layouts[items, contexts]

    def _loss(self, hidden: Tensor, items: Tensor, smoothing: float) -> Tensor:
        """Mean over the items (B, M) that are some, of states (B, M (1 + L), H)."""
        inside = items > NO_TARGET
        width = 1 + self._tokens.num_levels
        states = hidden.unflatten(1, (-1, width))[inside]
        wanted = items[inside]
        head = self._model.get_output_embeddings().weight
        total = hidden.new_zeros((), dtype=torch.float32)
        for level, weight in enumerate(self._weights):
            logits = states[:, level] @ head[self._tokens.level_slice(level)].T
            parts = self._cross_entropy(logits.float(), wanted, level, smoothing)
            total = total + weight * parts.sum() / max(len(wanted), 1)
        return total

    def _cross_entropy(self, logits: Tensor, items: Tensor, level: int, smoothing: float) -> Tensor:
        """Of each item's code (n,), the target smoothed over the codes that compete."""
        target = self._codes[items, level]
        competing: Any = logits.shape[1]
        if self._siblings is None:
            log_probs = logits.log_softmax(dim=1)
        else:
            allowed = self._siblings.allowed[level][self._siblings.node[level, items]]
            competing = allowed.sum(dim=1)
            log_probs = logits.masked_fill(~allowed, -torch.inf).log_softmax(dim=1)
            log_probs = log_probs.masked_fill(~allowed, 0.0)
        loss = -log_probs.gather(1, target[:, None])[:, 0]
        if smoothing == 0:
            return loss
        return (1.0 - smoothing) * loss - smoothing * log_probs.sum(dim=1) / competing
