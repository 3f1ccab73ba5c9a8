"""How many replicas there should be. Needs no Ray.

Ray copies this module into its controller, so it imports nothing of ours.
"""

from __future__ import annotations

from typing import Any

BEAM_ROWS = "beam_rows"


def wanted_replicas(reported_rows: list[float], replicas: int, target_rows: float) -> float:
    """Replicas for which each would have ``target_rows`` beam rows on average.

    Args:
        reported_rows: beam rows of each replica that has told them.
        replicas: running; those that have told nothing yet count as the mean of the others.
        target_rows: wanted in each.
    """
    if not reported_rows:
        return float(replicas)
    mean = sum(reported_rows) / len(reported_rows)
    return mean * replicas / target_rows


class BeamRowsPolicy:
    """An autoscaling policy of Ray Serve; bounds and delays are Ray's own.

    Args:
        target_beam_rows: wanted in each replica.
    """

    def __init__(self, target_beam_rows: float) -> None:
        self._target_rows = target_beam_rows

    def __call__(self, ctx: Any) -> tuple[float, dict[str, Any]]:
        """The replicas wanted now, given Ray's ``AutoscalingContext``."""
        reported = list((ctx.aggregated_metrics or {}).get(BEAM_ROWS, {}).values())
        if not reported:
            return float(ctx.target_num_replicas), {}
        return wanted_replicas(reported, ctx.current_num_replicas, self._target_rows), {}
