"""k-means++ seeding (Arthur and Vassilvitskii, 2007), in blocks."""

from __future__ import annotations

import torch
from torch import Tensor

_MAX_BLOCK = 128
_CHUNK_ROWS = 16_384


def kmeans_plus_plus(points: Tensor, num_seeds: int, generator: torch.Generator) -> Tensor:
    """Pick rows as k-means seeds: each with probability proportional to D², its squared distance
    to the seeds picked before it.

    Drawing one seed at a time reads all points once a seed. Here candidates are drawn a block at
    a time from the D² of the block's start, and each is kept with probability (D² now) / (D² at
    the start): rejection sampling, so the draw is exactly k-means++, while the distances come
    from matrix products.

    Args:
        points: float (B, D), B >= 1, finite.
        num_seeds: K.
        generator: on the CPU; decides every draw, whatever the device of ``points``.

    Returns:
        long (K,), row indices on the device of ``points``. Once no point is away from all seeds
        (fewer than K distinct ones), rows not picked yet follow in random order, then random
        repeats.

    Raises:
        ValueError: no points.
    """
    num_points = points.shape[0]
    if num_points < 1:
        raise ValueError("batch has 0 rows; k-means++ seeding needs at least 1")
    # Distances do not care about the origin; rounding does.
    centred = points - points.mean(dim=0)
    squares = centred.square().sum(dim=1)

    first = torch.randint(num_points, (1,), generator=generator)
    seeds = first.tolist()
    nearest = torch.full_like(squares, torch.inf)
    _lower_to(nearest, centred, squares, first.to(points.device))
    block = 1
    while len(seeds) < min(num_seeds, num_points):
        weights = nearest.double().cpu()
        cumulative = weights.cumsum(0)
        total = cumulative[-1]
        if total <= 0:
            break
        draws = torch.rand(2, block, generator=generator, dtype=torch.float64)
        candidates = torch.searchsorted(cumulative, draws[0] * total, right=True)
        candidates.clamp_(max=num_points - 1)
        kept = _accept(
            centred[candidates.to(points.device)].cpu(),
            weights[candidates],
            draws[1],
            min(num_seeds, num_points) - len(seeds),
        )
        seeds += candidates[kept].tolist()
        _lower_to(nearest, centred, squares, candidates[kept].to(points.device))
        # Grow the block while most of it is accepted.
        block = min(block * 2, _MAX_BLOCK) if 2 * len(kept) >= block else max(block // 2, 1)
    return _fill(seeds, num_points, num_seeds, generator).to(points.device)


def _accept(block: Tensor, start: Tensor, draws: Tensor, wanted: int) -> list[int]:
    """Which candidates of a block to keep, in order, at most ``wanted``.

    Args:
        block: (m, D), the candidates.
        start: float64 (m,), their D² when they were drawn.
        draws: float64 (m,), uniform in [0, 1).
    """
    between = torch.cdist(block, block, compute_mode="donot_use_mm_for_euclid_dist")
    between = between.double().square()
    now = start.clone()
    kept: list[int] = []
    for index in range(block.shape[0]):
        if len(kept) == wanted:
            break
        if draws[index] * start[index] < now[index]:
            kept.append(index)
            torch.minimum(now, between[index], out=now)
    return kept


def _lower_to(nearest: Tensor, points: Tensor, squares: Tensor, new: Tensor) -> None:
    """Lower ``nearest`` (B,) to the squared distances to the new seeds, row indices (m,)."""
    seeds = points[new]
    seed_squares = squares[new]
    # The product's rounding leaves a point that equals a seed a tiny distance from it.
    noise = 16 * torch.finfo(points.dtype).eps
    for start in range(0, points.shape[0], _CHUNK_ROWS):
        rows = slice(start, start + _CHUNK_ROWS)
        distances = torch.addmm(seed_squares, points[rows], seeds.T, alpha=-2)
        closest, which = distances.min(dim=1)
        closest += squares[rows]
        scale = squares[rows] + seed_squares[which]
        closest[closest <= noise * scale] = 0
        torch.minimum(nearest[rows], closest, out=nearest[rows])
    nearest[new] = 0


def _fill(seeds: list[int], num_points: int, num_seeds: int, generator: torch.Generator) -> Tensor:
    """Complete the seeds to (K,): rows not picked yet, then repeats."""
    picked = torch.tensor(seeds[:num_seeds])
    missing = num_seeds - picked.numel()
    if missing == 0:
        return picked
    order = torch.randperm(num_points, generator=generator)
    unpicked = order[~torch.isin(order, picked)][:missing]
    missing -= unpicked.numel()
    repeats = torch.randint(num_points, (missing,), generator=generator)
    return torch.cat([picked, unpicked, repeats])
