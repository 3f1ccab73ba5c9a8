"""Random catalog searches, and the definition's answer to them, for every implementation."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rectokens.decoding.beam_step import Beams, BeamStep, StepOptions, beam_step
from rectokens.decoding.device_beams import BeamBuffers, unpack_answers
from rectokens.decoding.device_requests import RequestTables
from rectokens.decoding.device_tables import StepShapes, TrieTable
from rectokens.decoding.filters import BatchFilters
from rectokens.ops.beam_step import beam_step_, begin_search_, child_logits, finish_search_
from rectokens.schemas.catalog_trie import CatalogTrie
from rectokens.schemas.search import NORMALIZATIONS, SearchRequest

TRIES = ("random", "skewed", "chains", "one item", "all children", "collisions")
CLOSE = 1e-4


def random_trie(kind: str, levels: int, codes: int, g: torch.Generator) -> CatalogTrie:
    if kind == "one item":
        ids = torch.randint(codes, (1, levels), generator=g)
    elif kind == "chains":
        ids = torch.arange(codes)[:, None].repeat(1, levels)
    elif kind == "all children":
        ids = torch.cartesian_prod(*[torch.arange(codes)] * min(levels, 2))
        ids = torch.cat([ids.view(len(ids), -1), ids.new_zeros(len(ids), max(levels - 2, 0))], 1)
    else:
        ids = torch.randint(codes, (4 * codes, levels), generator=g)
        if kind == "skewed":
            ids[: 3 * codes, 0] = codes - 1
            ids[: 2 * codes, 1:2] = codes // 2
        if kind == "collisions":
            ids = ids[torch.randint(codes, (4 * codes,), generator=g)]
    return CatalogTrie.from_codes(ids, codes)[0]


def random_requests(
    batch: int, width: int, num_items: int, g: torch.Generator, *, filtered: float = 0.5
) -> list[SearchRequest]:
    def chance(p: float) -> bool:
        return float(torch.rand((), generator=g)) < p

    shared = prefix_of(torch.rand(num_items, generator=g) < 0.5)
    requests = []
    for row in range(batch):
        prefix = excluded = listed = None
        if chance(filtered):
            own = prefix_of(torch.rand(num_items, generator=g) < 0.3)
            prefix = shared if chance(0.5) else own
        if chance(filtered):
            excluded = (torch.rand(num_items, generator=g) < 0.4).nonzero().squeeze(1)
        if chance(filtered / 2):
            listed = (torch.rand(num_items, generator=g) < 0.6).nonzero().squeeze(1)
        beam = width if row == 0 else int(torch.randint(1, width + 1, (), generator=g))
        requests.append(
            SearchRequest(
                (0,),
                beam,
                1,
                temperature=float(torch.rand((), generator=g)) + 0.3 if chance(0.4) else 0.0,
                seed=int(torch.randint(-(2**62), 2**62, (), generator=g)),
                normalization=NORMALIZATIONS[int(torch.randint(3, (), generator=g))],
                excluded_items=excluded,
                allowed_prefix=prefix,
                allowed_items=listed,
            )
        )
    return requests


def moved(requests: list[SearchRequest], device: str) -> list[SearchRequest]:
    """The same requests with everything on a device, for the definition."""

    def to(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(device)

    return [
        replace(r, excluded_items=to(r.excluded_items), allowed_prefix=to(r.allowed_prefix),
                allowed_items=to(r.allowed_items))
        for r in requests
    ]  # fmt: skip


def prefix_of(allowed: Tensor) -> Tensor:
    return torch.cat([torch.zeros(1, dtype=torch.int32), allowed.cumsum(0).int()])


@dataclass
class Search:
    """One batch on one device, everything static."""

    table: TrieTable
    buffers: BeamBuffers
    requests: RequestTables

    @classmethod
    def of(cls, trie, width, batch, exclusions=4096, headroom=1.25):
        shapes = StepShapes.of(trie, width, headroom)
        buffers = BeamBuffers(batch, shapes, trie.device)
        # Whatever a step should write and does not is noticed.
        for tensor in (buffers.nodes, buffers.parents, buffers.codes, buffers.ancestors):
            tensor[1:].fill_(-77)
        for tensor in (buffers.scores, buffers.code_scores, buffers.log_probs, buffers.perturbed):
            tensor[1:].fill_(torch.nan)
        buffers.alive[1:].fill_(-77)
        buffers.answers.fill_(-77)
        return cls(TrieTable(trie, shapes), buffers, RequestTables(batch, exclusions, trie.device))

    def run(self, logits, vocab_norms, *, compact=False) -> None:
        """Search with given dense logits a level: (B, W, K), norms (B, W)."""
        begin_search_(self.buffers, self.requests)
        for depth, (dense, norm) in enumerate(zip(logits, vocab_norms, strict=True)):
            level_norm = None
            if compact:
                # The identity as weight: the logits are the hidden states.
                weight = torch.eye(dense.shape[-1], device=dense.device)
                level_norm = dense.logsumexp(-1)
                dense = child_logits(self.table, self.buffers, depth, dense, weight)
            beam_step_(self.table, self.buffers, self.requests, depth, dense, compact=compact,
                       vocab_log_norm=norm, level_log_norm=level_norm)  # fmt: skip
        finish_search_(self.table, self.buffers, self.requests)


def random_logits(trie, batch, width, g, *, spread=2.0, ties=False):
    """Logits and vocabulary norms of every level."""
    shape = (batch, width, trie.codebook_size)
    logits = [torch.randn(shape, generator=g) * spread for _ in range(trie.num_levels)]
    if ties:
        logits = [values.round() for values in logits]
    norms = [values.logsumexp(-1) + 1.0 for values in logits]
    return logits, norms


def check_steps(search: Search, trie, requests, logits, norms) -> None:
    """Every step of a finished search is the definition's step from the beams before it."""
    batch, buffers = len(requests), search.buffers
    options = StepOptions.from_requests(requests, trie.device)
    filters = BatchFilters.from_requests(requests, trie.num_items, trie.device)
    poisoned = torch.zeros(batch, dtype=torch.bool, device=trie.device)
    for depth in range(trie.num_levels):
        before = buffers.at(depth)
        beams = Beams(before.nodes[:batch], before.scores[:batch], before.log_probs[:batch],
                      before.perturbed[:batch], poisoned)  # fmt: skip
        wanted = beam_step(
            trie, depth, beams, logits[depth][:batch], options, filters, norms[depth][:batch]
        )
        poisoned = wanted.beams.poisoned
        check_step(buffers, depth + 1, wanted, options.temperature > 0)
    assert torch.equal(buffers.poisoned[:batch] != 0, poisoned)
    assert not buffers.alive[1:, batch:].any()


