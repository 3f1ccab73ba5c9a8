"""What a batch costs is learned from those that ran."""

from __future__ import annotations

import random

import pytest

from server.batching.cost import BatchCost, BatchShape, CostEstimate, fit_cost

PADDING = BatchCost(fixed_s=0.004, token_s=0.0, padded_token_s=2e-6, row_s=5e-6)
PACKING = BatchCost(fixed_s=0.004, token_s=2e-6, padded_token_s=0.0, row_s=5e-6)


def random_shape(rng):
    shape = BatchShape()
    for _ in range(rng.randint(1, 32)):
        shape = shape.with_request(rng.randint(5, 2_000), rng.choice([10, 50, 256, 1_000]))
    return shape


def batches(count, truth, noise=0.0, seed=0):
    rng = random.Random(seed)
    shapes = [random_shape(rng) for _ in range(count)]
    return [(s, truth.seconds(s) * (1 + rng.uniform(-noise, noise))) for s in shapes]


@pytest.mark.parametrize("truth", [PADDING, PACKING])
def test_a_linear_cost_is_found_again(truth):
    cost = fit_cost(batches(40, truth))
    for name in ("fixed_s", "token_s", "padded_token_s", "row_s"):
        assert getattr(cost, name) == pytest.approx(getattr(truth, name), abs=1e-9)


@pytest.mark.parametrize("truth", [PADDING, PACKING])
def test_noise_and_one_batch_that_was_held_up_do_little(truth):
    held_up = [(random_shape(random.Random(5)), 30.0)]
    cost = fit_cost([*batches(40, truth, noise=0.1), *held_up])
    for shape, seconds in batches(20, truth, seed=7):
        assert cost.seconds(shape) == pytest.approx(seconds, rel=0.3)


def test_nothing_has_a_negative_price():
    rng = random.Random(1)
    for seed in range(20):
        shapes = [shape for shape, _ in batches(12, PADDING, seed=seed)]
        cost = fit_cost([(shape, rng.uniform(0.001, 1.0)) for shape in shapes])
        assert min(cost.fixed_s, cost.token_s, cost.padded_token_s, cost.row_s) >= 0


def test_shapes_that_never_differ_are_predicted_all_the_same():
    shape = BatchShape(8, 800, 100, 50)
    assert fit_cost([(shape, 0.02)] * 10).seconds(shape) == pytest.approx(0.02)


def test_little_is_known_of_few_batches_and_of_old_ones():
    estimate = CostEstimate(window_s=30.0)
    for i, (shape, seconds) in enumerate(batches(8, PADDING)):
        assert estimate.at(float(i)) is None
        estimate.record(shape, seconds, now_s=float(i))
    assert estimate.at(8.0) is not None
    assert estimate.at(30.5) is None  # the oldest of the eight is forgotten
