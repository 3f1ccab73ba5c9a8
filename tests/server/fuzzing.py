"""Requests made of an app's own OpenAPI document, right and wrong ones, and what holds of every
answer: none is a 5xx, its status, headers and body are as documented, and a request that the
document does not allow is refused.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from typing import Any

import httpx
import schemathesis
import uvicorn
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import negative_data_rejection, positive_data_acceptance

from server.run import listen
from tests.waiting import LIMIT_S

# Requests of each kind (right, wrong) and route.
EXAMPLES = int(os.environ.get("API_FUZZ_EXAMPLES", "5"))
# What JSON Schema can say is not all that a request must be: ids that exist, sizes that agree.
_NEVER_CHECKED = [positive_data_acceptance]


@contextlib.asynccontextmanager
async def on_loopback(app: Any) -> AsyncIterator[str]:
    """An app that has been started, on a free port of loopback; yields its base URL."""
    listener = listen("127.0.0.1", 0)
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            ws="none",
            lifespan="off",
            timeout_graceful_shutdown=1,
        )
    )
    task = asyncio.ensure_future(server._serve(sockets=[listener]))
    while not server.started:
        await asyncio.sleep(0.005)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        await task
        listener.close()


def fuzz(
    url: str,
    *,
    key: str,
    known: Callable[[Any], None] = lambda case: None,
    leave_out: Collection[str] = (),
    takes_anything: Collection[str] = (),
    examples: int = EXAMPLES,
) -> Mapping[str, Counter[int]]:
    """Ask every route of an app.

    Args:
        url: of the app.
        key: sent with every request; what happens without it has tests of its own.
        known: puts ids that exist into a right request; done with every second one.
        leave_out: ``METHOD /path`` that are not asked.
        takes_anything: whose body is any bytes.
        examples: right requests, and wrong ones, of each route.

    Returns:
        How often each route answered with each status.
    """
    statuses: dict[str, Counter[int]] = {}
    document = httpx.get(f"{url}/openapi.json", timeout=LIMIT_S).raise_for_status().json()
    for methods in document["paths"].values():
        for operation in methods.values():
            operation.pop("security", None)
    for found in schemathesis.openapi.from_dict(document).get_all_operations():
        operation = found.ok()
        if operation.label in leave_out:
            continue
        seen = statuses[operation.label] = Counter()
        unchecked = list(_NEVER_CHECKED)
        if operation.label in takes_anything:
            unchecked.append(negative_data_rejection)
        for mode in GenerationMode:
            adjust = known if mode is GenerationMode.POSITIVE else None
            cases = operation.as_strategy(generation_mode=mode)
            ask = _asking(cases, url, key, seen, adjust, unchecked)
            # A route without a parameter or a body cannot be asked wrongly.
            with contextlib.suppress(Unsatisfiable):
                settings(
                    max_examples=examples,
                    deadline=None,
                    database=None,
                    derandomize=True,
                    # A failure has its curl command; making it small takes longer than reading it.
                    phases=[Phase.explicit, Phase.generate],
                    suppress_health_check=list(HealthCheck),
                )(ask)()
    return statuses


def _asking(
    cases: st.SearchStrategy[Any],
    url: str,
    key: str,
    seen: Counter[int],
    adjust: Callable[[Any], None] | None,
    unchecked: list[Any],
) -> Callable[[], None]:
    @given(case=cases, with_known_ids=st.booleans())
    def ask(case: Any, with_known_ids: bool) -> None:
        _take_time(case.body)
        if adjust is not None and with_known_ids:
            adjust(case)
        response = case.call(
            base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=LIMIT_S
        )
        seen[response.status_code] += 1
        case.validate_response(response, excluded_checks=unchecked)

    return ask


def _take_time(body: Any) -> None:
    """Ask for no answer within milliseconds: that there is none is a 504, rightly."""
    if isinstance(body, dict):
        if type(body.get("timeout_ms")) is int and 0 < body["timeout_ms"] < 60_000:
            del body["timeout_ms"]
        for one in body.get("requests") if isinstance(body.get("requests"), list) else ():
            _take_time(one)