def check_step(buffers: BeamBuffers, deeper: int, wanted: BeamStep, stochastic: Tensor) -> None:
    """Equal but for the order of beams whose ranking is closer than CLOSE, boundary included."""
    batch, width = wanted.codes.shape
    found = buffers.at(deeper)
    whole = {
        **{name: getattr(found, name) for name in ("nodes", "scores", "log_probs", "perturbed")},
        "codes": buffers.codes[deeper],
        "parents": buffers.parents[deeper],
        "code_scores": buffers.code_scores[deeper],
        "ancestors": buffers.ancestors[deeper],
    }
    alive = buffers.alive[deeper, :batch].cpu().long()
    assert torch.equal(alive, wanted.alive.cpu())
    mine = {name: tensor[:batch].cpu() for name, tensor in whole.items()}
    theirs = {
        **{name: getattr(wanted.beams, name).cpu() for name in ("nodes", "scores", "log_probs")},
        **{name: getattr(wanted, name).cpu() for name in ("codes", "parents", "code_scores")},
    }
    noisy = stochastic.cpu()[:, None]
    ranking = torch.where(noisy, wanted.beams.perturbed.cpu(), theirs["scores"])
    order = torch.where(noisy, mine["perturbed"], mine["scores"])
    near(order[:, :width], ranking)
    for row, live in enumerate(alive.tolist()):
        for tensor in mine.values():
            dead = tensor[row, live:]
            assert (torch.isneginf(dead) if dead.is_floating_point() else dead == 0).all()
        check_row(
            {name: tensor[row, :live] for name, tensor in mine.items()},
            {name: tensor[row, :live] for name, tensor in theirs.items()},
            order[row, :live],
            ranking[row, :live],
            bool(noisy[row]),
        )
    check_ancestors(buffers, deeper, batch)


