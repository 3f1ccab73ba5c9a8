"""Toy language models that follow the model protocol, and searches that enumerate."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn


class Markov(nn.Module):
    """Logits depend on the newest token only; keeps no cache."""

    def __init__(self, vocab_size: int, seed: int = 0, width: int | None = None) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.embed = nn.Embedding(vocab_size, 8)
        self.head = nn.Linear(8, width or vocab_size)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))

    def forward(self, input_ids, past_key_values, attention_mask, use_cache):
        return SimpleNamespace(logits=self.head(self.embed(input_ids)), past_key_values=None)


class Recurrent(Markov):
    """Logits depend on all tokens; the cache is a tuple of (state, count) pairs, rows first."""

    def forward(self, input_ids, past_key_values, attention_mask, use_cache):
        rows, length = input_ids.shape
        state, count = torch.zeros(rows, 8), torch.zeros(rows, 1)
        if past_key_values is not None:
            ((state, count),) = past_key_values
        real = torch.ones(rows, length)
        if attention_mask is not None:
            real = attention_mask[:, -length:].to(state.dtype)
        outputs = []
        for t in range(length):
            updated = torch.tanh(0.7 * state.roll(1, 1) + self.embed(input_ids[:, t]))
            keep = real[:, t : t + 1]
            state = keep * updated + (1 - keep) * state
            count = count + keep
            outputs.append(state * (1 + 0.1 * count))
        logits = self.head(torch.stack(outputs, 1))
        return SimpleNamespace(logits=logits, past_key_values=((state, count),))


def _full_logits(model: nn.Module, ids: list[int]) -> Tensor:
    """Logits after ``ids``, from one fresh forward over all of them."""
    tensor = torch.tensor([ids])
    mask = torch.ones_like(tensor)
    with torch.no_grad():
        output = model(tensor, past_key_values=None, attention_mask=mask, use_cache=False)
    return output.logits[0, -1].double()


def _child_scores(
    model: nn.Module, prompt: list[int], prefix: tuple[int, ...], items: Any, temperature: float
) -> dict[int, float]:
    """Log-probability of each token that extends ``prefix`` to a prefix of an item."""
    step = len(prefix)
    children = sorted({item[step] for item in items if item[:step] == prefix})
    logits = _full_logits(model, [*prompt, *prefix])[children]
    scores = (logits / (temperature or 1.0)).log_softmax(0)
    return dict(zip(children, scores.tolist(), strict=True))


def _beam_search(
    model: nn.Module,
    prompt: list[int],
    items: Any,
    steps: int,
    k: int,
    fan_out: int,
    temperature: float = 0.0,
) -> list[tuple[tuple[int, ...], float]]:
    """The contract's search in plain Python: (sequence, score), best first."""
    beams = [((), 0.0)]
    for _ in range(steps):
        grown = []
        for prefix, score in beams:
            children = _child_scores(model, prompt, prefix, items, temperature)
            best = sorted(children.items(), key=lambda c: -c[1])[:fan_out]
            grown += [((*prefix, token), score + s) for token, s in best]
        beams = sorted(grown, key=lambda beam: -beam[1])[:k]
    return beams


@pytest.fixture(scope="session")
def beam_search() -> Callable[..., list[tuple[tuple[int, ...], float]]]:
    """``beam_search(model, prompt, items, steps, k, fan_out, temperature=0.0)``, the slow way.

    With k and fan_out of all leaves it enumerates and ranks them.
    """
    return _beam_search


@pytest.fixture(scope="session")
def markov() -> type[Markov]:
    """A model whose logits depend on the newest token; no cache; four parameters."""
    return Markov


@pytest.fixture(scope="session")
def recurrent() -> type[Recurrent]:
    """A model whose logits depend on all tokens; tuple cache; four parameters."""
    return Recurrent
