"""All routers of ``/admin``, put into an app."""

from __future__ import annotations

from fastapi import Depends, FastAPI

from server.api.admin import (
    catalogs,
    constraint_sets,
    items,
    jobs,
    releases,
    service,
    tokenizers,
    uploads,
)
from server.api.admin.auth import BEARER

ADMIN_PATH = "/admin/"
UPLOADS_PATH = uploads.PATH


def include_admin(app: FastAPI) -> None:
    """Add every route of ``/admin``."""
    for module in (
        catalogs,
        items,
        constraint_sets,
        releases,
        tokenizers,
        uploads,
        jobs,
        service,
    ):
        app.include_router(module.router, dependencies=[Depends(BEARER)])
