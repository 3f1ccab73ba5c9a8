"""Tile shapes and launches of the beam-step kernels.

Nothing here is public. The functions have the arguments of ``rectokens.ops.beam_step`` after its
checks, and do nothing on the host that waits for the device. All that launches depend on is fixed
by the buffers' shapes; what a batch or a catalog changes is read on the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rectokens.decoding.device_beams import BeamBuffers
from rectokens.decoding.device_requests import RequestTables
from rectokens.decoding.device_tables import LevelShape, TrieTable
from rectokens.kernels import beam_ends_triton as ends
from rectokens.kernels import beam_select_triton as select
from rectokens.kernels import beam_triton as kernels
from rectokens.kernels.compile_ahead import launcher
from rectokens.kernels.launch_device import on_device
from rectokens.kernels.optional_triton import triton


@dataclass(frozen=True)
class StepSettings:
    """How a step is cut up.

    Attributes:
        whole: children of a row that one tile holds at most; from there on rows are cut.
        tile: pairs of a tile, rows times children, roughly.
        warp: pairs of a tile that a warp takes.
        programs: programs that fill the device twice over; fewer rows a tile where needed.
        waves: times ``programs`` that share cut rows, at most.
        part: children of a cut row that a program looks at first, at least.
        most_parts: programs that look at one, at most; a power of two.
        part_warp: children of a part that a warp takes.
        direct: pairs of a request up to which all of them are ranked, without a short list.
        pairs_a_copy: pairs of a request for which it gets another copy of its histogram.
        copies: copies of a histogram, at most.
        own: keys a program ranks.
        share: keys a program of the selection reads at a time.
        readers: programs a request that read its list, at most.
        room_factor: length of the short list over the beam width.
        early: launch kernels while the one before still runs (from Hopper on).
    """

    whole: int = 1024
    tile: int = 1024
    warp: int = 128
    programs: int = 264
    waves: int = 2
    part: int = 256
    most_parts: int = 16
    part_warp: int = 64
    direct: int = 2048
    pairs_a_copy: int = 1 << 15
    copies: int = 16
    own: int = 16
    share: int = 1024
    readers: int = 132
    room_factor: int = 2
    early: bool = False


DEFAULT = StepSettings()


def begin(buffers: BeamBuffers, requests: RequestTables, settings: StepSettings = DEFAULT) -> None:
    """As ``begin_search_``."""
    scratch = _scratch_of(buffers, settings)
    with on_device(buffers.device):
        launcher(ends.begin_kernel, (buffers.batch,))(
            buffers.poisoned, scratch.counters, scratch.histogram, requests.prefixes,
            requests.exclusions, requests.exclusion_start, requests.exclusion_end,
            requests.exclusion_counts, buffers.batch, scratch.histogram.stride(0),
            LEVELS=buffers.shapes.num_levels, COUNTERS_=kernels.COUNTERS, BLOCK=1024,
            num_warps=4)  # fmt: skip


def step(
    table: TrieTable,
    buffers: BeamBuffers,
    requests: RequestTables,
    depth: int,
    logits: Tensor,
    compact: bool,
    vocab_log_norm: Tensor | None,
    level_log_norm: Tensor | None,
    settings: StepSettings = DEFAULT,
) -> None:
    """As ``beam_step_``."""
    scratch = _scratch_of(buffers, settings)
    shapes = buffers.shapes
    level = shapes.levels[depth]
    direct = level.pairs <= settings.direct
    copies = _copies(level, settings)
    batch, counters = buffers.batch, scratch.counters[depth]
    sizes = {"COUNTERS_": kernels.COUNTERS, "BINS_": kernels.BINS}
    early = _early(buffers.device, settings)
    capacity, row = scratch.keys.shape[1], scratch.histogram.stride(0)
    room = capacity if direct else scratch.candidates.shape[1]
    with on_device(buffers.device):
        _score(table, buffers, requests, depth, logits, compact, vocab_log_norm, level_log_norm,
               scratch, settings, copies=0 if direct else copies)  # fmt: skip
        if not direct:
            readers = min(triton.cdiv(level.pairs, settings.share), settings.readers)
            launcher(select.pick_kernel, (readers + 1, batch))(
                scratch.keys, counters, scratch.histogram, requests.beam_width, scratch.candidates,
                capacity, room, copies, row, **sizes, BLOCK=settings.share, **early,
                num_warps=8)  # fmt: skip
        deeper = depth + 1
        longest = max(min(room, level.pairs), shapes.width)
        launcher(select.rank_kernel, (triton.cdiv(longest, settings.own), batch))(
            table.entries, scratch.keys if direct else scratch.candidates, counters,
            scratch.histogram, logits, scratch.rows, requests.beam_width, requests.temperature,
            buffers.nodes[depth], buffers.scores[depth], buffers.log_probs[depth],
            buffers.ancestors[depth], buffers.nodes[deeper], buffers.parents[deeper],
            buffers.codes[deeper], buffers.scores[deeper], buffers.code_scores[deeper],
            buffers.log_probs[deeper], buffers.perturbed[deeper], buffers.ancestors[deeper],
            buffers.alive[deeper], logits.stride(0), logits.stride(1), room, shapes.width, depth,
            copies, row, COMPACT=compact, DIRECT=direct, LEVELS=shapes.num_levels, **sizes,
            OWN=settings.own, BLOCK=256, **early, num_warps=4)  # fmt: skip


def child_logits(
    table: TrieTable,
    buffers: BeamBuffers,
    depth: int,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    factor: float,
    softcap: float | None,
) -> Tensor:
    """As ``rectokens.ops.beam_step.child_logits``."""
    shapes = buffers.shapes
    slots = shapes.levels[depth].max_children
    out = torch.empty(
        (buffers.batch, shapes.width, slots), dtype=torch.float32, device=hidden.device
    )
    block = min(512, triton.next_power_of_2(weight.shape[1]))
    with on_device(hidden.device):
        launcher(ends.child_logits_kernel, (shapes.width, buffers.batch))(
            table.entries, buffers.nodes[depth], buffers.scores[depth], hidden, weight,
            weight if bias is None else bias, out, hidden.stride(0), hidden.stride(1),
            weight.stride(0), shapes.width, weight.shape[1], float(factor), float(softcap or 1.0),
            SLOTS=slots, HAS_BIAS=bias is not None, HAS_SOFTCAP=softcap is not None,
            BLOCK_M=min(4, slots), BLOCK_H=block, num_warps=4)  # fmt: skip
    return out


def finish(table: TrieTable, buffers: BeamBuffers, requests: RequestTables) -> None:
    """As ``finish_search_``."""
    shapes = buffers.shapes
    levels, width = shapes.num_levels, shapes.width
    block = min(triton.next_power_of_2(width), 1024)
    with on_device(buffers.device):
        launcher(ends.finish_kernel, (1 + triton.cdiv(width, block), buffers.batch))(
            table.entries, buffers.nodes[levels], buffers.scores[levels], buffers.ancestors[levels],
            buffers.codes, buffers.code_scores, buffers.poisoned, buffers.alive[levels],
            requests.prefixes, requests.allow_list, requests.exclusions, requests.exclusion_start,
            requests.exclusion_end, requests.exclusion_counts, buffers.answers, buffers.batch,
            width, buffers.answers.shape[1], LEVELS=levels, BLOCK=block, num_warps=8)  # fmt: skip


@dataclass(frozen=True)
class _Scratch:
    """What steps leave to the kernels after them.

    Attributes:
        keys: int64 (B, pairs), the list of all pairs; a level uses the first part.
        histogram: int32 (B, copies, BINS); zero between steps.
        counters: int32 (L, B, COUNTERS), zero at the start of a search.
        rows: float32 (B, W, 4), normalisers of the rows.
        parts: float32 (at most, 8), what programs that share a row found in their parts.
        candidates: int64 (B, room), the short list.
    """

    keys: Tensor
    histogram: Tensor
    counters: Tensor
    rows: Tensor
    parts: Tensor
    candidates: Tensor


def _scratch_of(buffers: BeamBuffers, settings: StepSettings) -> _Scratch:
    """The buffers' scratch, made once: captured graphs hold its addresses."""
    if not isinstance(buffers.scratch, _Scratch):
        shapes, batch, device = buffers.shapes, buffers.batch, buffers.device
        pairs = max(level.pairs for level in shapes.levels)
        room = triton.next_power_of_2(settings.room_factor * shapes.width + 512)
        buffers.scratch = _Scratch(
            keys=torch.empty((batch, pairs), dtype=torch.long, device=device),
            histogram=torch.zeros(
                (batch, max(_copies(level, settings) for level in shapes.levels), kernels.BINS),
                dtype=torch.int32,
                device=device,
            ),
            counters=torch.zeros(
                (shapes.num_levels, batch, kernels.COUNTERS), dtype=torch.int32, device=device
            ),
            rows=torch.empty((batch, shapes.width, 4), dtype=torch.float32, device=device),
            parts=torch.empty(
                (max(batch * shapes.width, settings.programs * settings.waves), 8),
                dtype=torch.float32,
                device=device,
            ),
            candidates=torch.empty((batch, room), dtype=torch.long, device=device),
        )
    return buffers.scratch


