"""A catalog's trie as kernels that were captured in a CUDA graph read it.

A captured graph fixes addresses and launch shapes. What may change under it is therefore split in
two: a :class:`TrieTable` is a small device tensor that holds *where* the arrays of the trie are,
and is written anew when a catalog is swapped in; a :class:`StepShapes` holds *how large* things
may get, is fixed at capture, and tells on the host whether another catalog still fits.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rectokens.schemas.catalog_trie import CatalogTrie

# Places in the table; kernels read the same ones.
ROW_PTRS, CODES, LEAF_ITEMS, FIRST_LEAF = range(4)
TABLE_ENTRIES = 4

# A pair's place in the order of ties is 13 bits of slot and 16 bits of child.
MAX_WIDTH = 8192

_MAX_GATHERED = 64
_MAX_TYPICAL_GATHERED = 32.0
_MIN_BUCKET = 16


@dataclass(frozen=True, slots=True)
class LevelShape:
    """Bounds on one level, depth d to d + 1.

    Attributes:
        max_children: most children of a node that are provided for, a power of two.
        pairs: most (beam, child) pairs of one request that are provided for.
        typical_children: siblings (itself included) of an average node of depth d + 1, from the
            trie the shapes were made for.
    """

    max_children: int
    pairs: int
    typical_children: float

    @property
    def gathers(self) -> bool:
        """Whether logits of this level are cheaper to compute for the children alone.

        Gathering moves ``typical_children`` weight rows a beam; the dense product costs K
        multiply-adds an element of the hidden state and writes K logits a beam. For K of some
        thousands the two meet at about fifty children; a fixed ``max_children`` slots a beam
        must also stay small.
        """
        return self.max_children <= _MAX_GATHERED and self.typical_children <= _MAX_TYPICAL_GATHERED


@dataclass(frozen=True, slots=True)
class StepShapes:
    """Sizes that launches and buffers of a beam search are made for.

    Attributes:
        width: W, slots for beams of every request.
        codebook_size: K.
        levels: one entry for each of the L levels.
    """

    width: int
    codebook_size: int
    levels: tuple[LevelShape, ...]

    @property
    def num_levels(self) -> int:
        """L."""
        return len(self.levels)

    @classmethod
    def of(cls, trie: CatalogTrie, width: int, headroom: float = 1.25) -> StepShapes:
        """Shapes that ``trie`` fits with ``headroom`` to spare. Waits for the trie's device.

        Args:
            trie: a catalog of the usual size.
            width: W, at least the widest request's beam width, at most 8,192.
            headroom: factor, at least 1, on the largest node and on the number of pairs.

        Raises:
            ValueError: a width or headroom out of range.
        """
        if not 1 <= width <= MAX_WIDTH:
            raise ValueError(f"width is {width}; allowed are 1 to {MAX_WIDTH}")
        if headroom < 1:
            raise ValueError(f"headroom is {headroom}; it must be at least 1")
        whole_level = _power_of_two(trie.codebook_size)
        levels = []
        for depth in range(trie.num_levels):
            largest, pairs, typical = _fan_out(trie, depth, width)
            bucket = max(_power_of_two(int(largest * headroom)), _MIN_BUCKET)
            bucket = min(bucket, whole_level)
            # A request's parents are no more than the nodes of their depth.
            parents = min(width, 1 if depth == 0 else trie.codebook_size**depth)
            pairs = min(int(pairs * headroom) + 1, parents * bucket)
            levels.append(LevelShape(bucket, pairs, typical))
        return cls(width, trie.codebook_size, tuple(levels))

    def covering(self, other: StepShapes) -> StepShapes:
        """Shapes for whatever fits one of the two; what is typical is taken from these.

        Args:
            other: of the same width, codes and levels.
        """
        levels = (
            replace(
                mine,
                max_children=max(mine.max_children, theirs.max_children),
                pairs=max(mine.pairs, theirs.pairs),
            )
            for mine, theirs in zip(self.levels, other.levels, strict=True)
        )
        return replace(self, levels=tuple(levels))

    def refusal(self, trie: CatalogTrie) -> str | None:
        """Why ``trie`` needs other shapes (a new capture); None where it fits.

        Waits for the trie's device: call it while a catalog is loaded, not between steps.
        """
        if (trie.num_levels, trie.codebook_size) != (self.num_levels, self.codebook_size):
            return (
                f"the catalog has {trie.num_levels} levels of {trie.codebook_size} codes; "
                f"the shapes are for {self.num_levels} of {self.codebook_size}"
            )
        for depth, level in enumerate(self.levels):
            largest, pairs, _ = _fan_out(trie, depth, self.width)
            if largest > level.max_children:
                return (
                    f"a node of depth {depth} has {largest} children; "
                    f"the shapes are for at most {level.max_children}"
                )
            if pairs > level.pairs:
                return (
                    f"{self.width} nodes of depth {depth} have up to {pairs} children together; "
                    f"the shapes are for at most {level.pairs}"
                )
        return None


class TrieTable:
    """Where the active trie's arrays are, in a device tensor whose own address never changes.

    ``load`` swaps the trie; graphs captured with this table then search the new one. It only
    enqueues a small copy on the current stream: run it on the stream that replays the graph, and
    work enqueued before it still sees the trie before. The trie loaded last is kept alive here;
    whoever frees an earlier one waits until the work that was enqueued with it is done.

    Args:
        trie: the first trie, on the device to search on.
        shapes: what it and all later ones must fit.

    Attributes:
        entries: int64 (4,), pointers and sizes, as kernels read them.
        trie: the trie loaded last.
        shapes: as given.
    """

    def __init__(self, trie: CatalogTrie, shapes: StepShapes) -> None:
        self.trie = trie
        self.entries = torch.zeros(TABLE_ENTRIES, dtype=torch.long, device=trie.device)
        self.shapes = shapes
        self.load(trie)

    @property
    def device(self) -> torch.device:
        """Where the trie is searched."""
        return self.entries.device

    def load(self, trie: CatalogTrie, *, checked: bool = False) -> None:
        """Search ``trie`` from now on.

        Args:
            trie: on this table's device.
            checked: ``shapes.refusal(trie)`` was None already; spares doing it again, which waits
                for the device.

        Raises:
            ValueError: a trie on another device, or one that needs other shapes.
        """
        if trie.device != self.device:
            raise ValueError(f"the trie is on {trie.device}; the table is on {self.device}")
        refusal = None if checked else self.shapes.refusal(trie)
        if refusal is not None:
            raise ValueError(refusal)
        arrays = (trie.row_ptrs, trie.codes, trie.leaf_item_ptrs)
        if not all(array.is_contiguous() for array in arrays):
            raise ValueError("an array of the trie is not contiguous")
        values = [*(array.data_ptr() for array in arrays), trie.level_offsets[-2]]
        self.trie = trie
        copy_to_device(self.entries, torch.tensor(values))


def copy_to_device(target: Tensor, source: Tensor) -> None:
    """Enqueue a copy of a host tensor; its memory may be let go at once, the host does not wait."""
    if target.device.type == "cuda":
        source = source.pin_memory()
    target.copy_(source, non_blocking=True)


def _fan_out(trie: CatalogTrie, depth: int, width: int) -> tuple[int, int, float]:
    """Most children of a node, of ``width`` nodes together, and siblings of an average child."""
    first, end = trie.level_offsets[depth], trie.level_offsets[depth + 1]
    counts = torch.diff(trie.row_ptrs[first : end + 1])
    widest = counts.topk(width).values if counts.numel() > width else counts
    pairs = int(widest.sum(dtype=torch.long))
    squares = float(counts.double().square().sum())
    return trie.max_children[depth], pairs, squares / max(int(counts.sum(dtype=torch.long)), 1)


def _power_of_two(value: int) -> int:
    """The least power of two that is at least ``value``."""
    return 1 << max(value - 1, 0).bit_length()
