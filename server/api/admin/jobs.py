"""``/admin/jobs``: what was asked for, how far it is, and stopping it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Annotated

from fastapi import Path, Query, Request
from starlette.responses import Response

from server.api.admin.common import (
    READ_ERRORS,
    admin_router,
    job_response,
    link_of,
    translated,
)
from server.api.admin.schemas import JobList
from server.api.dependencies import service_of
from server.api.responses import JSONResponse, documented_errors
from server.api.sse import KEEP_ALIVE, MEDIA_TYPE, EventStream, event
from server.errors import ErrorKind, ServiceError, error_body
from server.jobs.manager import JobManager
from server.jobs.types import Job, JobKind, JobState

router = admin_router()

# Each watcher polls the jobs' database.
_MAX_WATCHERS = 32
# Proxies close what is silent, mostly after a minute.
_KEEP_ALIVE_S = 15.0

JobId = Annotated[str, Path(max_length=64, description="Of the job.")]


@router.get(
    "/admin/jobs",
    summary="Jobs, latest first",
    response_model=JobList,
    responses=documented_errors(*READ_ERRORS),
)
async def list_jobs(
    request: Request,
    kind: Annotated[JobKind | None, Query(description="Only of this kind.")] = None,
    state: Annotated[JobState | None, Query(description="Only in this state.")] = None,
    limit: Annotated[int, Query(ge=1, le=1_000, description="Most jobs told.")] = 50,
) -> Response:
    """What was asked for lately, without the logs."""
    jobs = await translated(
        link_of(request).jobs.list(
            kinds=None if kind is None else [kind],
            states=None if state is None else [state],
            limit=limit,
        )
    )
    return JSONResponse({"jobs": [job.model_dump(mode="json", exclude={"log"}) for job in jobs]})


@router.get(
    "/admin/jobs/{job_id}",
    summary="One job",
    response_model=Job,
    responses=documented_errors(*READ_ERRORS, ErrorKind.NOT_FOUND),
)
async def get_job(job_id: JobId, request: Request) -> Response:
    """State, progress, the last lines of its log, and what came of it."""
    return job_response(await translated(link_of(request).jobs.get(job_id)))


@router.post(
    "/admin/jobs/{job_id}/cancel",
    summary="Stop a job",
    status_code=202,
    response_model=Job,
    responses=documented_errors(*READ_ERRORS, ErrorKind.NOT_FOUND, ErrorKind.CONFLICT),
)
async def cancel_job(job_id: JobId, request: Request) -> Response:
    """A job that waits is cancelled at once; one that runs soon. 409 once it has ended."""
    return job_response(await translated(link_of(request).jobs.cancel(job_id)), status=202)


@router.post(
    "/admin/jobs/{job_id}/restart",
    summary="Run a job again",
    status_code=202,
    response_model=Job,
    responses=documented_errors(
        *READ_ERRORS, ErrorKind.NOT_FOUND, ErrorKind.CONFLICT, ErrorKind.OVERLOADED
    ),
)
async def restart_job(job_id: JobId, request: Request) -> Response:
    """Only what failed, was cancelled or was interrupted; with the parameters it had."""
    return job_response(await translated(link_of(request).jobs.restart(job_id)), status=202)


@router.get(
    "/admin/jobs/{job_id}/events",
    summary="Watch a job",
    response_class=Response,
    responses={
        200: {
            "description": "Server-sent events; the data of each is the job as it is then. The "
            "stream ends with the job, or with an event named error if it can be watched no more.",
            "content": {MEDIA_TYPE: {"schema": {"type": "string"}}},
        },
        **documented_errors(*READ_ERRORS, ErrorKind.NOT_FOUND, ErrorKind.OVERLOADED),
    },
)
async def watch_job(job_id: JobId, request: Request) -> Response:
    """The job now, then whenever it has changed, until it has ended."""
    jobs = link_of(request).jobs
    watchers: set[object] = request.app.state.job_watchers
    await translated(jobs.get(job_id))
    if len(watchers) >= _MAX_WATCHERS:
        raise ServiceError(
            ErrorKind.OVERLOADED,
            f"{len(watchers)} clients watch jobs; at most {_MAX_WATCHERS} may",
            retry_after_s=5.0,
        )
    place = object()
    watchers.add(place)

    async def leave() -> None:
        watchers.discard(place)

    return EventStream(_events(jobs, job_id), service_of(request).metrics.rejected, leave)


async def _events(jobs: JobManager, job_id: str) -> AsyncGenerator[bytes, None]:
    """The job whenever it has changed; a comment now and then, so that nobody hangs up."""
    updates = jobs.subscribe(job_id)
    following = asyncio.ensure_future(anext(updates, None))
    try:
        while True:
            done, _ = await asyncio.wait({following}, timeout=_KEEP_ALIVE_S)
            if not done:
                yield KEEP_ALIVE
                continue
            try:
                job = await translated(following)
            except ServiceError as error:
                # The head of the answer is out; what is left is to say it here.
                yield event(error_body(error.kind, error.message, error.param), name="error")
                return
            if job is None:
                return
            yield event(job.model_dump(mode="json"))
            following = asyncio.ensure_future(anext(updates, None))
    finally:
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
