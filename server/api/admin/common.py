"""What the admin routes share: what they find in the app, how they answer, what may go wrong."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Annotated, Any, TypeVar

import structlog
from fastapi import APIRouter, Header, Path, Request
from starlette.responses import Response

from rectokens.artifacts.errors import ArtifactError
from server.api.admin.auth import AdminRoute
from server.api.responses import JSONResponse
from server.errors import ErrorKind, ServiceError, invalid
from server.following import StoreLink
from server.jobs.params import Params
from server.jobs.types import (
    InvalidJobError,
    Job,
    JobConflictError,
    JobKind,
    JobQueueFullError,
    UnknownJobError,
)

T = TypeVar("T")

_log = structlog.get_logger(__name__)

VERSION = r"^[0-9a-f]{16}$"

Version = Annotated[str, Path(pattern=VERSION, description="Of an artifact.")]
IdempotencyKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        min_length=1,
        max_length=200,
        description="A repeated request with the same key gets the first one's job.",
    ),
]

GUARD_ERRORS = (ErrorKind.UNAUTHORIZED, ErrorKind.FORBIDDEN)
READ_ERRORS = (
    *GUARD_ERRORS,
    ErrorKind.INVALID_VALUE,
    ErrorKind.NO_STORE,
    ErrorKind.STORE_UNAVAILABLE,
)
BODY_ERRORS = (
    ErrorKind.MALFORMED_JSON,
    ErrorKind.BAD_REQUEST,
    ErrorKind.BODY_TIMEOUT,
    ErrorKind.BODY_TOO_LARGE,
    ErrorKind.UNSUPPORTED_MEDIA_TYPE,
)
SUBMIT_ERRORS = (*READ_ERRORS, *BODY_ERRORS, ErrorKind.CONFLICT, ErrorKind.OVERLOADED)

ACCEPTED: Mapping[str, Any] = {
    "status_code": 202,
    "response_model": Job,
    "response_description": "The job; `Location` is where to watch it.",
}


def admin_router() -> APIRouter:
    """A router whose routes need the key."""
    return APIRouter(tags=["admin"], route_class=AdminRoute)


def link_of(request: Request) -> StoreLink:
    """The service's link to its store.

    Raises:
        ServiceError: it follows none.
    """
    link = request.app.state.link
    if link is None:
        raise ServiceError(
            ErrorKind.NO_STORE,
            "this service serves a fixed release; start it with --store.path to change it here",
        )
    if not isinstance(link, StoreLink):
        raise TypeError(f"app.state.link is a {type(link).__name__}, not a StoreLink")
    return link


async def submit(
    request: Request, kind: JobKind, params: Params, idempotency_key: str | None
) -> Response:
    """Queue a job and answer with it.

    Raises:
        ServiceError: see :func:`translated`.
    """
    link = link_of(request)
    job = await translated(link.jobs.submit(kind, params, idempotency_key=idempotency_key))
    _log.info("job submitted", job=job.id, kind=str(kind))
    return job_response(job, status=202)


def job_response(job: Job, status: int = 200) -> Response:
    """A job, and where to find it again."""
    return JSONResponse(
        job.model_dump(mode="json"),
        status_code=status,
        headers={"Location": f"/admin/jobs/{job.id}"},
    )


async def translated(work: Awaitable[T]) -> T:
    """The result of a call to the jobs or the store, its errors as the caller shall see them.

    Raises:
        ServiceError: 404, 409, 422, 429, or 503 where the place that keeps them fails.
    """
    try:
        return await work
    except ServiceError:
        raise
    except UnknownJobError as error:
        raise ServiceError(ErrorKind.NOT_FOUND, str(error), param="id") from error
    except InvalidJobError as error:
        raise ServiceError(ErrorKind.INVALID_VALUE, str(error), param=error.param) from error
    except JobConflictError as error:
        raise ServiceError(ErrorKind.CONFLICT, str(error)) from error
    except JobQueueFullError as error:
        raise ServiceError(ErrorKind.OVERLOADED, str(error), retry_after_s=10.0) from error
    except (ArtifactError, OSError) as error:
        raise ServiceError(ErrorKind.STORE_UNAVAILABLE, str(error)) from error
    except Exception as error:
        # sqlite3, redis, psycopg and fsspec each have errors of their own.
        _log.exception("the store or the jobs' database failed")
        raise ServiceError(
            ErrorKind.STORE_UNAVAILABLE,
            "the store or the jobs' database cannot be used just now; the log says why",
        ) from error


async def from_store(function: Callable[..., T], *args: Any) -> T:
    """The result of a blocking call to the store.

    Raises:
        ServiceError: see :func:`translated`.
    """
    return await translated(asyncio.to_thread(function, *args))


def bounded(name: str, value: int, most: int) -> int:
    """A number of the query string.

    Raises:
        ServiceError: outside 1 to ``most``.
    """
    if not 1 <= value <= most:
        raise invalid(name, f"{name} is {value}; allowed are 1 to {most}")
    return value
