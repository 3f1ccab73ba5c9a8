"""How the router reaches the replicas of a variant. Needs no Ray."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Protocol

from deploy.ray.asgi import HttpRequest, HttpResponse, ResponseStart


class ReplicaLostError(Exception):
    """The replica died or went away before its answer was complete; another may be asked."""


class VariantHandle(Protocol):
    """The replicas of one variant. Cancelling a call drops the request on the replica."""

    async def call(self, request: HttpRequest) -> HttpResponse:
        """The answer of one of them.

        Raises:
            ReplicaLostError: see there.
        """
        ...

    def stream(self, request: HttpRequest) -> AsyncGenerator[ResponseStart | bytes]:
        """The answer of one of them as it comes: its start, then parts of the body.

        Raises:
            ReplicaLostError: see there.
        """
        ...

    async def call_all(self, request: HttpRequest) -> list[HttpResponse]:
        """The answers of all that answer in time; empty where there is none."""
        ...
