"""Ports for servers that are told theirs before they listen."""

from __future__ import annotations

import random
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")


def port_to_come() -> int:
    """A free port of loopback that nobody gets by chance before it is listened on.

    Connections, and servers that ask for any port, are given those from where the system's range
    begins; this one is below.
    """
    begins = int(_RANGE.read_text().split()[0]) if _RANGE.exists() else 32_768
    # Processes that run tests at the same time must not choose alike.
    chance = random.SystemRandom()
    while True:
        port = chance.randrange(begins // 2, begins)
        with socket.socket() as one:
            try:
                one.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


@contextmanager
def port_of_nobody() -> Iterator[int]:
    """A port of loopback on which nobody listens for as long as the block lasts."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        yield int(one.getsockname()[1])
