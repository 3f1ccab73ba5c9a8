"""The pages of a batch's prompts: taken together, committed where sound, given back together.

Knows nothing of how a model is run. A runner takes the leases of its prompts, computes what is
not cached (``suffixes``), writes it into the prompts' own pages, and at the end of the batch
says which requests went well.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from server.engine.kv_pool import pages_for
from server.engine.prefix_cache import Lease, PrefixCache

# Token ids, or input embeddings (T, H). A batch may hold both kinds.
Prompt = Sequence[int] | Tensor
Prompts = Sequence[Prompt]

P = TypeVar("P", bound=Prompt)


class PromptLeases:
    """Leases of the prompts of one batch, in its order. Close it whatever happens.

    Args:
        cache: where the pages come from.
        prompts: of the batch. Embeddings are neither looked up nor remembered.
        whole: whether every prompt needs pages for all its positions, as for attention that
            reads the pages. False takes what there is: such a prompt is cached in part, or not
            at all.

    Attributes:
        leases: one a prompt.

    Raises:
        OutOfPagesError: with ``whole``, the prompts do not fit together; nothing is held then.
    """

    def __init__(self, cache: PrefixCache, prompts: Prompts, *, whole: bool) -> None:
        self._cache = cache
        self.leases: list[Lease] = []
        try:
            for prompt in prompts:
                if isinstance(prompt, Tensor):
                    lease = cache.acquire_private(len(prompt), whole=whole)
                else:
                    lease = cache.acquire(prompt, whole=whole)
                self.leases.append(lease)
        except BaseException:
            self.close()
            raise

    @property
    def cached_tokens(self) -> list[int]:
        """Positions of each prompt that need no computing."""
        return [lease.cached_tokens for lease in self.leases]

    def suffixes(self, prompts: Sequence[P]) -> list[P]:
        """What is left of each prompt to compute; at least its last position."""
        return [
            prompt[lease.cached_tokens :]  # type: ignore[misc]
            for prompt, lease in zip(prompts, self.leases, strict=True)
        ]

    def page_table(self, device: torch.device, min_pages: int = 0) -> Tensor:
        """Pages of each prompt, int32 (B, max_pages); page 0 fills up the shorter rows.

        Args:
            device: of the result.
            min_pages: least width, for shapes that must not change.
        """
        width = max(min_pages, *(len(lease.pages) for lease in self.leases))
        rows = [[*lease.pages, *([0] * (width - len(lease.pages)))] for lease in self.leases]
        return torch.tensor(rows, dtype=torch.int32).to(device, non_blocking=True)

    def lengths(self, device: torch.device) -> Tensor:
        """Tokens of each prompt, int32 (B,)."""
        tokens = [lease.num_tokens for lease in self.leases]
        return torch.tensor(tokens, dtype=torch.int32).to(device, non_blocking=True)

    def get_ready(self) -> None:
        """Do what a commit will need, while the prompts are being computed."""
        for lease in self.leases:
            self._cache.get_ready(lease)

    def commit(self, sound: Sequence[bool | None]) -> None:
        """Let later batches find the pages of the prompts whose requests went well.

        Args:
            sound: whether each request did, (B,); None where nobody can say. What those that did
                not took from the cache is not found again.
        """
        for lease, is_sound in zip(self.leases, sound, strict=True):
            if is_sound:
                self._cache.commit(lease)
            elif is_sound is not None:
                self._cache.distrust(lease)

    def close(self) -> None:
        """Give all pages back. Doing so again changes nothing."""
        leases, self.leases = self.leases, []
        for lease in leases:
            self._cache.release(lease)


def split_by_pages(lengths: Sequence[int], page_size: int, num_pages: int) -> list[list[int]]:
    """Cut a batch into runs that fit the pool whatever is cached, in order.

    Args:
        lengths: tokens of each prompt.
        page_size: positions in a page.
        num_pages: pages of the pool, none of them leased.

    Returns:
        Indices of the prompts of each run. A prompt that alone needs more pages than there are
        gets a run of its own, and an ``OutOfPagesError`` there.
    """
    runs: list[list[int]] = []
    used = 0
    for index, length in enumerate(lengths):
        pages = pages_for(length, page_size)
        if not runs or used + pages > num_pages:
            runs.append([])
            used = 0
        runs[-1].append(index)
        used += pages
    return runs
