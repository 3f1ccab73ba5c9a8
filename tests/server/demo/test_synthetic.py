"""The generated shop has structure that can be learnt, and the same seed gives the same shop."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from server.demo.synthetic import SyntheticShape, generate

SMALL = SyntheticShape(items_per_style=6, num_users=300, dim=32)


@pytest.fixture(scope="module")
def data():
    return generate(3, SMALL)


def test_the_same_seed_gives_the_same_data(data):
    again = generate(3, SMALL)
    assert again.sequences == data.sequences
    assert again.texts == data.texts
    assert np.array_equal(again.embeddings, data.embeddings)
    other = generate(4, SMALL)
    assert other.sequences != data.sequences


def test_sizes_and_names(data):
    assert len(data.item_ids) == len(set(data.item_ids)) == 1500
    assert data.item_ids[0] == "B0001"
    assert len(data.sequences) == 300
    lengths = [len(sequence) for sequence in data.sequences]
    assert min(lengths) >= 3
    assert len(set(lengths)) > 10
    assert 8 < np.mean(lengths) < 15
    assert all(len(set(sequence)) == len(sequence) for sequence in data.sequences)
    assert all(title for title in data.metadata["title"])


def test_embeddings_follow_the_categories(data):
    styles = data.metadata["category"].to_list()
    categories = [style.split(" > ")[0] for style in styles]
    similarity = data.embeddings @ data.embeddings.T
    same_style = np.equal.outer(styles, styles)
    same_category = np.equal.outer(categories, categories)
    np.fill_diagonal(same_style, False)
    nearby = similarity[same_style].mean()
    related = similarity[same_category & ~same_style].mean()
    apart = similarity[~same_category].mean()
    assert nearby > related + 0.1 > apart + 0.2
    np.testing.assert_allclose(np.linalg.norm(data.embeddings, axis=1), 1.0, rtol=1e-5)


def test_users_mostly_stay_near_where_they_are(data):
    style = data.metadata["category"].to_list()
    pairs = [pair for s in data.sequences for pair in pairwise(s)]
    stay = np.mean([style[a] == style[b] for a, b in pairs])
    same_subcategory = np.mean(
        [style[a].split(" > ")[1] == style[b].split(" > ")[1] for a, b in pairs]
    )
    assert 0.4 < stay < 0.8
    assert same_subcategory > stay + 0.1


def test_bad_shapes_are_refused():
    with pytest.raises(ValueError, match="num_users is 0; it must be at least 1"):
        SyntheticShape(num_users=0)
    with pytest.raises(ValueError, match="3 <= min < mean < max"):
        SyntheticShape(min_length=2)
