"""A small world to train in, and a recipe of seconds."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch

from examples.scratch.build import Recipe, RunOptions
from examples.scratch.settings import (
    AugmentationSettings,
    CodesSettings,
    ModelSettings,
    OptimizerSettings,
    TeacherSettings,
    ValidationSettings,
)
from server.demo.data import DemoData


def small_data(users: int = 60, items: int = 40) -> DemoData:
    """Users walk along a ring of items; two of them have two items only."""
    rng = np.random.default_rng(0)
    starts, lengths = rng.integers(items, size=users), rng.integers(3, 12, size=users)
    walks = [
        tuple(int((start + step) % items) for step in range(length))
        for start, length in zip(starts, lengths, strict=True)
    ]
    angle = np.arange(items) * 2 * np.pi / items
    embeddings = np.stack([np.cos(angle), np.sin(angle), np.cos(3 * angle)], axis=1)
    return DemoData(
        name="ring",
        item_ids=tuple(f"R{row:02d}" for row in range(items)),
        texts=tuple(f"thing {row}" for row in range(items)),
        embeddings=embeddings.astype(np.float32),
        sequences=(*walks, (1, 2), (3, 4)),
        metadata=pl.DataFrame(
            {
                name: [f"{name} {row}" for row in range(items)]
                for name in ("title", "brand", "category")
            }
        ),
    )


SMALL_RECIPE = Recipe(
    codes=CodesSettings(num_levels=2, codebook_size=8),
    model=ModelSettings(hidden_size=16, num_layers=1, num_heads=2, max_items=6),
    augmentation=AugmentationSettings(thin_rate=0.2, shuffle_span=1.0),
    teacher=TeacherSettings(weight=0.5, text_neighbours=3),
    optimizer=OptimizerSettings(epochs=6, batch_size=16, ema=0.9, peak_lr=1e-2),
    validation=ValidationSettings(every_epochs=2, users=20, beam_width=20),
)
OPTIONS = RunOptions(device=torch.device("cpu"), save_every=3, progress_bar=False)


@pytest.fixture(scope="session")
def data():
    return small_data()


@pytest.fixture
def recipe():
    return SMALL_RECIPE


@pytest.fixture
def options():
    return OPTIONS


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A finished run: its folder, and the release in it."""
    from examples.scratch.build import train_release

    folder = tmp_path_factory.mktemp("run")
    release = train_release(small_data(), folder, SMALL_RECIPE, replace(OPTIONS))
    return folder, release
