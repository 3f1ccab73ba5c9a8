"""Items that share a semantic ID: how many, in which order, and a level that tells them apart."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import polars as pl
import torch
from torch import Tensor

from rectokens.schemas.catalog_trie import lexicographic_order

_NAMES_SHOWN = 5
_RANK_KEY = b"rectokens-rank"


def collision_report(codes: Tensor) -> dict[str, float | int]:
    """How often items share a semantic ID.

    Args:
        codes: integer (N, L), values >= 0, N >= 1, in any order.

    Returns:
        ``num_items`` N; ``num_semantic_ids``, distinct rows; ``collision_rate``, share of items
        whose semantic ID another item has too; ``duplicates_rate``, (N - distinct) / N;
        ``largest_group``, most items with one semantic ID.

    Raises:
        ValueError: wrong shape or a negative code.
    """
    if codes.ndim != 2 or codes.shape[0] < 1 or codes.shape[1] < 1:
        raise ValueError(f"codes have shape {tuple(codes.shape)}; expected (N, L), both >= 1")
    if int(codes.min()) < 0:
        raise ValueError(f"codes go down to {int(codes.min())}; they must be at least 0")
    order = lexicographic_order(codes, int(codes.max()) + 1)
    sizes = torch.diff(group_starts(codes[order]), append=torch.tensor([codes.shape[0]]))
    return report_of_group_sizes(sizes)


def report_of_group_sizes(sizes: Tensor) -> dict[str, float | int]:
    """The :func:`collision_report` of a catalog given the number of items of each semantic ID.

    Args:
        sizes: integer (M,), each >= 1.
    """
    num_items = int(sizes.sum())
    return {
        "num_items": num_items,
        "num_semantic_ids": sizes.numel(),
        "collision_rate": int(sizes[sizes > 1].sum()) / num_items,
        "duplicates_rate": (num_items - sizes.numel()) / num_items,
        "largest_group": int(sizes.max()),
    }


def group_starts(ranked_codes: Tensor) -> Tensor:
    """First row of each run of equal rows: int64 (M,).

    Args:
        ranked_codes: integer (N, L), N >= 1, equal rows adjacent.
    """
    changed = (ranked_codes[1:] != ranked_codes[:-1]).any(dim=1)
    first = torch.ones(1, dtype=torch.bool, device=ranked_codes.device)
    return torch.cat([first, changed]).nonzero().squeeze(1)


def rank_items(
    item_ids: pl.Series, codes: Tensor, codebook_size: int, prior: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Order items by (semantic ID, prior descending, tie-break).

    The tie-break is a hash of the item id, so that neither the order of the input nor that of
    the ids (both may tell popularity or time) leaks into what is recommended first. It is worked
    out for colliding items only.

    Args:
        item_ids: (N,), distinct strings.
        codes: int64 (N, L), values in [0, K).
        codebook_size: K.
        prior: float (N,), finite, higher is better; None ranks by the tie-break alone.

    Returns:
        ``order``, int64 (N,): input row of the item at each place; ``starts``, int64 (M,): place
        of the first item of each semantic ID.
    """
    num_items = codes.shape[0]
    order = lexicographic_order(codes, codebook_size)
    starts = group_starts(codes[order])
    sizes = torch.diff(starts, append=torch.tensor([num_items]))
    groups = torch.repeat_interleave(torch.arange(starts.numel()), sizes)
    places = (sizes[groups] > 1).nonzero().squeeze(1)
    if places.numel() == 0:
        return order, starts
    rows = order[places]
    high, low = _tie_breaks(item_ids[rows.numpy()].to_list())
    merit = np.zeros(rows.numel()) if prior is None else prior[rows].double().numpy()
    ranked = np.lexsort((low, high, -merit, groups[places].numpy()))
    order[places] = rows[torch.from_numpy(ranked)]
    return order, starts


def _tie_breaks(item_ids: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """128 bits of hash for each id, as two uint64 arrays: high and low half."""
    digests = b"".join(
        hashlib.blake2b(item_id.encode(), digest_size=16, person=_RANK_KEY).digest()
        for item_id in item_ids
    )
    halves = np.frombuffer(digests, dtype=">u8").reshape(-1, 2)
    return halves[:, 0].astype(np.uint64), halves[:, 1].astype(np.uint64)


def add_rank_level(
    ranked_codes: Tensor, starts: Tensor, codebook_size: int, ranked_ids: pl.Series
) -> Tensor:
    """One more level, whose code is the item's rank among those that share its semantic ID.

    Args:
        ranked_codes: int64 (N, L), in the order of :func:`rank_items`.
        starts: int64 (M,), first row of each semantic ID.
        codebook_size: K, codes the new level has.
        ranked_ids: (N,), for the message.

    Returns:
        int64 (N, L + 1), all rows distinct.

    Raises:
        ValueError: more than K items share a semantic ID.
    """
    num_items = ranked_codes.shape[0]
    sizes = torch.diff(starts, append=torch.tensor([num_items]))
    largest = int(sizes.argmax())
    if int(sizes[largest]) > codebook_size:
        first, size = int(starts[largest]), int(sizes[largest])
        names = ", ".join(map(repr, ranked_ids[first : first + _NAMES_SHOWN].to_list()))
        too_many = int((sizes > codebook_size).sum())
        raise ValueError(
            f"{size} items share semantic ID {tuple(ranked_codes[first].tolist())} "
            f"(among them {names}), but an extra level of codebook_size {codebook_size} tells "
            f"only {codebook_size} apart; {too_many} semantic IDs are over that limit. "
            "Use the collision policy 'share', or a tokenizer with more codes"
        )
    rank = torch.arange(num_items) - torch.repeat_interleave(starts, sizes)
    return torch.cat([ranked_codes, rank[:, None]], dim=1)
