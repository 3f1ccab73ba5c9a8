"""What a batch costs is learned from those that ran."""

from __future__ import annotations

import random

import pytest

from server.batching.cost import BatchCost, CostEstimate, fit_cost

TRUTH = BatchCost(fixed_s=0.004, token_s=2e-6, row_s=5e-6)


def batches(count, noise=0.0, truth=TRUTH, seed=0):
    rng = random.Random(seed)
    found = []
    for _ in range(count):
        shape = rng.randint(1, 32), rng.randint(5, 2_000), rng.choice([10, 50, 256, 1_000])
        found.append((*shape, truth.seconds(*shape) * (1 + rng.uniform(-noise, noise))))
    return found


def test_a_linear_cost_is_found_again():
    cost = fit_cost(batches(40))
    assert cost.fixed_s == pytest.approx(TRUTH.fixed_s)
    assert cost.token_s == pytest.approx(TRUTH.token_s)
    assert cost.row_s == pytest.approx(TRUTH.row_s)


def test_noise_and_one_batch_that_was_held_up_do_little():
    held_up = [(4, 100, 50, 3.0)]
    cost = fit_cost([*batches(40, noise=0.1), *held_up])
    for shape in [(1, 100, 50), (16, 500, 256), (32, 2_000, 1_000)]:
        assert cost.seconds(*shape) == pytest.approx(TRUTH.seconds(*shape), rel=0.3)


def test_nothing_has_a_negative_price():
    rng = random.Random(1)
    for seed in range(20):
        cost = fit_cost([(*b[:3], rng.uniform(0.001, 1.0)) for b in batches(12, seed=seed)])
        assert min(cost.fixed_s, cost.token_s, cost.row_s) >= 0


def test_shapes_that_never_differ_are_predicted_all_the_same():
    cost = fit_cost([(8, 100, 50, 0.02)] * 10)
    assert cost.seconds(8, 100, 50) == pytest.approx(0.02)


def test_little_is_known_of_few_batches_and_of_old_ones():
    estimate = CostEstimate(window_s=30.0)
    for i, batch in enumerate(batches(8)):
        assert estimate.at(float(i)) is None
        estimate.record(*batch, now_s=float(i))
    assert estimate.at(8.0) is not None
    assert estimate.at(30.5) is None  # the oldest of the eight is forgotten
