"""What a forward pass needs to know of keys and values: where new ones go, what rows look at.

Shapes: R rows of a pass, B requests, W beams each, L levels, Hq query heads, Hkv key heads, D head
dimension.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from rectokens.ops.context_attention import (
    PackedPrompts,
    ScoreRule,
    beam_attention,
    prompt_attention,
)
from server.engine.kv_pool import KVPool, LayerShape


class ForwardPass(Protocol):
    """Rows that go through the model together."""

    @property
    def positions(self) -> Tensor:
        """Position of each row in its sequence, int32 (R,)."""
        ...

    def target(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """Where new keys and values of a layer go.

        Returns:
            Keys and values as pages (P, Hkv, page size, D), and the slot of each row, int32 (R,).
        """
        ...

    def attend(self, layer: int, query: Tensor, rule: ScoreRule) -> Tensor:
        """Attention of queries (R, Hq, D) after their keys and values were stored: the same."""
        ...


@dataclass(frozen=True, slots=True)
class PromptPass:
    """Rows of prompts laid end to end, their context KV in the pool's pages.

    Attributes:
        positions: int32 (R,).
        slots: int32 (R,), place of each row in the pages; -1 for rows that only fill up a shape.
        prompts: where the rows and their keys are.
        last: the same with tiles for the last row of each request alone.
        last_rows: int32 (n,), the rows whose hidden state is wanted.
        pool: the pages.
    """

    positions: Tensor
    slots: Tensor
    prompts: PackedPrompts
    last: PackedPrompts
    last_rows: Tensor
    pool: KVPool

    def target(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """See :class:`ForwardPass`."""
        return self.pool.keys[layer], self.pool.values[layer], self.slots

    def attend(self, layer: int, query: Tensor, rule: ScoreRule) -> Tensor:
        """See :class:`ForwardPass`."""
        keys, values = self.pool.keys[layer], self.pool.values[layer]
        return prompt_attention(query, keys, values, self.prompts, rule)

    def attend_last(self, layer: int, query: Tensor, rule: ScoreRule) -> Tensor:
        """Attention of ``last_rows`` alone, (n, Hq, D), of queries (R, Hq, D)."""
        keys, values = self.pool.keys[layer], self.pool.values[layer]
        found = prompt_attention(query, keys, values, self.last, rule)
        return found.index_select(0, self.last_rows)


@dataclass(frozen=True, slots=True)
class BeamKV:
    """Keys and values of generated positions, in the slots that produced them.

    Beams are never copied when they are reordered: the search's ``ancestors`` say where a beam's
    own past lies. The size does not depend on prompts.

    Attributes:
        keys: by layer, (L - 1, R, Hkv, D), R = B * W.
        values: likewise.
        slots: int32 (R,), 0 to R - 1.
    """

    keys: Mapping[int, Tensor]
    values: Mapping[int, Tensor]
    slots: Tensor

    @classmethod
    def allocate(
        cls,
        shapes: Mapping[int, LayerShape],
        *,
        steps: int,
        rows: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> BeamKV:
        """Memory for passes of ``rows`` rows and ``steps`` = L - 1 generated positions."""

        def side(heads: int, dim: int) -> Tensor:
            # Zeros, so that rows nobody wrote cannot hold a NaN.
            return torch.zeros(steps, rows, heads, dim, device=device, dtype=dtype)

        return cls(
            keys={layer: side(s.kv_heads, s.key_dim) for layer, s in shapes.items()},
            values={layer: side(s.kv_heads, s.value_dim) for layer, s in shapes.items()},
            slots=torch.arange(rows, dtype=torch.int32, device=device),
        )

    @staticmethod
    def num_bytes(
        shapes: Mapping[int, LayerShape], steps: int, rows: int, dtype: torch.dtype
    ) -> int:
        """Memory of the keys and values."""
        return steps * rows * dtype.itemsize * sum(shape.elements for shape in shapes.values())

    def narrow(self, rows: int) -> BeamKV:
        """The same memory, cut for passes of fewer rows."""
        return BeamKV(
            keys={layer: _recut(side, rows) for layer, side in self.keys.items()},
            values={layer: _recut(side, rows) for layer, side in self.values.items()},
            slots=self.slots[:rows],
        )


def _recut(side: Tensor, rows: int) -> Tensor:
    steps, _, heads, dim = side.shape
    return side.flatten()[: steps * rows * heads * dim].view(steps, rows, heads, dim)


@dataclass(frozen=True, slots=True)
class BeamPass:
    """One step of all beams of a batch.

    Attributes:
        positions: int32 (B * W,).
        step: generated positions before this one.
        lengths: int32 (B,), prompt lengths; 0 for a request that is not there.
        page_table: int32 (B, most pages).
        ancestors: int32 (B, W, L), slot of each beam's past at every step up to this one.
        beam_kv: for B * W rows.
        pool: the pages of the prompts.
    """

    positions: Tensor
    step: int
    lengths: Tensor
    page_table: Tensor
    ancestors: Tensor
    beam_kv: BeamKV
    pool: KVPool

    def target(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """See :class:`ForwardPass`: every row is a page of one position."""
        keys, values = self.beam_kv.keys[layer], self.beam_kv.values[layer]
        return keys[self.step][:, :, None], values[self.step][:, :, None], self.beam_kv.slots

    def attend(self, layer: int, query: Tensor, rule: ScoreRule) -> Tensor:
        """See :class:`ForwardPass`."""
        return beam_attention(
            query,
            self.pool.keys[layer],
            self.pool.values[layer],
            self.lengths,
            self.page_table,
            self.beam_kv.keys[layer],
            self.beam_kv.values[layer],
            self.ancestors,
            self.step,
            rule,
        )
