"""What a batch costs is learned from those that ran."""

from __future__ import annotations

import itertools
import random

import numpy as np
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


def least_squares(batches):
    """Every way to hold some of the four coefficients at 0, one after the other."""
    features = np.array(
        [[1, s.tokens, s.padded_tokens, s.padded_rows] for s, _ in batches], dtype=np.float64
    )
    relative = features / np.array([seconds for _, seconds in batches])[:, None]
    best = np.inf
    for size in range(1, 5):
        for used in itertools.combinations(range(4), size):
            found = np.linalg.lstsq(relative[:, used], np.ones(len(batches)), rcond=None)[0]
            if (found >= 0).all():
                best = min(best, float(((relative[:, used] @ found - 1) ** 2).sum()))
    return best


@pytest.mark.parametrize("seed", range(8))
def test_no_other_cost_fits_better(seed):
    rng = random.Random(seed)
    given = [
        (shape, seconds * rng.uniform(0.5, 2.0))
        for shape, seconds in batches(rng.randint(8, 64), PADDING, seed=seed)
    ]
    cost = fit_cost(given)
    error = sum((cost.seconds(shape) / seconds - 1) ** 2 for shape, seconds in given)
    assert error == pytest.approx(least_squares(given), rel=1e-6)


def test_what_is_estimated_follows_what_batches_take():
    estimate = CostEstimate()
    shape = BatchShape(8, 800, 100, 50)
    for number in range(64):
        estimate.record(shape, 0.02, now_s=number / 10)
        known = estimate.at(number / 10)
        assert (known is None) == (number < 7)
    assert known.seconds(shape) == pytest.approx(0.02)
    # All that is remembered, and the eighth that a fit may be behind.
    for number in range(64, 64 + 64 + 8 + 1):
        estimate.record(shape, 0.2, now_s=number / 10)
        known = estimate.at(number / 10)
    assert known.seconds(shape) == pytest.approx(0.2)
