"""Tries a device model on fixed prompts and beams, as the other runners are tried.

A session in the form of :class:`server.engine.runners.DecodeSession`: slow, for comparing only.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from server.engine.device.model import VOCAB, DeviceModel
from server.engine.device.passes import BeamKV, BeamPass
from server.engine.device.prompt_rows import PromptSlice
from server.engine.head import LevelLogits
from server.engine.kv_pool import pages_for
from server.engine.prefix_cache import PrefixCache
from server.engine.prompt_leases import Prompts
from server.engine.runners import DecodeSession


class TrialRunner:
    """Makes sessions that use the pool's first pages; only before anything else does.

    Args:
        model: to be tried.
    """

    prefix_cache: PrefixCache | None = None

    def __init__(self, model: DeviceModel) -> None:
        self._model = model

    def session(self) -> DecodeSession:
        """A fresh session."""
        return _TrialSession(self._model)


class _TrialSession:
    cached_tokens: Sequence[int] = ()

    def __init__(self, model: DeviceModel) -> None:
        self._model = model
        self._paths: list[Tensor] = []
        self._beam_kv: BeamKV | None = None

    def prefill(self, prompts: Prompts, *, with_vocab_norm: bool) -> LevelLogits:
        pool = self._model.pool
        counts = [pages_for(len(prompt), pool.page_size) for prompt in prompts]
        # Not in order, so that a pass that ignores the page table shows.
        pages = np.arange(sum(counts), dtype=np.int32)[::-1]
        ends = np.cumsum(counts)
        own = [pages[end - count : end] for end, count in zip(ends, counts, strict=True)]
        slices = [
            PromptSlice(np.asarray(prompt, dtype=np.int32), 0, row, is_end=True)
            for prompt, row in zip(prompts, own, strict=True)
        ]
        table = np.zeros((len(prompts), max(counts)), dtype=np.int32)
        for number, row in enumerate(own):
            table[number, : len(row)] = row
        self._table = torch.from_numpy(table).to(self._model.device)
        lengths = torch.tensor([len(prompt) for prompt in prompts], dtype=torch.int32)
        self._lengths = lengths.to(self._model.device)
        # Two passes, the second of which reads what the first one stored.
        first, second = [], []
        for piece in slices:
            half = piece.count // 2
            first.append(PromptSlice(piece.tokens[:half], 0, piece.pages, is_end=False))
            second.append(PromptSlice(piece.tokens[half:], half, piece.pages, is_end=True))
        self._model.run_prompts([*(p for p in first if p.count), second[0]])
        return self._level(self._model.run_prompts(second), 0, len(prompts))

    def advance(
        self, parents: Tensor, codes: Tensor, depth: int, *, with_vocab_norm: bool
    ) -> LevelLogits:
        model = self._model
        batch, width = codes.shape
        if self._beam_kv is None:
            self._beam_kv = BeamKV.allocate(
                model.pool.shapes,
                steps=model.item_tokens.num_levels - 1,
                rows=batch * width,
                device=model.device,
                dtype=model.dtype,
            )
        own = torch.arange(width, device=codes.device).expand(batch, width)
        self._paths = [*(path.gather(1, parents) for path in self._paths), own]
        rows = BeamPass(
            positions=(self._lengths + (depth - 1)).repeat_interleave(width),
            step=depth - 1,
            lengths=self._lengths,
            page_table=self._table,
            ancestors=torch.stack(self._paths, -1).int().contiguous(),
            beam_kv=self._beam_kv,
            pool=model.pool,
        )
        return self._level(model.beam_pass(codes.reshape(-1).int(), rows), depth, batch)

    def close(self, sound: Sequence[bool | None] = ()) -> None:
        self._paths = []

    def _level(self, hidden: Tensor, level: int, batch: int) -> LevelLogits:
        kinds = torch.full((batch,), VOCAB, dtype=torch.int32, device=hidden.device)
        head = self._model.head
        return LevelLogits(
            head.logits(hidden, level).view(batch, -1, self._model.item_tokens.codebook_size),
            head.vocab_norm(hidden, kinds).view(batch, -1),
        )
