"""Forms, tile shapes and launches of the constrained transition kernels.

Nothing here is public. Each `launch_...` takes the arguments of its op in
``constrained_node_transition`` beside this, with at least one row and one branch, and does nothing
on the host that waits for the device. Batch size and branch counts are run-time values of the
kernels; block sizes are powers of two and bounded, so few variants are ever compiled.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rectokens.kernels import constrained_triton as kernels
from rectokens.kernels import selection_triton as selection
from rectokens.kernels.launch_device import on_device
from rectokens.kernels.optional_triton import triton

KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_K = 512
MAX_BRANCHES = 1 << selection.SLOT_BITS
_MAX_PARTS = 65535
Choices = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class LinearSettings:
    """How child logits are computed.

    Attributes:
        product_share: from this share of all tokens on, M / V, the whole product is computed: a
            gather would read a weight row again for every row that has it as a child.
        group: consecutive rows that share programs, and a product where they stand at one node.
        slots: of a tile of that product.
        few: consecutive rows that share programs where they do not; divides ``group``.
        depth: hidden columns of a step of it; twice as many of 16 bits.
        chains: sums that steps are added to in turn, 1 or 2.
        pairs, pairs_hidden: tile of the dot products of other rows; half as wide of float32.
        ahead: steps of those that are loaded at a time.
        few_bytes: of weight rows, read once for each row that has them as children, up to which no
            tiles are made: dot products have the shorter way.
        programs: at least so many are started where there is work for them.
        parts: programs of ``group`` rows, at least, unless that makes over four times ``programs``.
        fillers: programs that fill rows, beside those that compute.
        left: share of what is to be filled that the latter fill when they are done.
        leaves: what is filled leaves the cache before what is multiplied.
        listed: children listed at a time where rows share them.
        fill: entries of a row filled at a time.
        registers: most a thread may have, so that more programs fit a multiprocessor.
    """

    product_share: float = 0.25
    group: int = 64
    slots: int = 64
    depth: int = 32
    chains: int = 1
    few: int = 16
    pairs: int = 16
    pairs_hidden: int = 256
    ahead: int = 4
    few_bytes: int = 24 << 20
    programs: int = 264
    parts: int = 16
    fillers: int = 132
    left: float = 0.5
    leaves: bool = True
    listed: int = 512
    fill: int = 2048
    registers: int | None = None
    warps: int = 4
    stages: int = 3


@dataclass(frozen=True)
class SelectSettings:
    """How children are chosen: ``block`` slots a program, of a longer row in further parts;
    ``warp`` of them a warp where one is chosen, else ``warp_of_more``."""

    block: int = 2048
    warp: int = 256
    warp_of_more: int = 512


# Rows at one node with many children: large tiles of a product, each weight row read less often.
WIDE = LinearSettings(group=128, fillers=264, left=0.3, leaves=False)
# Else smaller ones, in fewer registers: more programs wait for memory at once.
FINE = LinearSettings(group=16, slots=32, chains=2, fillers=66, left=0.7, stages=5)
# Many children of few rows, and few children of many rows.
LONG = LinearSettings(group=32, chains=2, left=0.4)
NARROW = LinearSettings(slots=16, depth=64, fillers=16)
DEFAULT_SELECT = SelectSettings()


@dataclass(frozen=True)
class Trie:
    """The trie's tables and the rows' nodes, as the kernels read them."""

    row_ptrs: Tensor
    edges: Tensor
    cur_node: Tensor

    @classmethod
    def of(cls, row_ptrs: Tensor, stacked_cols_vals: Tensor, cur_node: Tensor) -> Trie:
        """Tables with a unit stride, which they ordinarily have."""
        edges = stacked_cols_vals
        if edges.stride(1) != 1:
            edges = edges.contiguous()
        return cls(row_ptrs.contiguous(), edges, cur_node.contiguous())

    @property
    def num_nodes(self) -> int:
        """Entries of ``row_ptrs``."""
        return self.row_ptrs.shape[0]


def settings_for(num_rows: int, max_branches: int, row_bytes: int) -> LinearSettings:
    """Tile shapes by what is known without asking the device where rows stand.

    ``row_bytes`` are a weight row's.
    """
    if max_branches >= 512:
        return WIDE if max_branches >= 1024 and num_rows * max_branches >= 1 << 20 else LONG
    together = num_rows * max_branches * row_bytes > FINE.few_bytes
    return NARROW if max_branches <= NARROW.slots and together else FINE


def transition_fits(logits: Tensor) -> bool:
    """Whether the kernels take these logits."""
    return logits.dtype in KERNEL_DTYPES


def linear_fits(a: Tensor, b: Tensor, bias: Tensor | None) -> bool:
    """Whether the kernels take this layer."""
    return all(t is None or t.dtype in KERNEL_DTYPES for t in (a, b, bias)) and a.shape[1] > 0


def choice_fits(max_branches: int, k: int, temperature: Tensor | None, rows: int) -> bool:
    """Whether the kernels choose ``k`` of so many branches."""
    one_a_row = (
        temperature is None or temperature.numel() == 1 or tuple(temperature.shape) == (rows, 1)
    )
    return k <= MAX_K and max_branches <= MAX_BRANCHES and one_a_row


def launch_transition(
    logits: Tensor,
    row_ptrs: Tensor,
    stacked_cols_vals: Tensor,
    cur_node: Tensor,
    max_branches: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """One launch: children, and rows masked to them."""
    trie = Trie.of(row_ptrs, stacked_cols_vals, cur_node)
    next_node, valid_idxs = _ids(logits, max_branches)
    corrected = logits.new_empty(tuple(logits.shape))
    num_rows, width = corrected.shape
    block = min(4096, max(128, triton.next_power_of_2(width)))
    # Rows are split until programs fill the device; every part looks at all children of its row.
    parts = min(triton.cdiv(width, block), max(1, triton.cdiv(2048, num_rows)), _MAX_PARTS)
    span = triton.cdiv(triton.cdiv(width, parts), block) * block
    with on_device(corrected.device):
        kernels.spread_kernel[(num_rows, triton.cdiv(width, span))](
            logits,
            corrected,
            next_node,
            valid_idxs,
            trie.row_ptrs,
            trie.edges,
            trie.cur_node,
            trie.num_nodes,
            trie.edges.stride(0),
            logits.stride(0),
            logits.stride(1),
            width,
            max_branches,
            span,
            BLOCK=block,
            BLOCK_M=min(512, max(16, triton.next_power_of_2(max_branches))),
            num_warps=4,
        )
    return next_node, valid_idxs, corrected


def launch_linear(
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    row_ptrs: Tensor,
    stacked_cols_vals: Tensor,
    cur_node: Tensor,
    max_branches: int,
    settings: LinearSettings | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Child logits while rows (B, V) are filled, then children put in their places."""
    trie = Trie.of(row_ptrs, stacked_cols_vals, cur_node)
    settings = settings or settings_for(a.shape[0], max_branches, _row_bytes(b))
    if _whole_product(max_branches, b, settings):
        dense = product(a, b, bias)
        return launch_transition(dense, row_ptrs, stacked_cols_vals, cur_node, max_branches)
    spread = a.new_empty((a.shape[0], b.shape[1]), dtype=torch.float32)
    next_node, valid_idxs, logits = _project(a, b, bias, trie, max_branches, settings, spread)
    block = min(1024, max(16, triton.next_power_of_2(max_branches)))
    together = max(1, 1024 // block)
    for begin, rows in _grid_rows(a.shape[0]):
        with on_device(a.device):
            kernels.place_kernel[(triton.cdiv(max_branches, block), triton.cdiv(rows, together))](
                logits[begin:],
                spread[begin:],
                trie.row_ptrs,
                trie.edges,
                trie.cur_node[begin:],
                rows,
                trie.num_nodes,
                b.shape[1],
                max_branches,
                ROWS=together,
                BLOCK_M=block,
                num_warps=4,
            )
    return next_node, valid_idxs, spread


def launch_choice(
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    trie: Trie,
    max_branches: int,
    k: int,
    temperature: Tensor | None,
    seed: Tensor | None = None,
    settings: LinearSettings | None = None,
    select: SelectSettings = DEFAULT_SELECT,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The k best children, or k draws where there is a seed; nothing of the size (B, V)."""
    next_node, valid_idxs, logits = child_logits(a, b, bias, trie, max_branches, settings)
    chosen = _choose(logits, next_node, valid_idxs, k, temperature, seed, select)
    return next_node, valid_idxs, *chosen


def child_logits(
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    trie: Trie,
    max_branches: int,
    settings: LinearSettings | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Child nodes, tokens int64 and logits float32, all (B, M); -1 and -inf in empty slots."""
    settings = settings or settings_for(a.shape[0], max_branches, _row_bytes(b))
    if not _whole_product(max_branches, b, settings):
        return _project(a, b, bias, trie, max_branches, settings)
    num_rows = a.shape[0]
    next_node, valid_idxs = _ids(a, max_branches)
    logits = a.new_empty((num_rows, max_branches), dtype=torch.float32)
    dense = product(a, b, bias)
    block = min(1024, triton.next_power_of_2(max_branches))
    with on_device(a.device):
        kernels.pick_kernel[(num_rows, triton.cdiv(max_branches, block))](
            dense,
            logits,
            next_node,
            valid_idxs,
            trie.row_ptrs,
            trie.edges,
            trie.cur_node,
            trie.num_nodes,
            trie.edges.stride(0),
            dense.stride(0),
            max_branches,
            BLOCK_M=block,
        )
    return next_node, valid_idxs, logits


def _whole_product(max_branches: int, b: Tensor, settings: LinearSettings) -> bool:
    return max_branches >= settings.product_share * b.shape[1]


def _project(
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    trie: Trie,
    max_branches: int,
    settings: LinearSettings,
    fill: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Children and their logits; ``fill`` (B, V), where given, is filled with -inf."""
    num_rows, hidden = a.shape
    next_node, valid_idxs = _ids(a, max_branches)
    logits = a.new_empty((num_rows, max_branches), dtype=torch.float32)
    wide = torch.float32 in (a.dtype, b.dtype) or a.dtype != b.dtype
    slots = min(settings.slots, max(16, triton.next_power_of_2(max_branches)))
    groups = triton.cdiv(num_rows, settings.group)
    parts = max(triton.cdiv(settings.programs, groups), triton.cdiv(max_branches, slots))
    parts = max(parts, min(settings.parts, triton.cdiv(4 * settings.programs, groups)))
    # More than there are rows to list or runs of pairs have nothing to do.
    useful = max(settings.group, triton.cdiv(settings.group * max_branches, settings.pairs))
    parts = max(settings.group // settings.few, min(parts, useful, settings.programs))
    fillers, ahead = (0, 0) if fill is None else (settings.fillers, _ahead(fill, settings))
    # Of few groups what is multiplied starts first; of many the hidden states stay in the cache.
    tiles_first = 4 * groups <= settings.programs
    gathered = num_rows * max_branches * _row_bytes(b)
    with on_device(a.device):
        kernels.project_kernel[(fillers + parts * groups,)](
            a,
            b,
            b if bias is None else bias,
            logits,
            next_node,
            valid_idxs,
            logits if fill is None else fill,
            trie.row_ptrs,
            trie.edges,
            trie.cur_node,
            num_rows,
            parts,
            groups if tiles_first else 1,
            1 if tiles_first else parts,
            fillers,
            ahead,
            int(gathered > settings.few_bytes),
            trie.num_nodes,
            trie.edges.stride(0),
            a.stride(0),
            a.stride(1),
            b.stride(1),
            b.stride(0),
            max_branches,
            b.shape[1],
            HIDDEN=hidden,
            HAS_BIAS=bias is not None,
            FILL=fill is not None,
            GROUP=settings.group,
            FEW=settings.few,
            BLOCK_M=slots,
            BLOCK_K=settings.depth * (1 if wide else 2),
            CHAINS=settings.chains,
            PAIRS=settings.pairs,
            AHEAD=settings.ahead,
            BLOCK_H=min(
                settings.pairs_hidden // (2 if wide else 1), triton.next_power_of_2(hidden)
            ),
            BLOCK_IDS=min(256, max(16, triton.next_power_of_2(max_branches))),
            BLOCK_SHARED=settings.listed,
            BLOCK_FILL=settings.fill,
            LEAVES=settings.leaves,
            num_warps=settings.warps,
            num_stages=settings.stages,
            maxnreg=settings.registers,
        )
    return next_node, valid_idxs, logits


def _row_bytes(b: Tensor) -> int:
    return b.shape[0] * b.element_size()


def _ahead(fill: Tensor, settings: LinearSettings) -> int:
    """Blocks that programs fill which do nothing else."""
    return int(fill.numel() // settings.fill * (1 - settings.left))


def _grid_rows(num_rows: int) -> Iterator[tuple[int, int]]:
    """Runs of rows, (first, number), that a grid's second dimension can hold."""
    for begin in range(0, num_rows, _MAX_PARTS):
        yield begin, min(_MAX_PARTS, num_rows - begin)


def product(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """``a @ b + bias`` in float32 (B, V), inputs of 16 bits multiplied as they are."""
    out = a.new_empty((a.shape[0], b.shape[1]), dtype=torch.float32)
    wide = torch.float32 in (a.dtype, b.dtype) or a.dtype != b.dtype
    block = 64 if a.shape[0] <= 64 else 128
    with on_device(a.device):
        kernels.product_kernel[(triton.cdiv(a.shape[0], block), triton.cdiv(b.shape[1], block))](
            a,
            b,
            b if bias is None else bias,
            out,
            a.shape[0],
            b.shape[1],
            a.stride(0),
            a.stride(1),
            b.stride(1),
            b.stride(0),
            HIDDEN=a.shape[1],
            HAS_BIAS=bias is not None,
            BLOCK_B=block,
            BLOCK_N=block,
            BLOCK_H=32 if wide else 64,
            num_warps=block // 16,
            num_stages=3,
        )
    return out


def _ids(like: Tensor, max_branches: int) -> tuple[Tensor, Tensor]:
    shape = (like.shape[0], max_branches)
    return like.new_empty(shape, dtype=torch.long), like.new_empty(shape, dtype=torch.long)


def _choose(
    logits: Tensor,
    next_node: Tensor,
    valid_idxs: Tensor,
    k: int,
    temperature: Tensor | None,
    seed: Tensor | None,
    settings: SelectSettings,
) -> Choices:
    num_rows, max_branches = logits.shape
    shape = (num_rows, k)
    outputs = (
        logits.new_empty(shape),
        logits.new_empty(shape, dtype=torch.long),
        logits.new_empty(shape, dtype=torch.long),
        logits.new_empty(shape),
    )
    heated = temperature is not None
    # What is not read may be any pointer: temperatures where there are none, the best form's seed.
    temperature = logits if temperature is None else temperature.contiguous()
    stride = 0 if temperature.numel() == 1 else 1
    noise = valid_idxs if seed is None else seed
    width = triton.next_power_of_2(k)
    block = max(width, min(settings.block, triton.next_power_of_2(max_branches)), 16)
    a_warp = settings.warp if k == 1 else settings.warp_of_more
    form: dict[str, Any] = {
        "HEATED": heated, "DRAW": seed is not None, "K": width,
        "num_warps": _warps(block, a_warp),
    }  # fmt: skip
    inputs = (logits, next_node, valid_idxs, temperature)
    with on_device(logits.device):
        if max_branches <= block:
            kept = valid_idxs.new_empty((num_rows, 2 * width))
            selection.select_kernel[(num_rows,)](
                *inputs, noise, *outputs, kept, max_branches, k, stride, BLOCK=block, **form
            )
            return outputs
        stats = logits.new_empty((num_rows, 2))
        selection.stats_kernel[(num_rows,)](
            logits, temperature, stats, max_branches, stride, HEATED=heated, BLOCK=2048, num_warps=8
        )
        block = max(settings.block, 4 * width)
        parts = triton.cdiv(max_branches, block)
        keys = valid_idxs.new_empty((num_rows, parts, width))
        selection.part_kernel[(num_rows, parts)](
            logits, valid_idxs, temperature, noise, stats, keys, max_branches, stride,
            BLOCK=block, **form
        )  # fmt: skip
        while parts > 1:
            count = parts * width
            merged = min(block, triton.next_power_of_2(count))
            parts = triton.cdiv(count, merged)
            best = keys.new_empty((num_rows, parts, width))
            selection.merge_kernel[(num_rows, parts)](
                keys, best, count, K=width, BLOCK=merged, num_warps=_warps(merged, a_warp)
            )
            keys = best
        selection.emit_kernel[(num_rows,)](
            keys, stats, *inputs, *outputs, max_branches, k, stride, HEATED=heated, K=width
        )
    return outputs


def _warps(block: int, a_warp: int) -> int:
    return max(1, min(8, block // a_warp))
