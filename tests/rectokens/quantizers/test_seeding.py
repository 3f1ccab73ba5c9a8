import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rectokens.quantizers import seeding
from rectokens.quantizers.seeding import kmeans_plus_plus


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def kmeans_plus_plus_one_by_one(points, num_seeds, rng):
    """The textbook procedure: a seed at a time, by squared distance to those picked."""
    points = points.double()
    seeds = [int(torch.randint(points.shape[0], (1,), generator=rng))]
    while len(seeds) < num_seeds:
        nearest = torch.cdist(points, points[seeds]).min(dim=1).values.square()
        seeds.append(int(torch.multinomial(nearest, 1, generator=rng)))
    return seeds


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 60),
    dim=st.integers(1, 5),
    num_seeds=st.integers(1, 80),
    decimals=st.integers(0, 3),
    seed=st.integers(0, 2**31),
)
def test_every_distinct_point_comes_before_a_repeat(rows, dim, num_seeds, decimals, seed):
    points = torch.randn(rows, dim, generator=generator(seed)).round(decimals=decimals)
    seeds = kmeans_plus_plus(points, num_seeds, generator(seed))
    assert seeds.shape == (num_seeds,)
    assert ((seeds >= 0) & (seeds < rows)).all()
    distinct = torch.unique(points, dim=0).shape[0]
    picked = torch.unique(points[seeds], dim=0).shape[0]
    assert picked == min(distinct, num_seeds)


def test_same_draws_as_one_seed_at_a_time():
    """Pairs of seeds occur as often as the textbook procedure has them."""
    points = torch.tensor([[0.0], [1.0], [3.0], [7.0], [7.5]])
    rows, trials = points.shape[0], 6000
    rng, reference_rng = generator(1), generator(2)
    counts = torch.zeros(rows, rows, rows)
    expected = torch.zeros(rows, rows, rows)
    for _ in range(trials):
        counts[tuple(kmeans_plus_plus(points, 3, rng).tolist())] += 1
        expected[tuple(kmeans_plus_plus_one_by_one(points, 3, reference_rng))] += 1
    difference = (counts - expected).abs() / trials
    # Two samples of one distribution: five standard deviations of a share's difference.
    share = (counts + expected) / (2 * trials)
    assert (difference <= 5 * (2 * share / trials).sqrt() + 1e-9).all()


def test_a_seed_in_every_far_cluster():
    centres = torch.randn(40, 8, generator=generator()) * 100
    points = centres.repeat(50, 1) + torch.randn(2000, 8, generator=generator()) * 0.01
    for seed in range(5):
        seeds = kmeans_plus_plus(points, 40, generator(seed))
        assert torch.equal((seeds % 40).sort().values, torch.arange(40))


def test_far_from_the_origin():
    points = torch.eye(6).repeat(10, 1) + 1e4
    seeds = kmeans_plus_plus(points, 6, generator())
    assert torch.equal((seeds % 6).sort().values, torch.arange(6))


def test_repeatable_and_seed_dependent(monkeypatch):
    points = torch.randn(500, 4, generator=generator())
    first = kmeans_plus_plus(points, 50, generator(3))
    assert torch.equal(first, kmeans_plus_plus(points, 50, generator(3)))
    assert not torch.equal(first, kmeans_plus_plus(points, 50, generator(4)))
    monkeypatch.setattr(seeding, "_CHUNK_ROWS", 7)
    assert torch.equal(first, kmeans_plus_plus(points, 50, generator(3)))


def test_no_points():
    with pytest.raises(ValueError, match="0 rows"):
        kmeans_plus_plus(torch.zeros(0, 3), 2, generator())
