from __future__ import annotations

import pytest

from server.batching.throughput import Throughput


def test_nothing_is_known_before_the_first_batch():
    assert Throughput().seconds_for(100, now_s=0.0) is None


def test_the_best_recent_rate_counts():
    throughput = Throughput()
    throughput.record(10, 1.0, now_s=0.0)
    throughput.record(400, 2.0, now_s=1.0)
    throughput.record(10, 5.0, now_s=2.0)
    assert throughput.seconds_for(100, now_s=3.0) == pytest.approx(0.5)


def test_batches_that_left_somebody_waiting_tell_the_rate_under_load():
    throughput = Throughput()
    throughput.record(1_000, 1.0, now_s=0.0)
    throughput.record(100, 1.0, now_s=1.0, full=True)
    throughput.record(500, 2.0, now_s=2.0, full=True)
    assert throughput.rows_per_s(3.0) == pytest.approx(200.0)
    assert throughput.batch_seconds(3.0) == pytest.approx(1.5)
    assert throughput.rows_per_s(31.5) == pytest.approx(250.0)


def test_a_queue_that_has_become_slower_counts_as_it_is_now():
    throughput = Throughput()
    for second in range(20):
        throughput.record(1_000, 0.5, now_s=float(second), full=True)
    for second in range(20, 24):
        throughput.record(1_000, 2.0, now_s=float(second), full=True)
    assert throughput.rows_per_s(24.0) == pytest.approx(500.0)
    assert throughput.batch_seconds(24.0) == pytest.approx(2.0)
    # One that has become faster is believed in time.
    for second in range(24, 28):
        throughput.record(1_000, 0.1, now_s=float(second), full=True)
    assert 1_000 < throughput.rows_per_s(28.0) < 2_000
    assert throughput.batch_seconds(28.0) == pytest.approx(0.5)


def test_no_batch_under_load_takes_no_time():
    throughput = Throughput()
    throughput.record(10, 1.0, now_s=0.0)
    assert throughput.batch_seconds(0.0) == 0.0


def test_a_slow_start_is_forgotten():
    throughput = Throughput(window_s=30.0)
    throughput.record(1, 20.0, now_s=0.0)
    assert throughput.seconds_for(1, now_s=29.0) == pytest.approx(20.0)
    assert throughput.seconds_for(1, now_s=31.0) is None


def test_a_batch_that_took_no_time_is_no_division_by_zero():
    throughput = Throughput()
    throughput.record(10, 0.0, now_s=0.0)
    assert throughput.seconds_for(10, now_s=0.0) < 1e-3


def test_a_hitch_is_over_once_the_batches_after_it_show_that():
    throughput = Throughput()
    for second in range(10):
        throughput.record(1_000, 0.5, now_s=float(second), full=True)
    throughput.record(100, 20.0, now_s=30.0, full=True)
    assert throughput.rows_per_s(30.0) < 200
    # Nobody is let in but who finds nobody there, so that none of them leaves anybody waiting.
    for number in range(1, 4):
        throughput.record(10, 0.01, now_s=30.0 + number)
    assert throughput.rows_per_s(33.0) < 200
    throughput.record(10, 0.03, now_s=34.0)
    assert throughput.rows_per_s(34.0) > 1_000
    assert throughput.batch_seconds(34.0) <= 0.5


def test_small_batches_say_nothing_against_large_ones():
    throughput = Throughput()
    for second in range(10):
        throughput.record(1_000, 0.5, now_s=float(second), full=True)
    for second in range(10, 20):
        throughput.record(10, 0.05, now_s=float(second))
    assert throughput.rows_per_s(20.0) == pytest.approx(2_000)
    assert throughput.batch_seconds(20.0) == pytest.approx(0.5)
