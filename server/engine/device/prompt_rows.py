"""The rows of prompts that one pass computes, made on the host and copied in one piece.

A pass has a capacity (rows, requests, tiles); what does not fill it is marked as not there, so a
pass of fixed capacity can be captured once and replayed for any prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rectokens.ops.context_attention import PackedPrompts, cut_into_tiles
from server.engine.device.passes import PromptPass
from server.engine.kv_pool import KVPool

_ALIGNED = 32  # int32 values: fields begin at multiples of 128 bytes, as kernels are compiled for

Ints = NDArray[np.int32]


def aligned(length: int) -> int:
    """Room for so many int32 values, up to where the next field may begin."""
    return -(-length // _ALIGNED) * _ALIGNED


@dataclass(frozen=True, slots=True)
class PromptSlice:
    """Neighbouring positions of one prompt that a pass computes.

    Attributes:
        tokens: int32 (n,), the token ids at these positions; any ids where the prompt is given
            as embeddings.
        start: first position.
        pages: int32, the prompt's pages.
        is_end: whether the prompt ends here, so that its last hidden state is wanted.
        embeds: (n, H), embeddings that stand at these positions instead; None for token ids.
    """

    tokens: Ints
    start: int
    pages: Ints
    is_end: bool
    embeds: Tensor | None = None

    @property
    def count(self) -> int:
        """Positions."""
        return len(self.tokens)

    @property
    def end(self) -> int:
        """One past the last position."""
        return self.start + len(self.tokens)


def cut_into_passes(
    slices: Sequence[PromptSlice], max_rows: int, max_prompts: int | None = None
) -> list[list[PromptSlice]]:
    """Share out prompts among passes of at most ``max_rows`` rows; long ones are divided.

    In order: a prompt's beginning is in an earlier pass than its end, or in the same.

    Args:
        slices: of the prompts.
        max_rows: of a pass.
        max_prompts: of a pass; None for any number.
    """
    passes: list[list[PromptSlice]] = [[]]
    room = max_rows
    for piece in slices:
        done = 0
        while done < piece.count:
            if room == 0 or len(passes[-1]) == max_prompts:
                passes.append([])
                room = max_rows
            taken = min(room, piece.count - done)
            part = slice(done, done + taken)
            passes[-1].append(
                PromptSlice(
                    tokens=piece.tokens[part],
                    start=piece.start + done,
                    pages=piece.pages,
                    is_end=piece.is_end and done + taken == piece.count,
                    embeds=None if piece.embeds is None else piece.embeds[part],
                )
            )
            done += taken
            room -= taken
    return passes


@dataclass(frozen=True, slots=True)
class Capacity:
    """What a pass has room for.

    Attributes:
        rows: R.
        requests: B.
        pages: width of the page table.
        tile_rows: rows of an attention tile.
        longest: positions of the longest prompt that attention is prepared for; any is computed.
    """

    rows: int
    requests: int
    pages: int
    tile_rows: int
    longest: int = 0

    @property
    def tiles(self) -> int:
        """Tiles that any B requests of R rows together can need."""
        return -(-self.rows // self.tile_rows) + self.requests

    def fields(self) -> dict[str, int]:
        """Length of each field of the block of integers, by name, in order."""
        return {
            "tokens": self.rows,
            "positions": self.rows,
            "slots": self.rows,
            "tile_request": self.tiles,
            "tile_start": self.tiles,
            "last_request": self.requests,
            "last_start": self.requests,
            "last_rows": self.requests,
            "query_starts": self.requests + 1,
            "lengths": self.requests,
            "page_table": self.requests * self.pages,
        }


class PromptBlock:
    """The integers of a pass on the device, at addresses that never change.

    Args:
        capacity: of the pass.
        pool: the pages.
    """

    def __init__(self, capacity: Capacity, pool: KVPool) -> None:
        self.capacity = capacity
        self._places: dict[str, slice] = {}
        size = 0
        for name, length in capacity.fields().items():
            self._places[name] = slice(size, size + length)
            size += aligned(length)
        self._size = size
        self._block = torch.zeros(size, dtype=torch.int32, device=pool.device)
        view = {name: self._block[place] for name, place in self._places.items()}
        self.tokens = view["tokens"]
        table = view["page_table"].view(capacity.requests, capacity.pages)

        def packed(request: str, start: str, longest: int = 0) -> PackedPrompts:
            return PackedPrompts(
                query_starts=view["query_starts"],
                lengths=view["lengths"],
                page_table=table,
                tile_request=view[request],
                tile_start=view[start],
                tile_rows=capacity.tile_rows,
                longest=longest,
            )

        self.forward_pass = PromptPass(
            positions=view["positions"],
            slots=view["slots"],
            prompts=packed("tile_request", "tile_start", capacity.longest),
            last=packed("last_request", "last_start"),
            last_rows=view["last_rows"],
            pool=pool,
        )
        self._page_size = pool.page_size
        self._offsets = np.arange(pool.page_size, dtype=np.int32)

    def fill(self, slices: Sequence[PromptSlice]) -> None:
        """Copy the rows of a pass to the device; the host does not wait."""
        host = torch.zeros(
            self._size, dtype=torch.int32, pin_memory=self._block.device.type == "cuda"
        )
        block = host.numpy()
        view = {name: block[place] for name, place in self._places.items()}
        view["slots"].fill(-1)
        view["tile_request"].fill(-1)
        view["last_request"].fill(-1)
        table = view["page_table"].reshape(self.capacity.requests, self.capacity.pages)
        row = 0
        for number, piece in enumerate(slices):
            rows = slice(row, row + piece.count)
            view["tokens"][rows] = piece.tokens
            view["positions"][rows] = np.arange(piece.start, piece.end, dtype=np.int32)
            first, size = piece.start // self._page_size, self._page_size
            pages = piece.pages[first : -(-piece.end // size), None]
            skipped = piece.start - first * size
            slots = (pages * size + self._offsets).reshape(-1)
            view["slots"][rows] = slots[skipped : skipped + piece.count]
            table[number, : len(piece.pages)] = piece.pages
            view["lengths"][number] = piece.end
            row += piece.count
            view["query_starts"][number + 1] = row
        view["query_starts"][len(slices) + 1 :] = row
        requests, starts = cut_into_tiles(
            [piece.count for piece in slices],
            [piece.end for piece in slices],
            self.capacity.tile_rows,
        )
        view["tile_request"][: len(requests)] = requests
        view["tile_start"][: len(starts)] = starts
        ends = [number for number, piece in enumerate(slices) if piece.is_end]
        for place_of, number in enumerate(ends):
            view["last_request"][place_of] = number
            view["last_start"][place_of] = slices[number].count - 1
            view["last_rows"][place_of] = view["query_starts"][number + 1] - 1
        self._block.copy_(host, non_blocking=True)
