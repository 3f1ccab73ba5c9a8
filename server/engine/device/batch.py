"""A batch before its turn: requests that were checked, their token ids read once."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rectokens.decoding.device_tables import MAX_WIDTH
from rectokens.schemas.catalog_trie import CatalogTrie
from rectokens.schemas.search import SearchRequest
from server.engine.device.prompt_rows import PromptSlice
from server.engine.types import EngineFault


@dataclass(frozen=True, slots=True)
class DeviceBatch:
    """A batch before its turn.

    Attributes:
        requests: the sound ones, their filters on the device.
        rows: place of each in the batch.
        faults: one a request of the batch, None for the sound ones.
        trie: the catalog.
        num_items: N of it.
        tokens: int64 (T,) a sound request; zeros where its prompt is embeddings.
    """

    requests: tuple[SearchRequest, ...]
    rows: tuple[int, ...]
    faults: tuple[EngineFault | None, ...]
    trie: CatalogTrie
    num_items: int
    tokens: tuple[NDArray[np.int64], ...]


def is_filtered(request: SearchRequest) -> bool:
    """Whether something of a request must be copied to the device before its turn."""
    return request.allowed_prefix is not None or request.allowed_items is not None


def width_fault(beam_width: int) -> EngineFault | None:
    """What is wrong with a beam width."""
    if beam_width <= MAX_WIDTH:
        return None
    return EngineFault(f"beam_width is {beam_width}; searches on a GPU take up to {MAX_WIDTH}")


def tokens_of(request: SearchRequest) -> NDArray[np.int64] | None:
    """The token ids of a prompt, read once; None for embeddings, and for ids beyond 64 bits."""
    if request.prompt_embeds is not None:
        return None
    try:
        return np.frombuffer(array("q", request.prompt), dtype=np.int64)
    except OverflowError:
        return None


def slice_of(
    request: SearchRequest, tokens: NDArray[np.int64], cached: int, pages: Sequence[int]
) -> PromptSlice:
    """What is to be computed of a prompt, its first ``cached`` positions left out."""
    embeds = request.prompt_embeds
    return PromptSlice(
        tokens=tokens[cached:].astype(np.int32),
        start=cached,
        pages=np.asarray(pages, dtype=np.int32),
        is_end=True,
        embeds=None if embeds is None else embeds[cached:],
    )
