"""What routes get from the app they belong to."""

from __future__ import annotations

from fastapi import Request

from server.service import Service


def service_of(request: Request) -> Service:
    """The service of the app that answers this request."""
    service = request.app.state.service
    if not isinstance(service, Service):
        raise TypeError(f"app.state.service is a {type(service).__name__}, not a Service")
    return service
