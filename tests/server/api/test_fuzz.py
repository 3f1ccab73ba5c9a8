"""The service asked at random, by its own OpenAPI document. `API_FUZZ_EXAMPLES=300` for long."""

from __future__ import annotations

import asyncio
from typing import Any

KEY = "a-key-of-the-tests"
# It would only show what every route says while the service ends.
ENDS_THE_TRAFFIC = "POST /admin/drain"
UPLOAD = "POST /admin/uploads"


async def test_every_answer_is_documented_and_none_is_a_5xx(start_app, small_store, fuzzing):
    running = await start_app(
        store__path=str(small_store.root),
        store__poll_s="0.02",
        admin__keys=KEY,
        jobs__start_worker=False,
        # All of them are left waiting.
        jobs__max_queued="100000",
    )
    item_ids = running.service.require_release().catalog.ids_of([0, 1, 2])

    def known(case: Any) -> None:
        if isinstance(case.body, dict):
            for name in {"history", "items", "allow_items", "exclude_items"} & case.body.keys():
                case.body[name] = item_ids
            if "prompt" in case.body:
                case.body.update(prompt="".join(f"<item:{one}>" for one in item_ids), n=2)
                case.body["model"] = "rectokens"
        parameters = case.path_parameters or {}
        if "version" in parameters:
            of_releases = "/releases/" in case.path
            parameters["version"] = (small_store.releases if of_releases else small_store.catalogs)[
                1
            ]
        if "name" in parameters:
            parameters["name"] = "even"
            if isinstance(case.body, dict):
                case.body = {"item_ids": item_ids}

    async with fuzzing.on_loopback(running.app) as url:
        statuses = await asyncio.to_thread(
            fuzzing.fuzz,
            url,
            key=KEY,
            known=known,
            leave_out={ENDS_THE_TRAFFIC},
            takes_anything={UPLOAD},
        )
    paths = running.app.openapi()["paths"]
    everything = {f"{method.upper()} {path}" for path in paths for method in paths[path]}
    assert statuses.keys() == everything - {ENDS_THE_TRAFFIC}
    for label in (
        "POST /v1/recommend",
        "POST /v1/recommend/batch",
        "POST /v1/score",
        "POST /admin/reindex",
        "PUT /admin/constraint-sets/{name}",
        "GET /admin/constraint-sets/{name}",
    ):
        assert any(status < 300 for status in statuses[label]), (label, statuses[label])
        assert any(status >= 400 for status in statuses[label]), (label, statuses[label])
