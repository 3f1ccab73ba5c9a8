"""A model ready for passes over pages: embeddings, decoder, head, and the pool of context KV."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rectokens.ops.context_attention import has_kernel, long_prompts_from, prompt_tile_rows
from rectokens.ops.head_norm import head_logits, linear_logsumexp
from rectokens.schemas.item_tokens import ItemTokens
from rectokens.schemas.search import NORMALIZATIONS
from server.engine.device.fused_decoder import FusedDecoder
from server.engine.device.passes import BeamPass, ForwardPass
from server.engine.device.prompt_rows import (
    Capacity,
    PromptBlock,
    PromptSlice,
    cut_into_passes,
)
from server.engine.head import read_head
from server.engine.kv_pool import KVPool

VOCAB, LEVEL = NORMALIZATIONS.index("vocab"), NORMALIZATIONS.index("level")

# (R, H) embeddings and what the rows are, to hidden states.
Decoder = Callable[[Tensor, ForwardPass], Tensor]


class Head:
    """The LM head for the codes of one level, and its normalisers.

    Args:
        model: the causal LM; see :func:`~server.engine.head.read_head`.
        item_tokens: where the item tokens lie.

    Raises:
        ValueError: a head that is no Linear layer.
    """

    def __init__(self, model: Any, item_tokens: ItemTokens) -> None:
        head, self.factor, self.softcap = read_head(model)
        self.weight: Tensor = head.weight.detach()
        self.bias: Tensor | None = None if head.bias is None else head.bias.detach()
        self._item_tokens = item_tokens

    def rows(self, level: int) -> tuple[Tensor, Tensor | None]:
        """Weights (K, H) and bias (K,) of a level's codes."""
        codes = self._item_tokens.level_slice(level)
        return self.weight[codes], None if self.bias is None else self.bias[codes]

    def logits(self, hidden: Tensor, level: int) -> Tensor:
        """float32 (R, K) from (R, H)."""
        weight, bias = self.rows(level)
        return head_logits(hidden, weight, bias, factor=self.factor, softcap=self.softcap)

    def vocab_norm(self, hidden: Tensor, kinds: Tensor) -> Tensor:
        """Log-sum-exp over the vocabulary, float32 (R,), of the requests that normalise so."""
        return linear_logsumexp(
            hidden, self.weight, self.bias, kinds, VOCAB, factor=self.factor, softcap=self.softcap
        )

    def level_norm(self, hidden: Tensor, level: int, kinds: Tensor) -> Tensor:
        """Log-sum-exp over the level's codes, float32 (R,), of the requests that want it."""
        weight, bias = self.rows(level)
        return linear_logsumexp(
            hidden, weight, bias, kinds, LEVEL, factor=self.factor, softcap=self.softcap
        )


class DeviceModel:
    """What passes run on. Not thread-safe: one thread owns it.

    Args:
        model: the causal LM, in eval mode, on its device.
        item_tokens: where the item tokens lie.
        decoder: how its layers are run.
        pool: pages for the context KV of all its layers.
        max_pass_rows: prompt rows that go through the model together; bounds the memory of
            activations, whatever the batch.

    Attributes:
        capturable: whether passes never wait for the host, so that they can be captured. What
            modules of transformers do is not known.
    """

    def __init__(
        self,
        model: Any,
        item_tokens: ItemTokens,
        decoder: Decoder,
        pool: KVPool,
        max_pass_rows: int = 16_384,
    ) -> None:
        self.decoder = decoder
        self.pool = pool
        self.embed: nn.Module = model.get_input_embeddings()
        self.head = Head(model, item_tokens)
        self.item_tokens = item_tokens
        self.device: torch.device = model.device
        self.dtype: torch.dtype = model.dtype
        self.hidden_size = int(model.get_input_embeddings().weight.shape[1])
        self.max_pass_rows = max_pass_rows
        self.capturable = isinstance(decoder, FusedDecoder) and all(
            has_kernel(shape.key_dim, self.dtype, self.device) for shape in pool.shapes.values()
        )
        shape = next(iter(pool.shapes.values()))
        self.tile_rows = prompt_tile_rows(shape.key_dim, self.dtype, self.device)

    def run_prompts(self, slices: Sequence[PromptSlice]) -> Tensor:
        """Compute prompts; their keys and values go to their pages.

        Args:
            slices: one a prompt, from the first position that is not cached to its end.

        Returns:
            Hidden state of each prompt's last position, (B, H).
        """
        found = []
        for part in cut_into_passes(slices, self.max_pass_rows):
            capacity = Capacity(
                rows=sum(piece.count for piece in part),
                requests=len(part),
                pages=max(len(piece.pages) for piece in part),
                tile_rows=self.tile_rows,
                longest=max(piece.end for piece in part),
            )
            block = PromptBlock(capacity, self.pool)
            block.fill(part)
            hidden = self.prompt_pass(block, part)
            found.append(hidden[: sum(piece.is_end for piece in part)])
        return torch.cat(found) if len(found) > 1 else found[0]

    def long_prompts_from(self, rows: int) -> int | None:
        """Positions from which on a prompt of a pass is computed in another way, if at all."""
        shape = next(iter(self.pool.shapes.values()))
        return long_prompts_from(shape.key_dim, self.dtype, self.pool.page_size, self.device, rows)

    def prompt_pass(self, block: PromptBlock, part: Sequence[PromptSlice] = ()) -> Tensor:
        """One pass of a block that was filled: hidden states at ``last_rows``.

        Args:
            block: of the rows.
            part: what it was filled with, where that holds embeddings.
        """
        x = self.embed(block.tokens)
        row = 0
        for piece in part:
            if piece.embeds is not None:
                x[row : row + piece.count] = piece.embeds.to(x.device, x.dtype)
            row += piece.count
        return self.decoder(x, block.forward_pass)

    def beam_pass(self, codes: Tensor, rows: BeamPass) -> Tensor:
        """One step of all beams: hidden states (R, H) after the codes just chosen.

        Args:
            codes: int32 (R,), of level ``rows.step``.
            rows: of the step.
        """
        tokens = codes + self.item_tokens.token_id(rows.step, 0)
        return self.decoder(self.embed(tokens), rows)
