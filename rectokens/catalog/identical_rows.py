"""How many embedding rows are equal: no tokenizer can tell those items apart."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rectokens.catalog.collisions import report_of_group_sizes

_SEED = 20_140_723
_MIX = (
    (np.uint64(30), np.uint64(0xBF58476D1CE4E5B9)),
    (np.uint64(27), np.uint64(0x94D049BB133111EB)),
)


class IdenticalRows:
    """Counts equal rows over any number of batches, by a 64-bit hash (8 bytes a row).

    Different rows have equal hashes with a probability of about 2**-64, so among 20 million rows
    a false pair is a matter of one in 100,000.
    """

    def __init__(self) -> None:
        self._hashes: list[NDArray[np.uint64]] = []

    def update(self, batch: Tensor) -> None:
        """Take in rows, float32 (B, D); every batch must have the same D."""
        self._hashes.append(_hash_rows(batch))

    def report(self) -> dict[str, float]:
        """Floors that equal rows set to the collision figures of any tokenizer.

        Returns:
            ``collision_rate_floor``, share of rows that another row equals;
            ``duplicates_rate_floor``, (N - distinct rows) / N. Zero before any row.
        """
        if not self._hashes:
            return {"collision_rate_floor": 0.0, "duplicates_rate_floor": 0.0}
        _, sizes = np.unique(np.concatenate(self._hashes), return_counts=True)
        figures = report_of_group_sizes(torch.from_numpy(sizes))
        return {
            "collision_rate_floor": figures["collision_rate"],
            "duplicates_rate_floor": figures["duplicates_rate"],
        }


def _hash_rows(batch: Tensor) -> NDArray[np.uint64]:
    """Hash of each row: the sum, modulo 2**64, of its words mixed with where they stand.

    Each word goes through the finaliser of SplitMix64 (Steele et al., "Fast splittable
    pseudorandom number generators", 2014): a mere weighted sum of words confuses rows of few
    significant bits, such as embeddings of small integers.
    """
    rows = batch.detach().cpu().to(torch.float32).numpy() + np.float32(0)  # -0.0 becomes 0.0
    if rows.shape[1] % 2:
        rows = np.pad(rows, ((0, 0), (0, 1)))
    words = np.ascontiguousarray(rows).view(np.uint64)
    words = words + np.random.default_rng(_SEED).integers(
        0, 2**64, size=words.shape[1], dtype=np.uint64
    )
    for shift, factor in _MIX:
        words = (words ^ (words >> shift)) * factor
    hashes: NDArray[np.uint64] = (words ^ (words >> np.uint64(31))).sum(axis=1, dtype=np.uint64)
    return hashes
