"""Behaviour vectors: who met what, and what neighbours lend."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from examples.data.item_vectors import item_vectors


def vectors(train, **how):
    rng = np.random.default_rng(0)
    texts = rng.normal(size=(12, 6)).astype(np.float32)
    texts[11] = texts[3]  # an item that nobody met, with the text of one that somebody did
    return item_vectors(
        texts, train, **{"behaviour_weight": 0.5, "behaviour_dims": 4, "seed": 0, **how}
    )


TRAIN = [[0, 1, 2], [1, 0, 2], [2, 1, 0], [3, 4, 5], [5, 3, 4], [4, 3, 5], [6, 7], [8, 9, 10]]


def test_without_weight_there_is_text_alone():
    found = vectors(TRAIN, behaviour_weight=0.0)
    assert found.shape == (12, 6)
    assert found.norm(dim=1) == pytest.approx(torch.ones(12).tolist())


def test_both_parts_have_the_lengths_told():
    found = vectors(TRAIN)
    assert found.shape == (12, 10)
    assert found[:, :6].norm(dim=1).tolist() == pytest.approx([1.0] * 12, abs=1e-5)
    assert found[:, 6:].norm(dim=1).tolist() == pytest.approx([0.5] * 12, abs=1e-5)
    assert found.equal(vectors(TRAIN))


def test_items_met_together_are_near():
    part = torch.nn.functional.normalize(vectors(TRAIN)[:, 6:], dim=1)
    near, far = float(part[3] @ part[4]), float(part[0] @ part[4])
    assert near > far + 0.3


def test_an_item_that_nobody_met_has_what_its_like_lends_it():
    part = torch.nn.functional.normalize(vectors(TRAIN)[:, 6:], dim=1)
    assert float(part[11] @ part[3]) > float(part[11] @ part[0])


def test_nobody_met_anything():
    assert bool(vectors([[0], [1]]).isfinite().all())
