"""The search on static buffers in plain PyTorch: what the kernels are checked against."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from rectokens.decoding.beam_step import Beams, StepOptions, beam_step
from rectokens.decoding.device_beams import BeamBuffers, unpack_answers
from rectokens.decoding.device_requests import RequestTables
from rectokens.decoding.device_tables import TrieTable
from rectokens.decoding.filters import BatchFilters
from rectokens.schemas.catalog_trie import CatalogTrie
from rectokens.schemas.search import NORMALIZATIONS, SearchRequest

_VOCAB, _LEVEL = NORMALIZATIONS.index("vocab"), NORMALIZATIONS.index("level")


def begin(buffers: BeamBuffers, requests: RequestTables) -> None:
    """As ``rectokens.ops.beam_step.begin_search_``; the requests need no preparation here."""
    buffers.poisoned.zero_()


def step(
    table: TrieTable,
    buffers: BeamBuffers,
    requests: RequestTables,
    depth: int,
    logits: Tensor,
    compact: bool,
    vocab_log_norm: Tensor | None,
    level_log_norm: Tensor | None,
) -> None:
    """As ``rectokens.ops.beam_step.beam_step_``."""
    width = logits.shape[1]
    beams = buffers.at(depth).narrow(width)
    batch = requests.requests
    asked = requests.beam_width > 0
    kind = requests.normalization
    nan = torch.full_like(beams.scores, torch.nan)
    vocab = nan if vocab_log_norm is None else vocab_log_norm.float()
    if level_log_norm is None:
        level_log_norm = nan if compact else logits.float().logsumexp(-1)
    # Both given norms go in by the one door that the definition has for them.
    given = torch.where((kind == _LEVEL)[:, None], level_log_norm.float(), vocab)
    options = StepOptions(
        beam_width=requests.beam_width.long(),
        normalization=torch.where(kind == _LEVEL, _VOCAB, kind).long(),
        temperature=requests.temperature,
        seed=requests.seed,
    )
    dead = torch.where(asked[:, None], beams.scores, -torch.inf)
    beams = Beams(beams.nodes, dead, beams.log_probs, beams.perturbed, beams.poisoned)
    if compact:
        logits = _spread(table.trie, beams, logits, buffers.shapes.codebook_size)
    taken = beam_step(
        table.trie, depth, beams, logits, options, _filters(table, requests, batch), given
    )
    deeper = depth + 1
    found = taken.codes.shape[1]
    for target, value, fill in (
        (buffers.nodes, taken.beams.nodes, 0),
        (buffers.parents, taken.parents, 0),
        (buffers.codes, taken.codes, 0),
        (buffers.scores, taken.beams.scores, -torch.inf),
        (buffers.code_scores, taken.code_scores, -torch.inf),
        (buffers.log_probs, taken.beams.log_probs, -torch.inf),
        (buffers.perturbed, taken.beams.perturbed, -torch.inf),
    ):
        target[deeper].fill_(fill)
        target[deeper, :, :found] = value.to(target.dtype)
    buffers.alive[deeper] = taken.alive.int()
    buffers.poisoned.copy_(taken.beams.poisoned.int())
    levels = buffers.shapes.num_levels
    index = buffers.parents[deeper].long()[..., None].expand(-1, -1, levels)
    buffers.ancestors[deeper] = buffers.ancestors[depth].gather(1, index)
    slots = torch.arange(buffers.shapes.width, dtype=torch.int32, device=buffers.device)
    buffers.ancestors[deeper, :, :, depth] = slots
    live = torch.isfinite(buffers.scores[deeper])
    buffers.ancestors[deeper].mul_(live[..., None])


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
    """As ``rectokens.ops.beam_step.child_logits``, a request at a time."""
    trie = table.trie
    codes, there = _children(
        trie,
        buffers.nodes[depth].long(),
        torch.isfinite(buffers.scores[depth]),
        buffers.shapes.levels[depth].max_children,
    )
    out = torch.full(codes.shape, -torch.inf, dtype=torch.float32, device=hidden.device)
    for row in range(codes.shape[0]):
        # In float32, by products as batched as they get without holding (W, M, H).
        for slot in range(codes.shape[2]):
            beams = there[row, :, slot].nonzero().squeeze(1)
            if not beams.numel():
                break
            code = codes[row, beams, slot]
            value = (hidden[row, beams].float() * weight[code].float()).sum(-1)
            if bias is not None:
                value = value + bias[code].float()
            value = value * factor
            if softcap is not None:
                value = torch.tanh(value / softcap) * softcap
            out[row, beams, slot] = value
    return out


def finish(table: TrieTable, buffers: BeamBuffers, requests: RequestTables) -> None:
    """As ``rectokens.ops.beam_step.finish_search_``."""
    trie, shapes = table.trie, buffers.shapes
    levels = shapes.num_levels
    answers = unpack_answers(buffers.answers, shapes)
    buffers.answers.zero_()
    answers.items.fill_(-1)
    answers.alive.copy_(buffers.alive[levels])
    answers.poisoned.copy_(buffers.poisoned)
    answers.scores.copy_(buffers.scores[levels])
    path = buffers.ancestors[levels].long()
    live = torch.isfinite(buffers.scores[levels])
    for level in range(levels):
        slots = path[:, :, level]
        code = buffers.codes[level + 1].gather(1, slots)
        score = buffers.code_scores[level + 1].gather(1, slots)
        answers.codes[:, :, level] = torch.where(live, code, 0)
        answers.code_scores[:, :, level] = torch.where(live, score, -torch.inf)

    lo, hi = trie.item_range(
        torch.where(live, buffers.nodes[levels].long(), trie.level_offsets[-2]), levels
    )
    width = shapes.width
    rows = live.flatten().nonzero().squeeze(1)
    first, counts = lo.flatten()[rows], (hi - lo).flatten()[rows]
    source = torch.repeat_interleave(torch.arange(rows.numel(), device=rows.device), counts)
    items = torch.arange(source.numel(), device=rows.device)
    items = items - (counts.cumsum(0) - counts)[source] + first[source]
    owner = rows[source]
    filters = _filters(table, requests, requests.requests)
    allowed = filters.items_left(owner // width, items, items + 1) > 0
    items, owner = items[allowed], owner[allowed]
    request, slot = owner // width, owner % width
    found = torch.bincount(request, minlength=buffers.batch)
    rank = torch.arange(items.numel(), device=rows.device)
    rank = rank - (found.cumsum(0) - found)[request]
    kept = rank < width
    place = (request[kept], rank[kept])
    answers.items[place] = items[kept].int()
    answers.leaves[place] = slot[kept].int()
    answers.item_count.copy_(found.clamp(max=width).int())


def _filters(
    table: TrieTable, requests: RequestTables, batch: tuple[SearchRequest, ...]
) -> BatchFilters:
    """Filters of the batch; rows without a request have none."""
    free = SearchRequest((0,), 1, 1)
    padded = [_together(request) for request in batch]
    padded += [free] * (requests.batch - len(batch))
    return BatchFilters.from_requests(padded, table.trie.num_items, table.device)


def _together(request: SearchRequest) -> SearchRequest:
    """The same request with its lists where its constraint set is."""
    if request.allowed_prefix is None:
        return request
    device = request.allowed_prefix.device
    excluded, allowed = (
        None if items is None else items.to(device)
        for items in (request.excluded_items, request.allowed_items)
    )
    return replace(request, excluded_items=excluded, allowed_items=allowed)


def _children(trie: CatalogTrie, nodes: Tensor, live: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """Codes of each node's children (..., M) and which of them there are."""
    first = trie.row_ptrs[nodes].long()[..., None]
    end = trie.row_ptrs[nodes + 1].long()[..., None]
    edges = first + torch.arange(slots, device=nodes.device)
    there = (edges < end) & live[..., None]
    return trie.edge_codes(torch.where(there, edges, 0)), there


def _spread(trie: CatalogTrie, beams: Beams, logits: Tensor, codebook_size: int) -> Tensor:
    """Logits by code (B, W, K) from logits by child (B, W, M)."""
    codes, there = _children(trie, beams.nodes, torch.isfinite(beams.scores), logits.shape[-1])
    shape = (*logits.shape[:2], codebook_size + 1)
    dense = torch.full(shape, -torch.inf, dtype=torch.float32, device=logits.device)
    dense.scatter_(2, torch.where(there, codes, codebook_size), logits.float())
    return dense[..., :codebook_size]
