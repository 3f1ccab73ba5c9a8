"""From users' histories to training batches, by the prompt builder that serving uses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rectokens.prompts.builder import PromptBuilder
from rectokens.prompts.parts import ItemPart, Part, TextPart
from rectokens.prompts.sequence import IGNORED_LABEL
from server.demo.data import METADATA_COLUMNS, DemoData, HeldOut
from server.demo.text import describe


@dataclass(frozen=True, slots=True)
class Sample:
    """One sequence: token ids, and labels of the same length, -100 where there is no loss."""

    token_ids: list[int]
    labels: list[int]

    def __post_init__(self) -> None:
        if len(self.token_ids) != len(self.labels):
            raise ValueError(
                f"there are {len(self.labels)} labels for {len(self.token_ids)} token ids"
            )


@dataclass(frozen=True, slots=True)
class Batch:
    """Samples padded on the right: two int64 tensors (B, T). Padding has no labels.

    A causal model needs no attention mask for them: no position looks to its right.
    """

    token_ids: Tensor
    labels: Tensor


@dataclass(frozen=True, slots=True)
class Augmentation:
    """How one history becomes many different samples.

    Attributes:
        max_items: longest window of a history, the predicted last item included.
        crop_share: share of the histories that begin at a random item instead of the first.
        text_share: share of the histories that follow a text about one of their items.
        described_share: share of the items that are asked for by text alone, each epoch.
    """

    max_items: int = 21
    crop_share: float = 0.5
    text_share: float = 0.1
    described_share: float = 0.3

    def __post_init__(self) -> None:
        if self.max_items < 1:
            raise ValueError(f"max_items is {self.max_items}; it must be at least 1")
        for name in ("crop_share", "text_share", "described_share"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed are 0 to 1")


class SampleMaker:
    """Makes the samples of an epoch.

    Args:
        data: whose items the histories name.
        codes: int64 (N, L), semantic ID of each row of the data.
        builder: the prompt builder of the model's recipe.
        augmentation: how much to vary.
    """

    def __init__(
        self,
        data: DemoData,
        codes: NDArray[np.int64],
        builder: PromptBuilder,
        augmentation: Augmentation,
    ) -> None:
        self._items = [ItemPart(tuple(row)) for row in codes.tolist()]
        columns = (data.metadata[name].to_list() for name in METADATA_COLUMNS)
        self._described: list[tuple[str, str, str]] = list(zip(*columns, strict=True))
        self._builder = builder
        self._augmentation = augmentation

    def epoch(self, histories: Sequence[Sequence[int]], rng: np.random.Generator) -> list[Sample]:
        """A sample of each history, and of some items each a text that asks for it."""
        samples = [self._history(history, rng) for history in histories]
        chosen = rng.random(len(self._items)) < self._augmentation.described_share
        for row in np.flatnonzero(chosen):
            text = describe(*self._described[row], rng)
            if text:
                samples.append(self._sample([TextPart(text), self._items[row]]))
        return samples

    def question(self, question: HeldOut) -> Sample:
        """The prompt of a held-out question and its answer, with labels on the answer alone."""
        prompt = self._builder.build([self._items[row] for row in question.history]).token_ids
        target = self._builder.target(self._items[question.target].codes)
        return Sample([*prompt, *target], [IGNORED_LABEL] * len(prompt) + target)

    def _history(self, history: Sequence[int], rng: np.random.Generator) -> Sample:
        rows = self._window(history, rng)
        parts: list[Part] = [self._items[row] for row in rows]
        if rng.random() < self._augmentation.text_share:
            text = describe(*self._described[rows[int(rng.integers(len(rows)))]], rng)
            if text:
                parts.insert(0, TextPart(text))
        return self._sample(parts)

    def _window(self, history: Sequence[int], rng: np.random.Generator) -> Sequence[int]:
        """A stretch of the history that fits, of at least two items where it has them."""
        surplus = len(history) - self._augmentation.max_items
        if surplus > 0:
            first = int(rng.integers(surplus + 1))
            return history[first : first + self._augmentation.max_items]
        if len(history) > 2 and rng.random() < self._augmentation.crop_share:
            return history[int(rng.integers(len(history) - 1)) :]
        return history

    def _sample(self, parts: Sequence[Part]) -> Sample:
        return Sample(*self._builder.training_sequence(parts))


def batches(
    samples: Sequence[Sample],
    max_tokens: int,
    pad_token_id: int,
    rng: np.random.Generator | None = None,
) -> Iterator[Batch]:
    """Batches of samples of similar length, each at most ``max_tokens`` with its padding.

    Args:
        samples: every one is in exactly one batch; one that is too long is alone in its batch.
        max_tokens: of a batch, padding included.
        pad_token_id: fills up shorter samples.
        rng: shuffles samples of equal length, and the batches; None keeps the order of lengths.
    """
    lengths = np.array([len(sample.token_ids) for sample in samples])
    ties = np.arange(len(samples)) if rng is None else rng.permutation(len(samples))
    groups: list[list[int]] = []
    for index in np.lexsort((ties, lengths)):
        # In ascending order, so the newest is the longest.
        if not groups or (len(groups[-1]) + 1) * int(lengths[index]) > max_tokens:
            groups.append([])
        groups[-1].append(int(index))
    order = range(len(groups)) if rng is None else rng.permutation(len(groups))
    for number in order:
        yield _pad([samples[index] for index in groups[number]], pad_token_id)


def _pad(samples: Sequence[Sample], pad_token_id: int) -> Batch:
    width = max(len(sample.token_ids) for sample in samples)
    token_ids = torch.full((len(samples), width), pad_token_id, dtype=torch.long)
    labels = torch.full((len(samples), width), IGNORED_LABEL, dtype=torch.long)
    for row, sample in enumerate(samples):
        token_ids[row, : len(sample.token_ids)] = torch.tensor(sample.token_ids)
        labels[row, : len(sample.labels)] = torch.tensor(sample.labels)
    return Batch(token_ids, labels)
