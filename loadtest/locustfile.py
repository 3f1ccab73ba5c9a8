"""For Locust: ``locust --config loadtest/open.conf --host URL``. See docs/load.md.

Exit code: 0 where the thresholds hold, 1 where they do not, 2 where the test cannot be made.
"""

from __future__ import annotations

import logging
from typing import Any

import gevent
from locust import events
from locust.env import Environment
from locust.runners import MasterRunner, WorkerRunner

from loadtest.catalog import LoadTestError, Swapper, constraint_sets, known_items
from loadtest.figures import Thresholds
from loadtest.options import add_options
from loadtest.stats import counts_of
from loadtest.traffic import Traffic
from loadtest.users import ClosedLoopUser, OpenLoopUser, RectokensUser, Session

_log = logging.getLogger(__name__)

CANNOT_RUN = 2
# Requests still unanswered at the end of an open loop get so long.
_FINISH_S = 15.0
_LATE_S = 0.05

events.init_command_line_parser.add_listener(add_options)


def thresholds_of(environment: Environment) -> Thresholds:
    """What the options allow."""
    options = environment.parsed_options
    return Thresholds(options.max_p99_ms, options.max_error_percent)


def sets_to_ask_for(environment: Environment) -> list[str]:
    """Constraint sets that every release has that may be served meanwhile.

    Raises:
        LoadTestError: the server does not tell.
    """
    options = environment.parsed_options
    if options.constraint_sets is not None:
        return [name for name in options.constraint_sets.split(",") if name]
    if options.swap_every_s > 0:
        return []
    return constraint_sets(environment.host, options.api_key)


@events.init.add_listener
def _prepare(environment: Environment, **_: Any) -> None:
    options = environment.parsed_options
    # gevent's time stands since the imports began; --run-time would be shorter by as much.
    gevent.get_hub().loop.update_now()
    RectokensUser.session = Session(options)
    environment.user_classes = [ClosedLoopUser if options.loop == "closed" else OpenLoopUser]


@events.test_start.add_listener
def _begin(environment: Environment, **_: Any) -> None:
    options, host = environment.parsed_options, environment.host
    try:
        if not host:
            raise LoadTestError("no server to load; give --host URL")
        if not isinstance(environment.runner, MasterRunner):
            items = known_items(host, options.items_file, options.api_key)
            sets = sets_to_ask_for(environment)
            _log.info("traffic about %d items and %d constraint sets", len(items), len(sets))
            # Workers ask differently from one another.
            seed = options.traffic_seed + 1_000 * getattr(environment.runner, "worker_index", 0)
            RectokensUser.session.traffic = Traffic(
                items, sets, seed=seed, max_top_k=len(items), timeout_ms=options.timeout_ms
            )
        if options.swap_every_s > 0 and not isinstance(environment.runner, WorkerRunner):
            swapper = Swapper(host, options.admin_key, options.traffic_seed)
            _Swaps.running = gevent.spawn(_Swaps.run, environment, swapper, options.swap_every_s)
    except LoadTestError as error:
        _give_up(environment, error)


class _Swaps:
    """Catalogs changing in the background."""

    running: gevent.Greenlet | None = None

    @staticmethod
    def run(environment: Environment, swapper: Swapper, every_s: float) -> None:
        done = 0
        try:
            try:
                while True:
                    gevent.sleep(every_s)
                    swapper.swap()
                    done += 1
            except gevent.GreenletExit:
                swapper.restore()
                _log.info("%d swaps", done)
        except LoadTestError as error:
            _give_up(environment, error)

    @classmethod
    def stop(cls) -> None:
        if cls.running is not None:
            cls.running.kill()
            cls.running = None


@events.test_stop.add_listener
def _end(environment: Environment, **_: Any) -> None:
    _Swaps.stop()
    session = RectokensUser.session
    session.requests.join(timeout=_FINISH_S)
    if lag := sorted(session.lag_s):
        late = lag[int(0.99 * (len(lag) - 1))]
        say = _log.warning if late > _LATE_S else _log.info
        say("requests were sent after their time by %.0f ms (p99); latency holds it", 1e3 * late)


@events.quitting.add_listener
def _judge(environment: Environment, **_: Any) -> None:
    if isinstance(environment.runner, WorkerRunner) or environment.process_exit_code is not None:
        return
    broken = thresholds_of(environment).broken_by(counts_of(environment.stats))
    for line in broken:
        _log.error("threshold broken: %s", line)
    environment.process_exit_code = 1 if broken else 0


def _give_up(environment: Environment, error: LoadTestError) -> None:
    _log.error("%s", error)
    environment.process_exit_code = CANNOT_RUN
    if environment.runner is not None:
        # Locust is not to be stopped while it starts.
        gevent.spawn_later(1.0, environment.runner.quit)
