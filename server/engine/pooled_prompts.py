"""Prompts that are computed in full but for what a pool remembers of earlier ones.

For runners that keep the context KV of a batch in tensors of its own: the cached beginning of a
prompt is copied out of the pages, and what was computed is copied into pages for those who come
later. Where pages are short, prompts are remembered in part or not at all; none is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from server.engine.kv_pool import KVPool
from server.engine.prefix_cache import PrefixCache
from server.engine.prompt_leases import Prompt, PromptLeases, Prompts


class PromptPool:
    """Pages and the cache that says what is in them.

    Args:
        pool: the pages.
        cache: of as many pages of the same size.

    Raises:
        ValueError: the two do not fit.
    """

    def __init__(self, pool: KVPool, cache: PrefixCache) -> None:
        found, expected = (cache.num_pages, cache.page_size), (pool.num_pages, pool.page_size)
        if found != expected:
            raise ValueError(f"the cache has (pages, page size) {found}; the pool has {expected}")
        self.pages = pool
        self.cache = cache

    def lease(self, prompts: Prompts) -> PooledPrompts:
        """Take the pages of a batch."""
        return PooledPrompts(self, prompts)


class PooledPrompts:
    """The prompts of one batch and their pages. Close it whatever happens."""

    def __init__(self, pool: PromptPool, prompts: Prompts) -> None:
        self._pages = pool.pages
        # Embeddings are never found again; they need no pages here.
        self._rows = [row for row, p in enumerate(prompts) if not isinstance(p, Tensor)]
        self._leases = PromptLeases(pool.cache, [prompts[row] for row in self._rows], whole=False)
        self.cached_tokens = [0] * len(prompts)
        for row, tokens in zip(self._rows, self._leases.cached_tokens, strict=True):
            self.cached_tokens[row] = tokens
        try:
            self._tables = {
                row: page_indices(lease.pages, self._pages.device)
                for row, lease in zip(self._rows, self._leases.leases, strict=True)
            }
        except BaseException:  # nobody else could give the pages back
            self._leases.close()
            raise

    def suffixes(self, prompts: Prompts) -> list[Prompt]:
        """What is left of each prompt to compute."""
        return [
            prompt[cached:] if cached else prompt
            for prompt, cached in zip(prompts, self.cached_tokens, strict=True)
        ]

    def cached(self, layer: int, row: int) -> tuple[Tensor, Tensor]:
        """Keys and values (Hkv, cached, D) of a layer and a prompt."""
        pages = self.cached_tokens[row] // self._pages.page_size
        return self._pages.read(layer, self._tables[row][:pages])

    def keep(
        self,
        keys: Mapping[int, Tensor],
        values: Mapping[int, Tensor],
        sound: Sequence[bool | None],
    ) -> None:
        """Remember the prompts whose requests went well.

        Args:
            keys: by layer index, (B, Hkv, T, D), cached positions included.
            values: likewise.
            sound: as of ``PromptLeases.commit``.
        """
        size = self._pages.page_size
        wanted = [sound[row] for row in self._rows]
        for row, lease, is_sound in zip(self._rows, self._leases.leases, wanted, strict=True):
            first = lease.cached_tokens
            last = min(len(lease.pages), lease.num_tokens // size) * size
            if not is_sound or last <= first:
                continue
            pages = self._tables[row][first // size : last // size]
            for layer in keys:
                new_keys, new_values = (side[layer][row, :, first:last] for side in (keys, values))
                self._pages.write(layer, pages, new_keys, new_values)
        self._leases.commit(wanted)

    def close(self) -> None:
        """Give the pages back."""
        self._leases.close()


def page_indices(pages: Sequence[int], device: torch.device) -> Tensor:
    """Page numbers as an index, int64 (n,)."""
    return torch.tensor(pages, dtype=torch.long, device=device)
