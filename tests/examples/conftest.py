"""A small data set in the folder layout."""

from __future__ import annotations

import gzip
import json

import numpy as np
import pytest


def write_data(folder, *, num_items=40, num_users=30, dim=8, seed=0, short_users=2):
    """Users walk through neighbouring items; some have fewer than three."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    with gzip.open(folder / "items.jsonl.gz", "wt", encoding="utf-8") as file:
        for number in range(1, num_items + 1):
            item = {
                "id": number,
                "asin": f"B{number:03d}",
                "text": f"title: thing {number}; categories: A > B{number % 4}",
                "title": f"thing {number}",
                "categories": ["A", f"B{number % 4}"],
            }
            file.write(json.dumps(item) + "\n")
    vectors = rng.normal(size=(num_items, dim))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    np.save(folder / "embeddings.f16.npy", vectors.astype(np.float16))
    with gzip.open(folder / "sequences.txt.gz", "wt", encoding="utf-8") as file:
        for user in range(1, num_users + 1):
            length = 2 if user <= short_users else int(rng.integers(3, 26))
            items = rng.permutation(num_items)[:length] + 1
            file.write(" ".join(map(str, [user, *items])) + "\n")
    return folder


@pytest.fixture
def data_root(tmp_path):
    """A root that holds ``amazon-beauty``: 40 items, 30 users, 2 of them with two items only."""
    write_data(tmp_path / "amazon-beauty")
    return tmp_path


@pytest.fixture(scope="session")
def data_folder_writer():
    return write_data
