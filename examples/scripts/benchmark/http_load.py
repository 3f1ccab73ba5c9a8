"""A small HTTP/1.1 client and the two ways to load a server with it.

Clients made for comfort take longer for a request than the service does; this one writes prepared
bytes on connections that stay open and reads status and body, so that the server is measured.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

_HEADER_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class Reply:
    """One answer.

    Attributes:
        status: HTTP status; 0 where there was no answer.
        body: of it.
        seconds: from the first byte sent to the last byte read.
        sent_s: monotonic time at which it was sent.
    """

    status: int
    body: bytes
    seconds: float
    sent_s: float


def percentile(values: Sequence[float], part: float) -> float:
    """The value that so large a part does not exceed; NaN where there are none."""
    if not values:
        return float("nan")
    ordered = sorted(values)
    return ordered[min(int(part * len(ordered)), len(ordered) - 1)]


class Connections:
    """Keep-alive connections to one server. Close them.

    Args:
        base_url: ``http://host:port``.
        path: of every request.
    """

    def __init__(self, base_url: str, path: str) -> None:
        parts = urlsplit(base_url)
        self._host, self._port = parts.hostname or "127.0.0.1", parts.port or 80
        self._head = f"POST {path} HTTP/1.1\r\nHost: {parts.netloc}\r\n"
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def post(self, body: bytes) -> Reply:
        """Send JSON; a connection is opened where none is idle."""
        reader, writer = self._idle.pop() if self._idle else await self._open()
        head = f"{self._head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        started = time.monotonic()
        try:
            writer.write(head.encode() + body)
            status, answer = await _read_answer(reader)
        except (OSError, EOFError, asyncio.LimitOverrunError):
            writer.close()
            return Reply(0, b"", time.monotonic() - started, started)
        reply = Reply(status, answer, time.monotonic() - started, started)
        self._idle.append((reader, writer))
        return reply

    async def open(self, count: int) -> None:
        """Have at least so many idle connections, as a proxy before the server has."""
        while len(self._idle) < count:
            self._idle.append(await self._open())

    async def close(self) -> None:
        """Close all connections; none may be in use."""
        for _, writer in self._idle:
            writer.close()
        self._idle.clear()

    async def _open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection(self._host, self._port, limit=_HEADER_BYTES)


async def _read_answer(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    lines = head.split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines[1:] if ": " in line)
    return int(lines[0].split(" ")[1]), await reader.readexactly(int(headers["content-length"]))


async def closed_loop(
    connections: Connections, bodies: Iterator[bytes], clients: int, seconds: float
) -> list[Reply]:
    """So many clients, each sending as soon as it is answered; replies in order of answer."""
    replies: list[Reply] = []
    ends = time.monotonic() + seconds

    async def client() -> None:
        while time.monotonic() < ends:
            replies.append(await connections.post(next(bodies)))

    await asyncio.gather(*(client() for _ in range(clients)))
    return replies


@dataclass(frozen=True, slots=True)
class OpenLoad:
    """What came of requests that arrive whether or not the server keeps up.

    Attributes:
        replies: in order of answer.
        lag_s: seconds each was sent after its time, because the client itself was late.
        unsent: arrivals left out because ``max_open`` were unanswered.
    """

    replies: Sequence[Reply]
    lag_s: Sequence[float]
    unsent: int


async def open_loop(
    connections: Connections,
    bodies: Iterator[bytes],
    rate: float,
    seconds: float,
    *,
    max_open: int,
    seed: int,
    every: Callable[[float], None] = lambda elapsed: None,
) -> OpenLoad:
    """Poisson arrivals at ``rate`` a second.

    Args:
        connections: to the server.
        bodies: of the requests.
        rate: arrivals a second.
        seconds: how long.
        max_open: most requests unanswered at once; the load is bounded whatever the server does.
        seed: of the arrivals.
        every: told the seconds since the start about ten times a second.
    """
    rng = random.Random(seed)
    replies: list[Reply] = []
    lag_s: list[float] = []
    tasks: set[asyncio.Task[None]] = set()
    unsent = 0

    async def send(due: float) -> None:
        reply = await connections.post(next(bodies))
        lag_s.append(reply.sent_s - due)
        replies.append(reply)

    started = time.monotonic()
    due, told = started, started
    while due < started + seconds:
        if (wait := due - time.monotonic()) > 0:
            await asyncio.sleep(wait)
        if len(tasks) < max_open:
            task = asyncio.create_task(send(due))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        else:
            unsent += 1
        if (now := time.monotonic()) > told + 0.1:
            every(now - started)
            told = now
            # Arrivals that are overdue must not keep answers from being read.
            await asyncio.sleep(0)
        due += rng.expovariate(rate)
    await asyncio.gather(*tasks)
    return OpenLoad(replies, lag_s, unsent)
