"""Item vectors that semantic IDs are made of: text, and who met what."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from examples.data.neighbours import nearest_texts, pairs_by_gap

_REACH = 5
_NEIGHBOURS = 20
# Shares of what an item's own users tell and of what those of similar items do; squares add to 1.
_OWN, _BORROWED = 0.8, 0.6


def item_vectors(
    texts: NDArray[np.float32],
    train: Sequence[Sequence[int]],
    *,
    behaviour_weight: float,
    behaviour_dims: int,
    seed: int,
) -> torch.Tensor:
    """Unit text embeddings, with behaviour vectors of norm ``behaviour_weight`` beside them.

    Args:
        texts: float32 (N, D).
        train: training parts of the histories, rows; nothing held out may be among them.
        behaviour_weight: 0 leaves the behaviour out.
        behaviour_dims: of the behaviour vectors, at most N.
        seed: of the decomposition.

    Returns:
        float32 (N, D) or (N, D + behaviour_dims).
    """
    text = torch.nn.functional.normalize(torch.from_numpy(texts), dim=1)
    if behaviour_weight == 0.0:
        return text
    own = _behaviour(train, len(text), min(behaviour_dims, len(text)), seed)
    borrowed = torch.nn.functional.normalize(_of_neighbours(text, own), dim=1)
    # Items that nobody met have only what their neighbours lend them.
    mixed = torch.nn.functional.normalize(_OWN * own + _BORROWED * borrowed, dim=1)
    return torch.cat([text, behaviour_weight * mixed], dim=1)


def _behaviour(
    train: Sequence[Sequence[int]], num_items: int, dims: int, seed: int
) -> torch.Tensor:
    """Unit rows of a truncated decomposition of the positive pointwise mutual information.

    Two items count 1 / gap for every history that has them at most five apart. The information
    is smoothed with the usual power of 0.75 (Levy, Goldberg & Dagan 2015).
    """
    rows, columns, weights = [], [], []
    for gap, before, after in pairs_by_gap(train, _REACH):
        rows += [before, after]
        columns += [after, before]
        weights.append(np.full(2 * len(before), 1.0 / gap))
    if not rows:
        return torch.zeros(num_items, dims)
    places = torch.from_numpy(np.stack([np.concatenate(rows), np.concatenate(columns)]))
    counts = torch.sparse_coo_tensor(
        places,
        torch.from_numpy(np.concatenate(weights)),
        (num_items, num_items),
        check_invariants=True,
    ).coalesce()
    totals = torch.zeros(num_items, dtype=torch.float64)
    totals.index_add_(0, counts.indices()[0], counts.values())
    smooth = totals**0.75
    row, column = counts.indices()
    # Over the sum's power, not the powers' sum: that lowers all information by a constant, as
    # negative samples would, and what chance may have brought together falls to 0.
    expected = totals[row] * smooth[column] / totals.sum() ** 0.75
    information = (counts.values() / expected).log().clamp(min=0.0).float()
    matrix = torch.sparse_coo_tensor(
        counts.indices(), information, counts.shape, check_invariants=True
    ).coalesce()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        left, values, _ = torch.svd_lowrank(matrix, q=dims, niter=4)
    return torch.nn.functional.normalize(left * values.sqrt(), dim=1)


def _of_neighbours(text: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """Mean behaviour of the items of most similar text, near ones counting more."""
    out = torch.zeros_like(own)
    for row, cosines, near in nearest_texts(text, _NEIGHBOURS):
        out[row] = (cosines.clamp(min=0.0) ** 4)[:, None].bmm(own[near])[:, 0]
    return out
