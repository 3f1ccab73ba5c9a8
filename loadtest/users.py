"""What Locust's users do."""

from __future__ import annotations

import json
import random
import time
from typing import Any

from gevent.pool import Pool
from geventhttpclient.client import HTTPClientPool
from locust import FastHttpUser, task
from locust.env import Environment
from locust.exception import StopUser

from loadtest.arrivals import Arrivals
from loadtest.catalog import LoadTestError, bearer
from loadtest.figures import REFUSED
from loadtest.traffic import BATCH, Traffic, Visit, recommended_items, what_is_wrong


class Session:
    """What the users of one process share.

    Args:
        options: of the command line.

    Attributes:
        options: of the command line.
        rng: of times; that of the traffic is its own.
        traffic: makes the requests; None until the test begins.
        requests: greenlets of an open loop that wait for an answer.
        connections: of an open loop.
        lag_s: seconds each request of an open loop was sent after its time.
    """

    def __init__(self, options: Any) -> None:
        self.options = options
        self.rng = random.Random(options.traffic_seed)
        self.traffic: Traffic | None = None
        self.requests = Pool(options.max_open)
        self.connections = HTTPClientPool(concurrency=options.max_open)
        self.lag_s: list[float] = []


class RectokensUser(FastHttpUser):
    """Makes requests of the traffic of its process and checks the answers."""

    abstract = True
    session: Session

    @property
    def traffic(self) -> Traffic:
        """Of this process."""
        if self.session.traffic is None:
            raise StopUser  # the test could not begin, and is about to end
        return self.session.traffic

    def make(self, visit: Visit, due_s: float | None = None) -> None:
        """Make one request; latency counts from ``due_s`` (of ``time.perf_counter``) if given."""
        headers = {"Content-Type": "application/json", **bearer(self.session.options.api_key)}
        data = json.dumps(visit.body)
        with self.client.post(visit.path, data=data, headers=headers, catch_response=True) as reply:
            if due_s is not None:
                reply.request_meta["response_time"] = 1e3 * (time.perf_counter() - due_s)
            if reply.status_code == 429:
                reply.request_meta["name"] += REFUSED
                reply.failure("429")
                return
            if reply.status_code != 200:
                reply.failure(f"{reply.status_code or reply.error} {(reply.text or '')[:200]}")
                return
            try:
                lines = [json.loads(line) for line in reply.text.splitlines()]
                answer = lines if visit.path == BATCH else lines[0]
                wrong = what_is_wrong(visit, answer)
            except (ValueError, KeyError, TypeError, IndexError) as error:
                reply.failure(f"the answer cannot be read: {error!r}")
                return
            if wrong is not None:
                reply.failure(wrong)
                return
        self.traffic.answered(visit, recommended_items(visit, answer))


class ClosedLoopUser(RectokensUser):
    """Waits for an answer, thinks, asks again."""

    @task
    def ask(self) -> None:
        """Once."""
        self.make(self.traffic.visit())

    def wait_time(self) -> float:
        """Thinking takes exponential times."""
        mean = self.session.options.think_s
        return 0.0 if mean == 0 else self.session.rng.expovariate(1 / mean)


class OpenLoopUser(RectokensUser):
    """One arrival a second, whether or not those before it were answered."""

    def __init__(self, environment: Environment) -> None:
        self.client_pool = self.session.connections
        super().__init__(environment)
        seed = self.session.rng.randrange(2**63)
        self._arrivals = Arrivals(self.session.options.arrivals, seed, time.perf_counter())
        self._due_s: float | None = None

    @task
    def arrive(self) -> None:
        """Leave a request that is due to a greenlet of its own."""
        due_s = self._due_s
        if due_s is None:  # just begun
            return
        visit = self.traffic.visit()
        if self.session.requests.free_count() > 0:
            self.session.requests.spawn(self._send, visit, due_s)
            return
        self.environment.events.request.fire(
            request_type="POST",
            name=visit.path,
            response_time=1e3 * (time.perf_counter() - due_s),
            response_length=0,
            exception=LoadTestError(f"not sent: {self.session.options.max_open} are unanswered"),
            context={},
        )

    def wait_time(self) -> float:
        """Until the next arrival; none where it is overdue."""
        self._due_s = self._arrivals.next_s()
        return max(self._due_s - time.perf_counter(), 0.0)

    def _send(self, visit: Visit, due_s: float) -> None:
        self.session.lag_s.append(time.perf_counter() - due_s)
        self.make(visit, due_s)
