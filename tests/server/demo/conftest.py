"""A tiny demo, built once."""

from __future__ import annotations

from pathlib import Path

import pytest

from server.demo.build import build_release
from server.demo.data import DemoData
from server.demo.recipe import DemoRecipe, ModelSize
from server.demo.samples import Augmentation
from server.demo.synthetic import SyntheticShape, generate
from server.demo.training import TrainSettings


@pytest.fixture(scope="session")
def tiny_data() -> DemoData:
    return generate(0, SyntheticShape(items_per_style=4, num_users=120, dim=16))


@pytest.fixture(scope="session")
def tiny_recipe() -> DemoRecipe:
    return DemoRecipe(
        codebook_size=16,
        text_vocab_size=300,
        max_history_items=8,
        max_texts=2,
        max_text_tokens=16,
        validation_users=40,
        model=ModelSize(hidden_size=16, num_layers=1, num_heads=2, intermediate_size=32),
        augmentation=Augmentation(max_items=9),
        train=TrainSettings(epochs=1, batch_tokens=1024),
    )


@pytest.fixture(scope="session")
def tiny_store(
    tmp_path_factory: pytest.TempPathFactory, tiny_data: DemoData, tiny_recipe: DemoRecipe
) -> Path:
    """An artifact store with one release; read only."""
    out = tmp_path_factory.mktemp("store")
    build_release(tiny_data, out, tiny_recipe)
    return out
