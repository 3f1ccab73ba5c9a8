"""Batches of vectors that can be read again and again: checks, samples, shuffled mini-batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rectokens.core.validation import checked_vectors

Batch = Tensor | NDArray[Any]
"""(B, D) of any real dtype."""


def checked_batches(batches: Iterable[Batch], dim: int | None = None) -> Iterator[Tensor]:
    """Every batch as a float32 (B, D) tensor on the CPU; empty ones are left out.

    Args:
        batches: an iterable that starts anew every time.
        dim: D; None takes the width of the first batch.

    Raises:
        TypeError: ``batches`` can be read only once, or a batch is no array of real numbers.
        ValueError: a batch of another width, or with NaN or infinite values; names the batch.
    """
    iterator = iter(batches)
    if iterator is batches:
        raise TypeError(
            f"batches is a {type(batches).__name__}, which can be read only once; "
            "pass an iterable that starts anew every time, such as a list or a data loader"
        )
    for index, batch in enumerate(iterator):
        # A copy: arrays mapped from a file are read-only, which torch does not support.
        tensor = torch.from_numpy(np.array(batch)) if isinstance(batch, np.ndarray) else batch
        if dim is None and isinstance(tensor, Tensor) and tensor.ndim == 2:
            dim = tensor.shape[1]
        width = 0 if dim is None else dim
        rows = checked_vectors(tensor, width, name=f"batch {index}", device=torch.device("cpu"))
        if rows.shape[0]:
            yield rows


def reservoir_sample(
    batches: Iterable[Tensor], num_rows: int, generator: np.random.Generator
) -> tuple[Tensor, int]:
    """A uniform sample of all rows, in one pass (Vitter, 1985, algorithm R).

    Args:
        batches: float32 (B, D) each.
        num_rows: n; all rows are returned, in order, where there are no more than that.

    Returns:
        float32 (min(n, N), D), and N.

    Raises:
        ValueError: there are no rows.
    """
    held: list[Tensor] = []
    sample: Tensor | None = None
    seen = 0
    for batch in batches:
        room = max(num_rows - seen, 0)
        if room:
            held.append(batch[:room].clone())
        late = batch[room:]
        if late.shape[0]:
            if sample is None:
                sample, held = torch.cat(held), []
            # Row i (from 0) takes place j, drawn from 0 to i, if there is such a place.
            order = np.arange(seen + room, seen + batch.shape[0])
            places = generator.integers(0, order + 1)
            chosen = places < num_rows
            # NumPy keeps the last of the rows that want the same place, as the algorithm does.
            sample.numpy()[places[chosen]] = late.numpy()[chosen]
        seen += batch.shape[0]
    if not seen:
        raise ValueError("batches have no rows; fitting needs at least 1")
    return (torch.cat(held) if sample is None else sample), seen


def shuffled_batches(
    batches: Iterable[Tensor], batch_size: int, buffer_rows: int, generator: torch.Generator
) -> Iterator[Tensor]:
    """Mini-batches of rows shuffled within a window, so that the order on disk matters little.

    Args:
        batches: float32 (B, D) each.
        batch_size: rows of every mini-batch but the last.
        buffer_rows: rows in memory at a time; all rows are shuffled where this holds them all.
        generator: on the CPU.
    """
    held: list[Tensor] = []
    held_rows = 0
    for batch in batches:
        held.append(batch)
        held_rows += batch.shape[0]
        if held_rows >= max(buffer_rows, 2 * batch_size):
            rows = torch.cat(held)
            rows = rows[torch.randperm(held_rows, generator=generator)]
            # Half stays behind to mix with what comes next.
            given = held_rows // 2 // batch_size * batch_size
            yield from rows[:given].split(batch_size)
            held, held_rows = [rows[given:].clone()], held_rows - given
    if held_rows:
        rows = torch.cat(held)
        yield from rows[torch.randperm(held_rows, generator=generator)].split(batch_size)