def check_row(
    mine: dict[str, Tensor],
    theirs: dict[str, Tensor],
    order: Tensor,
    ranking: Tensor,
    noisy: bool,
) -> None:
    """The live beams of one request."""
    # Best first; equal ones by parent, then by code.
    places = mine["parents"] * (1 << 16) + mine["codes"]
    falls = order[1:] < order[:-1]
    assert (falls | ((order[1:] == order[:-1]) & (places[1:] > places[:-1]))).all()
    nodes, back = theirs["nodes"].sort()
    assert mine["nodes"].unique().numel() == mine["nodes"].numel()
    at = torch.searchsorted(nodes, mine["nodes"]).clamp(max=max(len(nodes) - 1, 0))
    met = nodes[at] == mine["nodes"]
    # What only one of the two has, was swapped with one beyond the boundary.
    assert ((order[~met] - ranking[-1:]).abs() < CLOSE).all()
    other = back[at[met]]
    assert ((ranking[other] - ranking[met]).abs() < CLOSE).all()
    assert torch.equal(mine["codes"][met].long(), theirs["codes"][other])
    assert torch.equal(mine["parents"][met].long(), theirs["parents"][other])
    for name in ("scores", "code_scores", *(["log_probs"] if noisy else [])):
        near(mine[name][met], theirs[name][other])


def check_ancestors(buffers: BeamBuffers, depth: int, batch: int) -> None:
    live = torch.isfinite(buffers.scores[depth, :batch])
    slots = torch.arange(live.shape[1], device=live.device).expand_as(live)
    for level in reversed(range(depth)):
        found = buffers.ancestors[depth, :batch, :, level]
        assert torch.equal(found, torch.where(live, slots, 0).int())
        slots = buffers.parents[level + 1, :batch].long().gather(1, slots)
    assert not buffers.ancestors[depth, ..., depth:].any()


def check_answers(search: Search, trie, requests) -> None:
    """Items are the allowed ones of the leaves, in order; codes and scores are their paths."""
    shapes, batch = search.buffers.shapes, len(requests)
    answers = unpack_answers(search.buffers.answers.cpu(), shapes)
    trie = trie.to("cpu")
    nodes = search.buffers.nodes[-1].cpu().long()
    assert torch.equal(answers.alive, search.buffers.alive[-1].cpu())
    assert torch.equal(answers.poisoned, search.buffers.poisoned.cpu())
    for row, request in enumerate(requests):
        live = int(answers.alive[row])
        leaves = nodes[row, :live] - trie.level_offsets[-2]
        assert torch.equal(answers.codes[row, :live].long(), trie.leaf_codes(leaves))
        near(answers.code_scores[row, :live].sum(1), answers.scores[row, :live])
        excluded = set() if request.excluded_items is None else set(request.excluded_items.tolist())
        prefix = None if request.allowed_prefix is None else request.allowed_prefix.cpu()
        listed = request.allowed_items
        listed = range(trie.num_items) if listed is None else set(listed.tolist())
        wanted = [
            (item, slot)
            for slot, leaf in enumerate(leaves.tolist())
            for item in range(int(trie.leaf_item_ptrs[leaf]), int(trie.leaf_item_ptrs[leaf + 1]))
            if item in listed
            and item not in excluded
            and (prefix is None or prefix[item + 1] > prefix[item])
        ][: shapes.width]
        count = int(answers.item_count[row])
        found = zip(answers.items[row].tolist(), answers.leaves[row].tolist(), strict=True)
        assert list(found)[:count] == wanted
        assert (answers.items[row, count:] == -1).all()
        assert (answers.leaves[row, count:] == 0).all()
    assert not answers.item_count[batch:].any()


def near(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=2e-5, equal_nan=True)
