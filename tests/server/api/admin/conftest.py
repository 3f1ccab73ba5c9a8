from __future__ import annotations

from typing import Any

import pytest

KEY = "a-key-of-the-tests"


class Admin:
    """A client of /admin that has the key."""

    def __init__(self, running: Any) -> None:
        self.running = running
        self.link = running.app.state.link
        self.client = running.client

    async def request(self, method: str, path: str, **kwargs: Any) -> Any:
        headers = {"Authorization": f"Bearer {KEY}", **kwargs.pop("headers", {})}
        return await self.client.request(method, f"/admin{path}", headers=headers, **kwargs)

    async def get(self, path: str, **kwargs: Any) -> Any:
        return await self.request("GET", path, **kwargs)

    async def post(self, path: str, body: Any = None, **kwargs: Any) -> Any:
        return await self.request("POST", path, json=body, **kwargs)


@pytest.fixture
async def admin(start_app: Any, small_store: Any) -> Admin:
    """A service that follows ``small_store``; nobody works on its jobs."""
    running = await start_app(
        store__path=str(small_store.root),
        store__poll_s="0.02",
        admin__keys=KEY,
        jobs__start_worker=False,
    )
    return Admin(running)
