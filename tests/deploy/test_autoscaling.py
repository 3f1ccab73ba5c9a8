"""How many replicas there should be."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.ray.autoscaling import BEAM_ROWS, BeamRowsPolicy, wanted_replicas


def context(rows: dict[str, float] | None, current: int, target: int) -> Any:
    """What Ray hands to a policy, in the fields that ours reads."""
    metrics = None if rows is None else {BEAM_ROWS: rows}
    return SimpleNamespace(
        aggregated_metrics=metrics, current_num_replicas=current, target_num_replicas=target
    )


@pytest.mark.parametrize(
    ("rows", "replicas", "wanted"),
    [
        ([512.0, 512.0], 2, 2.0),
        ([1024.0, 1024.0], 2, 4.0),
        ([2048.0, 0.0], 2, 4.0),
        ([0.0, 0.0, 0.0], 3, 0.0),
        # One of two has just started and told nothing.
        ([1024.0], 2, 4.0),
        ([], 3, 3.0),
    ],
)
def test_rows_decide(rows: list[float], replicas: int, wanted: float) -> None:
    assert wanted_replicas(rows, replicas, 512.0) == wanted


@given(st.lists(st.floats(0, 1e5), min_size=1, max_size=20), st.floats(1, 1e4))
def test_with_so_many_each_has_the_target(rows: list[float], target: float) -> None:
    wanted = wanted_replicas(rows, len(rows), target)
    assert wanted * target == pytest.approx(sum(rows))


def test_the_policy_reads_what_replicas_report() -> None:
    policy = BeamRowsPolicy(target_beam_rows=100)
    assert policy(context({"x": 300.0, "y": 100.0}, 2, 2)) == (4.0, {})


@pytest.mark.parametrize("rows", [None, {}])
def test_without_reports_nothing_changes(rows: dict[str, float] | None) -> None:
    assert BeamRowsPolicy(100)(context(rows, 2, 3)) == (3.0, {})