def _score(
    table: TrieTable,
    buffers: BeamBuffers,
    requests: RequestTables,
    depth: int,
    logits: Tensor,
    compact: bool,
    vocab_log_norm: Tensor | None,
    level_log_norm: Tensor | None,
    scratch: _Scratch,
    settings: StepSettings,
    *,
    copies: int,
) -> None:
    shapes, batch = buffers.shapes, buffers.batch
    level = shapes.levels[depth]
    rows_in = logits.shape[1]
    early = _early(buffers.device, settings)
    forms = {"BELOW": shapes.num_levels - depth - 1, "COMPACT": compact,
             "HAS_LEVEL": level_log_norm is not None}  # fmt: skip
    norms = [
        scratch.rows if norm is None else norm.float().contiguous()
        for norm in (vocab_log_norm, level_log_norm)
    ]
    asked = (
        requests.beam_width, requests.normalization, requests.temperature, requests.seed,
        requests.prefixes, requests.allow_list, requests.exclusions, requests.exclusion_start,
        requests.exclusion_end, requests.exclusion_counts,
    )  # fmt: skip
    sizes = (logits.stride(0), logits.stride(1), rows_in, shapes.width, shapes.codebook_size)
    parts, rows, tiles = 0, 1, 1
    if level.max_children <= settings.whole:
        rows, block = _tile(level, rows_in * batch, settings)
    else:
        parts = _parts(level, rows_in * batch, settings)
        block = _cut(level, rows_in * batch, settings)
        # As many programs a row as fill the device, or as a row of the longest has tiles.
        tiles = triton.cdiv(settings.programs * settings.waves, rows_in * batch)
        tiles = min(tiles, triton.cdiv(level.max_children, block))
        stats_block = min(max(_children_a_part(level, parts), 128), 4096)
        launcher(kernels.stats_kernel, (rows_in, parts, batch))(
            table.entries, buffers.nodes[depth], buffers.scores[depth], logits, *asked,
            buffers.poisoned, scratch.parts, *sizes, **forms, PARTS=parts, BLOCK=stats_block,
            **early, num_warps=max(1, min(16, stats_block // settings.part_warp)))  # fmt: skip
    launcher(kernels.score_kernel, (triton.cdiv(rows_in, rows), tiles, batch))(
        table.entries, buffers.nodes[depth], buffers.scores[depth], buffers.log_probs[depth],
        buffers.perturbed[depth], logits, *norms, *asked, buffers.poisoned, scratch.parts,
        scratch.rows, scratch.keys, scratch.counters[depth], scratch.histogram, *sizes,
        scratch.keys.shape[1], max(copies, 1), scratch.histogram.stride(0), **forms,
        HAS_VOCAB=vocab_log_norm is not None, PARTS=parts, COUNT=copies > 0, ROWS=rows, BLOCK=block,
        LEVEL_BLOCK=max(1024 // rows, 16), COUNTERS_=kernels.COUNTERS, BINS_=kernels.BINS, **early,
        num_warps=max(1, min(8, rows * block // settings.warp)))  # fmt: skip


def _parts(level: LevelShape, rows: int, settings: StepSettings) -> int:
    """Programs that look at a long row, so that all rows together fill the device."""
    wanted = max(settings.programs * settings.waves // rows, 1)
    parts = min(1 << (wanted.bit_length() - 1), settings.most_parts)
    return min(parts, int(triton.next_power_of_2(triton.cdiv(level.max_children, settings.part))))


def _children_a_part(level: LevelShape, parts: int) -> int:
    return int(triton.next_power_of_2(max(int(level.typical_children) // parts, 1)))


def _cut(level: LevelShape, rows: int, settings: StepSettings) -> int:
    """Children of a tile of a long row."""
    share = level.max_children * rows // settings.programs
    most = _children_a_part(level, 1)
    return min(max(int(triton.next_power_of_2(max(share, 1))), 128), max(most, 128), settings.tile)


def _early(device: torch.device, settings: StepSettings) -> dict[str, bool]:
    """Launch a kernel while the one before still runs, and waits for it; from Hopper on."""
    if not settings.early or device.type != "cuda":
        return {"EARLY": False}
    if torch.cuda.get_device_capability(device) < (9, 0):
        return {"EARLY": False}
    return {"EARLY": True, "launch_pdl": True}


def _copies(level: LevelShape, settings: StepSettings) -> int:
    wanted = triton.next_power_of_2(max(level.pairs // settings.pairs_a_copy, 1))
    return min(int(wanted), settings.copies)


def _tile(level: LevelShape, rows: int, settings: StepSettings) -> tuple[int, int]:
    """Rows and children of a tile that holds rows whole."""
    most = max(settings.tile // level.max_children, 1)
    few = triton.next_power_of_2(max(rows // settings.programs, 1))
    return min(most, few), level.max_children
