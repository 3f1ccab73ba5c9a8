"""``/admin/uploads``: a source that is sent, streamed to disk, for a job to read."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Annotated, Literal, TypeVar

from fastapi import Path, Query, Request
from starlette.responses import Response

from server.api.admin.common import BODY_ERRORS, READ_ERRORS, admin_router, link_of
from server.api.admin.schemas import Upload, UploadList
from server.api.responses import JSONResponse, documented_errors
from server.errors import ErrorKind, ServiceError
from server.uploads import EmptyUploadError, UploadError, UploadFolder, UploadWriter

T = TypeVar("T")

PATH = "/admin/uploads"
router = admin_router()

UploadFormat = Literal["parquet", "npy", "txt", "csv", "jsonl"]
# Written at a time: small enough not to be felt in memory, large enough for the disk.
_CHUNK_BYTES = 4 << 20


@router.post(
    PATH,
    summary="Send a source",
    status_code=201,
    response_model=Upload,
    responses=documented_errors(
        *READ_ERRORS, *BODY_ERRORS, ErrorKind.DISK_FULL, ErrorKind.CLIENT_GONE
    ),
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {"application/octet-stream": {"schema": {"format": "binary"}}},
        }
    },
)
async def upload(
    request: Request,
    file_format: Annotated[
        UploadFormat, Query(alias="format", description="Of the file; its suffix.")
    ],
) -> Response:
    """The body is the file. Name what comes back as the source of a job.

    It is kept for three days. It lies on this host: a job's worker elsewhere does not see it.
    """
    folder = link_of(request).uploads
    writer = await _guarded(_begun(folder, file_format))
    try:
        pending = bytearray()
        async for chunk in request.stream():
            pending += chunk
            if len(pending) >= _CHUNK_BYTES:
                await _guarded(asyncio.to_thread(writer.write, bytes(pending)))
                pending.clear()
        await _guarded(asyncio.to_thread(writer.write, bytes(pending)))
        stored = await _guarded(asyncio.to_thread(writer.finish))
    finally:
        # Whatever happened: a file that is not finished is not there.
        await asyncio.shield(asyncio.to_thread(writer.discard))
    return JSONResponse(
        {
            "root": "uploads",
            "path": stored.name,
            "bytes": stored.num_bytes,
            "sha256": stored.sha256,
        },
        status_code=201,
    )


@router.get(
    PATH,
    summary="What was sent",
    response_model=UploadList,
    responses=documented_errors(*READ_ERRORS),
)
async def list_uploads(request: Request) -> Response:
    """Files that are there, latest first."""
    stored = await _guarded(asyncio.to_thread(link_of(request).uploads.stored))
    return JSONResponse(
        {"uploads": [{"root": "uploads", "path": s.name, "bytes": s.num_bytes} for s in stored]}
    )


@router.delete(
    PATH + "/{path}",
    summary="Delete what was sent",
    status_code=204,
    response_class=Response,
    responses=documented_errors(*READ_ERRORS, ErrorKind.NOT_FOUND),
)
async def delete_upload(
    path: Annotated[str, Path(max_length=64, description="As it was told.")], request: Request
) -> Response:
    """Jobs that name it fail from then on."""
    if not await _guarded(asyncio.to_thread(link_of(request).uploads.remove, path)):
        raise ServiceError(ErrorKind.NOT_FOUND, f"upload {path!r} is not there", param="path")
    return Response(status_code=204)


async def _begun(folder: UploadFolder, suffix: str) -> UploadWriter:
    """A file that was begun; where nobody waits for it any more, it is not left behind."""
    beginning = asyncio.ensure_future(asyncio.to_thread(folder.begin, suffix))
    try:
        return await asyncio.shield(beginning)
    except asyncio.CancelledError:
        beginning.add_done_callback(_discard)
        raise


def _discard(begun: asyncio.Future[UploadWriter]) -> None:
    if not begun.cancelled() and begun.exception() is None:
        begun.result().discard()


async def _guarded(work: Awaitable[T]) -> T:
    try:
        return await work
    except EmptyUploadError as error:
        raise ServiceError(ErrorKind.INVALID_VALUE, str(error)) from error
    except UploadError as error:
        raise ServiceError(ErrorKind.DISK_FULL, str(error)) from error
    except OSError as error:
        raise ServiceError(
            ErrorKind.STORE_UNAVAILABLE, f"uploads cannot be written: {error.strerror or error}"
        ) from error
