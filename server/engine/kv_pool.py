"""Keys and values of prompts in pages of fixed size, allocated once.

The pool is memory only: which page holds what is decided by
:class:`server.engine.prefix_cache.PrefixCache`. A prompt of T tokens lies in ceil(T / page_size)
pages, in any places; position t is in its page t // page_size at offset t % page_size. Layers
may differ in shape; all share the page numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

PAGE_ALIGNMENT = 16
"""Page sizes are multiples of this, so that a page is whole tiles of a matrix product."""


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What one attention layer keeps of a position.

    Attributes:
        kv_heads: Hkv.
        key_dim: D of the keys.
        value_dim: D of the values.
    """

    kv_heads: int
    key_dim: int
    value_dim: int

    @property
    def elements(self) -> int:
        """Numbers kept of one position."""
        return self.kv_heads * (self.key_dim + self.value_dim)


class KVPool:
    """Preallocated pages for the keys and values of every attention layer.

    Args:
        shapes: by attention layer index (``module.layer_idx``); gaps are fine.
        num_pages: P.
        page_size: positions in a page, a multiple of 16.
        device: of the pages.
        dtype: of the pages, the model's.

    Attributes:
        keys: by layer index, (P, Hkv, page_size, D); what a page held before is left in it.
        values: likewise.

    Raises:
        ValueError: no layers, no pages, a page size that is no multiple of 16, or more memory than
            the device has.
    """

    def __init__(
        self,
        shapes: Mapping[int, LayerShape],
        *,
        num_pages: int,
        page_size: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        if not shapes:
            raise ValueError("the model has no attention layers; there is nothing to keep")
        check_page_size(page_size)
        if num_pages < 1:
            raise ValueError(f"num_pages is {num_pages}; it must be at least 1")
        self.shapes = dict(shapes)
        self.num_pages = num_pages
        self.page_size = page_size
        self.device = device
        self.dtype = dtype
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        try:
            self._allocate()
        except RuntimeError as error:  # of the allocator, on any device
            raise ValueError(
                f"{num_pages} pages of {page_size} tokens take {self.num_bytes} bytes for keys and "
                f"values, which {device} does not have"
            ) from error

    def _allocate(self) -> None:
        # Ordinary tensors even within inference mode, whose own could be written only there.
        with torch.inference_mode(False):
            for layer, shape in self.shapes.items():
                rows = (self.num_pages, shape.kv_heads, self.page_size)
                for side, dim in ((self.keys, shape.key_dim), (self.values, shape.value_dim)):
                    side[layer] = torch.empty(*rows, dim, device=self.device, dtype=self.dtype)

    @classmethod
    def within(
        cls,
        shapes: Mapping[int, LayerShape],
        *,
        budget_bytes: int,
        page_size: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> KVPool:
        """The most pages that fit into ``budget_bytes``.

        Raises:
            ValueError: not even one page fits, or as the constructor.
        """
        check_page_size(page_size)
        page = page_bytes(shapes, page_size, dtype)
        num_pages = budget_bytes // page if page else 0
        if shapes and num_pages < 1:
            raise ValueError(
                f"{budget_bytes} bytes for keys and values hold no page: "
                f"one page of {page_size} tokens takes {page} bytes of this model"
            )
        return cls(shapes, num_pages=num_pages, page_size=page_size, device=device, dtype=dtype)

    @property
    def num_bytes(self) -> int:
        """Memory of all pages."""
        return self.num_pages * page_bytes(self.shapes, self.page_size, self.dtype)

    def read(self, layer: int, pages: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values that lie in some pages, in that order.

        Args:
            layer: attention layer index.
            pages: int64 (n,), on the pool's device.

        Returns:
            Copies (Hkv, n * page_size, D).
        """
        return _join(self.keys[layer][pages]), _join(self.values[layer][pages])

    @torch.inference_mode()
    def write(self, layer: int, pages: Tensor, keys: Tensor, values: Tensor) -> None:
        """Fill whole pages.

        Args:
            layer: attention layer index.
            pages: int64 (n,), on the pool's device, each once.
            keys: (Hkv, n * page_size, D).
            values: likewise.
        """
        self.keys[layer][pages] = _cut(keys, self.page_size)
        self.values[layer][pages] = _cut(values, self.page_size)


def check_page_size(page_size: int) -> None:
    """Refuse a page size that is not a positive multiple of 16.

    Raises:
        ValueError: names it.
    """
    if page_size < 1 or page_size % PAGE_ALIGNMENT:
        raise ValueError(
            f"page_size is {page_size}; it must be a positive multiple of {PAGE_ALIGNMENT}"
        )


def page_bytes(shapes: Mapping[int, LayerShape], page_size: int, dtype: torch.dtype) -> int:
    """Memory of one page, all layers together."""
    return page_size * dtype.itemsize * sum(shape.elements for shape in shapes.values())


def pages_for(tokens: int, page_size: int) -> int:
    """Pages that a prompt of so many tokens lies in."""
    return -(-tokens // page_size)


def _join(pages: Tensor) -> Tensor:
    """(n, Hkv, page_size, D) to (Hkv, n * page_size, D)."""
    n, heads, size, dim = pages.shape
    return pages.transpose(0, 1).reshape(heads, n * size, dim)


def _cut(rows: Tensor, page_size: int) -> Tensor:
    """(Hkv, n * page_size, D) to (n, Hkv, page_size, D)."""
    heads, length, dim = rows.shape
    return rows.reshape(heads, length // page_size, page_size, dim).transpose(0, 1)
