"""Requests as an ASGI server hands them to the app, for messages that no client would send."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

Headers = Iterable[tuple[bytes, bytes]]


def http_scope(path: str, headers: Headers = (), method: str = "POST") -> dict[str, Any]:
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "scheme": "http",
        "headers": list(headers),
        "client": ("127.0.0.1", 1),
        "server": ("test", 80),
    }
