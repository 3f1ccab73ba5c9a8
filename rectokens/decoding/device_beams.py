"""The running beams of a batch in static device tensors, for steps that were captured once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rectokens.decoding.beam_step import Beams
from rectokens.decoding.device_tables import StepShapes

_HEADER = 3


class BeamBuffers:
    """Beams of B requests at every depth 0..L; the addresses never change.

    Index 0 of the first dimension is the depth. A step from depth d reads index d and writes
    index d + 1, so what a search went through stays until the next search. Slots are in order,
    best first; dead ones, after the live ones, have node 0, code 0, parent 0 and the value -inf.
    At depth 0 only slot 0 is live: the root, score 0.

    Args:
        batch: B.
        shapes: sizes; W and L are theirs.
        device: where to search.

    Attributes:
        nodes: int32 (L + 1, B, W), trie node of each beam.
        parents: int32 (L + 1, B, W), slot at the depth before.
        codes: int32 (L + 1, B, W), code taken on the way from there.
        ancestors: int32 (L + 1, B, W, L); at depth d, entry j < d is the slot at depth j + 1 that
            the beam came through, the last of them (j = d - 1) the beam itself. What a decode
            attention needs to find a beam's own past positions; entries j >= d are 0.
        scores: float32 (L + 1, B, W), sum of log-probabilities.
        code_scores: float32 (L + 1, B, W), log-probability of the code.
        log_probs: float32 (L + 1, B, W), under the sampling distribution; of no meaning, but
            finite, in live slots of a request without temperature.
        perturbed: float32 (L + 1, B, W), Gumbel value that orders a stochastic search; likewise.
        poisoned: int32 (B,), not 0 once a NaN or +inf logit was met.
        alive: int32 (L + 1, B), live slots.
        answers: int32 (B, 3 + (2 + 1 + 2 L) W), the finished search, see ``unpack_answers``.
        scratch: what the implementation of the steps keeps between kernels, made at first use.
    """

    def __init__(self, batch: int, shapes: StepShapes, device: torch.device | str) -> None:
        if batch < 1:
            raise ValueError(f"batch is {batch}; it must be at least 1")
        self.batch, self.shapes = batch, shapes
        levels, width = shapes.num_levels, shapes.width
        whole = (levels + 1, batch, width)

        def integers(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        def dead() -> Tensor:
            return torch.full(whole, -torch.inf, dtype=torch.float32, device=device)

        self.nodes, self.parents, self.codes = (integers(*whole) for _ in range(3))
        self.ancestors = integers(*whole, levels)
        self.scores, self.code_scores, self.log_probs, self.perturbed = (dead() for _ in range(4))
        for values in (self.scores, self.log_probs, self.perturbed):
            values[0, :, 0] = 0.0
        self.poisoned = integers(batch)
        self.alive = integers(levels + 1, batch)
        self.alive[0] = 1
        self.answers = integers(batch, _HEADER + (3 + 2 * levels) * width)
        self.scratch: object = None

    @property
    def device(self) -> torch.device:
        """Where the tensors live."""
        return self.nodes.device

    def at(self, depth: int) -> Beams:
        """The beams at ``depth`` in the form of the reference, copied."""
        return Beams(
            nodes=self.nodes[depth].long(),
            scores=self.scores[depth].clone(),
            log_probs=self.log_probs[depth].clone(),
            perturbed=self.perturbed[depth].clone(),
            poisoned=self.poisoned != 0,
        )


@dataclass(frozen=True, slots=True)
class SearchAnswers:
    """What a batch of searches found, on the host.

    Attributes:
        alive: int32 (B,), leaves found.
        poisoned: int32 (B,), not 0: the request has no answer.
        item_count: int32 (B,), items found, at most W.
        items: int32 (B, W), item indices, best leaf first, a leaf's items in catalog order, every
            one of them allowed; -1 past ``item_count``.
        leaves: int32 (B, W), slot of the leaf of each item; 0 past ``item_count``.
        scores: float32 (B, W), by slot.
        codes: int32 (B, W, L), semantic ID by slot; 0 in dead slots.
        code_scores: float32 (B, W, L), by slot; -inf in dead slots.
    """

    alive: Tensor
    poisoned: Tensor
    item_count: Tensor
    items: Tensor
    leaves: Tensor
    scores: Tensor
    codes: Tensor
    code_scores: Tensor


def answer_columns(shapes: StepShapes) -> dict[str, slice]:
    """Where the fields of ``SearchAnswers`` lie in a row of ``BeamBuffers.answers``.

    ``alive``, ``poisoned`` and ``item_count`` are the first three numbers; fields of floats are
    their bits.
    """
    width, levels = shapes.width, shapes.num_levels
    sizes = {
        "items": width,
        "leaves": width,
        "scores": width,
        "codes": levels * width,
        "code_scores": levels * width,
    }
    columns, start = {}, _HEADER
    for name, size in sizes.items():
        columns[name] = slice(start, start + size)
        start += size
    return columns


def unpack_answers(answers: Tensor, shapes: StepShapes) -> SearchAnswers:
    """Views of ``BeamBuffers.answers`` after it was copied to the host (or anywhere else)."""
    batch, width, levels = answers.shape[0], shapes.width, shapes.num_levels
    of = {name: answers[:, columns] for name, columns in answer_columns(shapes).items()}
    alive, poisoned, item_count = answers[:, :_HEADER].unbind(1)
    return SearchAnswers(
        alive=alive,
        poisoned=poisoned,
        item_count=item_count,
        items=of["items"],
        leaves=of["leaves"],
        scores=of["scores"].view(torch.float32),
        codes=of["codes"].reshape(batch, width, levels),
        code_scores=of["code_scores"].reshape(batch, width, levels).view(torch.float32),
    )
