"""Load that rises step by step, to the knee: ``locust --config loadtest/steps.conf --host URL``.

Exit code: 0 where a knee was found, 1 where the first step breaks a threshold, 2 where the test
cannot be made.
"""

from __future__ import annotations

import csv
import logging
import math
from pathlib import Path
from typing import Any

from locust import LoadTestShape, events
from locust.env import Environment
from locust.runners import WorkerRunner

from loadtest.figures import Counts, Step, knee
from loadtest.locustfile import CANNOT_RUN, ClosedLoopUser, OpenLoopUser, thresholds_of
from loadtest.stats import counts_of

# Locust looks for users among the names of its file.
__all__ = ["ClosedLoopUser", "OpenLoopUser", "Steps"]

_log = logging.getLogger(__name__)
_SETTLE = 0.25


class Steps(LoadTestShape):
    """Each step has so many times the users of the one before, until one breaks a threshold.

    Attributes:
        done: steps measured so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.done: list[Step] = []
        self._began_s = 0.0
        self._settled: tuple[float, Counts] | None = None

    def tick(self) -> tuple[int, float] | None:
        """Users and users started a second, or None at the end; asked once a second."""
        environment = self._environment
        options, now = environment.parsed_options, self.get_run_time()
        into = now - self._began_s
        if self._settled is None and into >= _SETTLE * options.step_s:
            self._settled = (now, counts_of(environment.stats))
        elif self._settled is not None and into >= options.step_s:
            since, before = self._settled
            counts = counts_of(environment.stats) - before
            self.done.append(Step(self._users, now - since, counts))
            _log.info("step %d: %s", len(self.done), self.done[-1].row())
            broken = thresholds_of(environment).broken_by(counts)
            if broken or len(self.done) == options.max_steps:
                _log.info("the last step: %s", "; ".join(broken) or "as many as --max-steps")
                return None
            self._began_s, self._settled = now, None
        return self._users, float(self._users)

    @property
    def _users(self) -> int:
        options = self._environment.parsed_options
        return math.ceil(options.step_users * options.step_factor ** len(self.done))

    @property
    def _environment(self) -> Environment:
        if self.runner is None:
            raise RuntimeError("a shape without a runner")
        return self.runner.environment


@events.quitting.add_listener
def _report(environment: Environment, **_: Any) -> None:
    shape = environment.shape_class
    if isinstance(environment.runner, WorkerRunner) or not isinstance(shape, Steps):
        return
    options = environment.parsed_options
    if shape.done and options.csv_prefix:
        with Path(f"{options.csv_prefix}_steps.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, shape.done[0].row())
            writer.writeheader()
            writer.writerows(step.row() for step in shape.done)
    found = knee(shape.done, thresholds_of(environment))
    if environment.process_exit_code == CANNOT_RUN:
        return
    if found is None:
        _log.error("no knee: the first step breaks a threshold already")
    else:
        _log.info("knee: %s", found.row())
    environment.process_exit_code = 1 if found is None else 0
