"""One level of catalog beam search in plain PyTorch: the definition that kernels must match.

Given the running beams of B requests and the logits of the next level's codes, find the best
continuations of each request over **all** (beam, child) pairs, exactly.

Deterministic search keeps the candidates with the highest score, the sum of log-probabilities.
Stochastic beam search (Kool, van Hoof and Welling, "Stochastic Beams and Where to Find Them",
ICML 2019) keeps those with the highest perturbed score instead: a Gumbel value of each child,
conditioned on the largest one among siblings being the parent's. What it returns are draws
without replacement from the distribution over the allowed leaves at the request's temperature.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rectokens.decoding.filters import BatchFilters
from rectokens.ops.counter_rng import gumbel
from rectokens.schemas.catalog_trie import CatalogTrie
from rectokens.schemas.search import NORMALIZATIONS, SearchRequest

VOCAB, LEVEL, CHILDREN = (NORMALIZATIONS.index(name) for name in ("vocab", "level", "children"))


@dataclass(frozen=True, slots=True)
class StepOptions:
    """What each of the B requests asked for, as tensors (all of shape (B,)).

    Attributes:
        beam_width: int64.
        normalization: int64, position in ``NORMALIZATIONS``.
        temperature: float32, 0 for the deterministic search.
        seed: int64.
    """

    beam_width: Tensor
    normalization: Tensor
    temperature: Tensor
    seed: Tensor

    @classmethod
    def from_requests(cls, requests: Sequence[SearchRequest], device: torch.device) -> StepOptions:
        """Collect the options of a batch on ``device``."""
        return cls(
            beam_width=torch.tensor([r.beam_width for r in requests], device=device),
            normalization=torch.tensor(
                [NORMALIZATIONS.index(r.normalization) for r in requests], device=device
            ),
            temperature=torch.tensor(
                [r.temperature for r in requests], dtype=torch.float32, device=device
            ),
            seed=torch.tensor([_as_int64(r.seed) for r in requests], device=device),
        )


@dataclass(frozen=True, slots=True)
class Beams:
    """The running beams, best first within each request. Dead slots have score -inf.

    Attributes:
        nodes: int64 (B, W), trie node of each beam; 0 in dead slots.
        scores: float32 (B, W), sum of log-probabilities, no temperature.
        log_probs: float32 (B, W), log-probability under the sampling distribution (allowed
            children only, at the temperature); what the Gumbel values are centred on.
        perturbed: float32 (B, W), the Gumbel value that orders a stochastic search.
        poisoned: bool (B,), a NaN or +inf logit was met: the request has no answer.
    """

    nodes: Tensor
    scores: Tensor
    log_probs: Tensor
    perturbed: Tensor
    poisoned: Tensor

    @classmethod
    def root(cls, batch_size: int, device: torch.device) -> Beams:
        """One beam a request, at the root, score 0: (B, 1)."""
        zeros = torch.zeros(batch_size, 1, dtype=torch.float32, device=device)
        return cls(
            nodes=torch.zeros(batch_size, 1, dtype=torch.long, device=device),
            scores=zeros,
            log_probs=zeros,
            perturbed=zeros,
            poisoned=torch.zeros(batch_size, dtype=torch.bool, device=device),
        )

    def narrow(self, width: int) -> Beams:
        """Only the first ``width`` slots of every request."""
        return replace(
            self,
            nodes=self.nodes[:, :width],
            scores=self.scores[:, :width],
            log_probs=self.log_probs[:, :width],
            perturbed=self.perturbed[:, :width],
        )


@dataclass(frozen=True, slots=True)
class BeamStep:
    """The beams one level deeper, W' = the widest request's beam width.

    Attributes:
        beams: the survivors.
        parents: int64 (B, W'), slot each came from; 0 in dead slots.
        codes: int64 (B, W'), code each took; 0 in dead slots.
        code_scores: float32 (B, W'), log-probability of that code; -inf in dead slots.
        alive: int64 (B,), live slots of each request; they come first.
    """

    beams: Beams
    parents: Tensor
    codes: Tensor
    code_scores: Tensor
    alive: Tensor


def beam_step(
    trie: CatalogTrie,
    depth: int,
    beams: Beams,
    logits: Tensor,
    options: StepOptions,
    filters: BatchFilters,
    vocab_log_norm: Tensor | None = None,
) -> BeamStep:
    """Extend every beam by one code and keep each request's best.

    Ties go to the earlier parent, then to the smaller code.

    Args:
        trie: the catalog's trie.
        depth: depth of the beams' nodes, 0 to L - 1.
        beams: the running beams, (B, W).
        logits: float (B, W, K), the LM's logits of this level's codes; computed on in float32.
        options: the requests' options, (B,).
        filters: the requests' filters.
        vocab_log_norm: float32 (B, W), log-sum-exp over the whole vocabulary; needed when a
            request's normalization is ``vocab``.

    Returns:
        The next beams. A request none of whose children has an allowed item left comes back
        with no live slot.
    """
    batch_size, width = beams.nodes.shape
    device = beams.nodes.device
    live_rows = torch.isfinite(beams.scores).flatten().nonzero().squeeze(1)
    nodes = beams.nodes.flatten()[live_rows]

    # All (beam, child) pairs of the batch in one ragged list, in (request, beam, code) order.
    first = trie.row_ptrs[nodes].long()
    counts = trie.row_ptrs[nodes + 1].long() - first
    source = torch.repeat_interleave(torch.arange(nodes.numel(), device=device), counts)
    start = counts.cumsum(0) - counts
    edges = torch.arange(source.numel(), device=device) - start[source] + first[source]
    codes = trie.edge_codes(edges)
    children = edges + 1
    rows = live_rows[source]
    request = rows // width

    pair_logits = logits.flatten(0, 1).float()[rows, codes]
    bad = torch.isnan(pair_logits) | (pair_logits == torch.inf)
    poisoned = beams.poisoned.index_put((request[bad],), torch.tensor(True, device=device))
    pair_logits = torch.where(bad, -torch.inf, pair_logits)

    log_norm = _log_norm(pair_logits, source, live_rows, logits, options, vocab_log_norm, width)
    code_scores = pair_logits - log_norm[source]
    scores = beams.scores.flatten()[rows] + code_scores

    lo, hi = trie.item_range(children, depth + 1)
    allowed = (filters.items_left(request, lo, hi) > 0) & torch.isfinite(scores)

    log_probs, perturbed = _perturb(
        pair_logits, allowed, source, rows, request, children, beams, options
    )
    stochastic = options.temperature > 0
    ranking = torch.where(stochastic[request], perturbed, scores)

    kept = allowed.nonzero().squeeze(1)
    kept = kept[torch.argsort(ranking[kept], descending=True, stable=True)]
    kept = kept[torch.argsort(request[kept], stable=True)]
    per_request = torch.bincount(request[kept], minlength=batch_size)
    rank = torch.arange(kept.numel(), device=device)
    rank = rank - (per_request.cumsum(0) - per_request)[request[kept]]
    within = rank < options.beam_width[request[kept]]
    kept, rank = kept[within], rank[within]

    next_width = int(options.beam_width.max())
    slot = request[kept] * next_width + rank

    def place(values: Tensor, dead: float) -> Tensor:
        out = torch.full(
            (batch_size * next_width,), dead, dtype=values.dtype, device=device
        ).index_copy(0, slot, values[kept])
        return out.view(batch_size, next_width)

    return BeamStep(
        beams=Beams(
            nodes=place(children, 0),
            scores=place(scores, -torch.inf),
            log_probs=place(log_probs, -torch.inf),
            perturbed=place(perturbed, -torch.inf),
            poisoned=poisoned,
        ),
        parents=place(rows % width, 0),
        codes=place(codes, 0),
        code_scores=place(code_scores, -torch.inf),
        alive=torch.minimum(per_request, options.beam_width),
    )


def _log_norm(
    pair_logits: Tensor,
    source: Tensor,
    live_rows: Tensor,
    logits: Tensor,
    options: StepOptions,
    vocab_log_norm: Tensor | None,
    width: int,
) -> Tensor:
    """Normaliser of each live beam under its request's rule: (live,)."""
    kind = options.normalization[live_rows // width]
    log_norm = segment_logsumexp(pair_logits, source, live_rows.numel())
    if bool((kind == LEVEL).any()):
        level = logits.flatten(0, 1)[live_rows].float().logsumexp(-1)
        log_norm = torch.where(kind == LEVEL, level, log_norm)
    if bool((kind == VOCAB).any()):
        if vocab_log_norm is None:
            raise ValueError("vocab_log_norm is None; normalization 'vocab' needs it")
        log_norm = torch.where(kind == VOCAB, vocab_log_norm.flatten()[live_rows], log_norm)
    return log_norm


def _perturb(
    pair_logits: Tensor,
    allowed: Tensor,
    source: Tensor,
    rows: Tensor,
    request: Tensor,
    children: Tensor,
    beams: Beams,
    options: StepOptions,
) -> tuple[Tensor, Tensor]:
    """Log-probability at the temperature and conditioned Gumbel value of every pair."""
    if not bool((options.temperature > 0).any()):
        zeros = torch.zeros_like(pair_logits)
        return zeros, zeros
    num_rows = int(source[-1]) + 1 if source.numel() else 0
    temperature = options.temperature[request]
    heated = pair_logits / torch.where(temperature > 0, temperature, 1.0)
    heated = torch.where(allowed, heated, -torch.inf)
    norm = segment_logsumexp(heated, source, num_rows)[source]
    log_probs = beams.log_probs.flatten()[rows] + torch.where(allowed, heated - norm, -torch.inf)

    noisy = log_probs + gumbel(options.seed[request], children).float()
    largest = torch.full((num_rows,), -torch.inf, dtype=noisy.dtype, device=noisy.device)
    largest = largest.scatter_reduce(0, source, noisy, "amax")[source]
    # Shift the siblings so that their largest value is the parent's, in the numerically stable
    # form of the paper's appendix B.3.
    parent = beams.perturbed.flatten()[rows]
    gap = torch.where(allowed, noisy - largest, -1.0)
    v = parent - noisy + torch.log(-torch.expm1(gap))
    shifted = parent - torch.relu(v) - torch.log1p(torch.exp(-v.abs()))
    return log_probs, torch.where(allowed, shifted, -torch.inf)


def segment_logsumexp(values: Tensor, segment: Tensor, num_segments: int) -> Tensor:
    """log(sum(exp(values))) within each segment; -inf for one that is empty or all -inf.

    Args:
        values: float (n,).
        segment: int64 (n,), segment of each value.
        num_segments: S.

    Returns:
        float (S,).
    """
    peak = torch.full((num_segments,), -torch.inf, dtype=values.dtype, device=values.device)
    peak = peak.scatter_reduce(0, segment, values, "amax")
    safe = torch.where(torch.isfinite(peak), peak, 0.0)
    total = torch.zeros_like(peak).index_add(0, segment, torch.exp(values - safe[segment]))
    return safe + torch.log(total)


def _as_int64(seed: int) -> int:
    """Any 64-bit integer as the two's-complement value torch can hold."""
    seed &= 0xFFFF_FFFF_FFFF_FFFF
    return seed - (1 << 64) if seed >= 1 << 63 else seed
