"""``/admin/items``: single items come, change and go."""

from __future__ import annotations

from fastapi import Request
from starlette.responses import Response

from server.api.admin.common import (
    ACCEPTED,
    SUBMIT_ERRORS,
    IdempotencyKey,
    admin_router,
    submit,
)
from server.api.admin.gates import check_gate
from server.api.responses import documented_errors
from server.jobs.params import UpdateItemsParams
from server.jobs.types import JobKind

router = admin_router()


@router.patch(
    "/admin/items",
    summary="Add, change and delete items",
    responses=documented_errors(*SUBMIT_ERRORS),
    **ACCEPTED,
)
async def update_items(
    body: UpdateItemsParams, request: Request, key: IdempotencyKey = None
) -> Response:
    """A new catalog version without encoding the rest again, served within seconds.

    An item that is new needs an `embedding`, which is encoded, or its `codes`. What is left out of
    an item that is there stays as it is.
    """
    check_gate(body.gate, request)
    return await submit(request, JobKind.UPDATE_ITEMS, body, key)
