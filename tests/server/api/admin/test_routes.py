"""What the routes take, refuse and make of it; the jobs themselves are tested elsewhere."""

from __future__ import annotations

import asyncio
import json

from server.jobs.types import JobState
from tests.server.asgi import http_scope
from tests.waiting import LIMIT_S, until


async def params_of(admin, response):
    assert response.status_code == 202, response.text
    job = response.json()
    assert response.headers["Location"] == f"/admin/jobs/{job['id']}"
    assert job["state"] == "queued"
    params = await asyncio.to_thread(admin.link.jobs._ledger.params, job["id"])
    return job["kind"], json.loads(params)


VERSION = "0123456789abcdef"
SOURCE = {"root": "embeddings", "path": "items.parquet"}


CHANGES = [
    ("POST", "/reindex", {"source": SOURCE}, "reindex", {"source": SOURCE}),
    (
        "PATCH",
        "/items",
        {"upserts": [{"item_id": "a", "codes": [1, 2, 3]}], "deletes": ["b"]},
        "update_items",
        {"upserts": [{"item_id": "a", "codes": [1, 2, 3]}], "deletes": ["b"]},
    ),
    (
        "PUT",
        "/constraint-sets/in%20stock%2Feu",
        {"predicate": "stock > 0"},
        "put_constraint_set",
        {"name": "in stock/eu", "predicate": "stock > 0"},
    ),
    (
        "DELETE",
        "/constraint-sets/even",
        None,
        "delete_constraint_set",
        {"name": "even"},
    ),
    (
        "POST",
        f"/catalogs/{VERSION}/activate",
        {"note": "why", "expected_active": VERSION},
        "activate",
        {"catalog": VERSION, "note": "why", "expected_active": VERSION},
    ),
    ("POST", f"/catalogs/{VERSION}/activate", None, "activate", {"catalog": VERSION}),
    ("POST", f"/releases/{VERSION}/activate", None, "activate", {"release": VERSION}),
    ("POST", "/catalogs/rollback", None, "rollback", {}),
    ("POST", "/releases/rollback", {"note": "why"}, "rollback", {"note": "why"}),
    (
        "POST",
        "/catalogs/rollback",
        {"gate": {"skip": True}},
        "rollback",
        {"gate": {"skip": True}},
    ),
    (
        "POST",
        "/tokenizers",
        {"source": SOURCE, "kind": "rq-kmeans", "num_levels": 3},
        "train_tokenizer",
        {"source": SOURCE, "kind": "rq-kmeans", "num_levels": 3},
    ),
]


async def test_a_change_is_a_job(admin):
    for method, path, body, kind, params in CHANGES:
        response = await admin.request(method, path, json=body)
        assert await params_of(admin, response) == (kind, params), path


MISTAKES = [
    ("POST", "/reindex", {}, "source"),
    ("POST", "/reindex", {"source": {**SOURCE, "sql": "x"}}, "source.sql"),
    ("POST", "/reindex", {"source": SOURCE, "activate": "yes"}, "activate"),
    ("POST", "/reindex", {"source": SOURCE, "tokenizer": "../../etc"}, "tokenizer"),
    ("POST", "/reindex", {"source": {**SOURCE, "path": "x" * 2_000}}, "source.path"),
    ("PATCH", "/items", {}, None),
    ("PATCH", "/items", {"upserts": [{"item_id": ""}]}, "upserts.0.item_id"),
    ("PATCH", "/items", {"deletes": [7]}, "deletes.0"),
    ("PUT", "/constraint-sets/x", {}, "item_ids"),
    ("PUT", "/constraint-sets/x", {"item_ids": ["a"], "predicate": "b = 1"}, "item_ids"),
    ("PUT", "/constraint-sets/x", {"predicate": "read_csv('/etc/passwd')"}, "predicate"),
    ("PUT", "/constraint-sets/__all", {"item_ids": []}, "name"),
    ("PUT", "/constraint-sets/" + "n" * 201, {"item_ids": []}, "name"),
    ("POST", "/catalogs/..%2f..%2fetc/activate", None, None),
    ("POST", "/catalogs/ABCDEF0123456789/activate", None, "version"),
    ("POST", "/releases/0123/activate", None, "version"),
    ("POST", f"/releases/{VERSION}/activate", {"gate": {"min_overlap": 2.0}}, None),
    (
        "POST",
        f"/releases/{VERSION}/activate",
        {"gate": {"requests": [{"history": ["a"], "top_k": 5}, {"top_k": 5}]}},
        "gate.requests.1",
    ),
    (
        "PATCH",
        "/items",
        {"deletes": ["a"], "gate": {"requests": [{"history": [], "top_k": 10**6}]}},
        "gate.requests.0.top_k",
    ),
    ("PATCH", "/items", {"deletes": ["a"], "gate": {"nonsense": 1}}, "gate.nonsense"),
    (
        "POST",
        "/catalogs/rollback",
        {"gate": {"requests": [{"history": ["a"], "top_k": 10**6}]}},
        "gate.requests.0.top_k",
    ),
    ("POST", "/tokenizers", {"source": SOURCE, "num_levels": 65}, "num_levels"),
    ("POST", "/tokenizers", {"source": SOURCE, "codebook_size": 10**9}, "codebook_size"),
    ("GET", "/jobs?limit=0", None, "limit"),
    ("GET", f"/constraint-sets/even?offset={2**63}", None, "offset"),
    ("GET", "/jobs?state=asleep", None, "state"),
    ("GET", "/catalogs?limit=100000", None, "limit"),
]


async def test_bad_input_is_refused_and_makes_no_job(admin):
    for method, path, body, param in MISTAKES:
        response = await admin.request(method, path, json=body)
        assert response.status_code in (404, 422), (path, body, response.text)
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        if param is not None:
            assert error["param"] == param, (path, body)
            assert response.status_code == 422
    assert (await admin.get("/jobs")).json() == {"jobs": []}


async def test_a_body_that_is_no_json(admin):
    headers = {"Content-Type": "application/json"}
    twice = b'{"deletes": ["a"], "deletes": ["b"]}'
    for content, status in ((b"{", 400), (twice, 400), (b"\xff", 400), (b"[]", 422)):
        response = await admin.request("PATCH", "/items", content=content, headers=headers)
        assert response.status_code == status, content


async def test_a_body_over_the_limit_is_a_413(start_app, small_store):
    running = await start_app(
        store__path=str(small_store.root),
        admin__keys="k" * 20,
        admin__max_body_bytes="2000",
        jobs__start_worker=False,
    )
    response = await running.client.patch(
        "/admin/items",
        json={"deletes": ["x" * 100] * 30},
        headers={"Authorization": "Bearer " + "k" * 20},
    )
    assert response.status_code == 413


async def test_an_idempotency_key_gives_the_first_job_again(admin):
    key = {"Idempotency-Key": "once"}
    first = await admin.post("/reindex", {"source": SOURCE}, headers=key)
    second = await admin.post("/reindex", {"source": SOURCE}, headers=key)
    assert first.json()["id"] == second.json()["id"]
    other = await admin.post("/reindex", {"source": {**SOURCE, "path": "b.npy"}}, headers=key)
    assert (other.status_code, other.json()["error"]["code"]) == (409, "conflict")
    assert len((await admin.get("/jobs")).json()["jobs"]) == 1
    long = await admin.post("/reindex", {"source": SOURCE}, headers={"Idempotency-Key": "x" * 300})
    assert long.status_code == 422


async def test_jobs_are_listed_watched_cancelled_and_restarted(admin):
    job = (await admin.post("/catalogs/rollback")).json()
    await admin.post("/reindex", {"source": SOURCE})
    listed = (await admin.get("/jobs?kind=rollback")).json()["jobs"]
    assert [one["id"] for one in listed] == [job["id"]]
    assert "log" not in listed[0]
    assert (await admin.get(f"/jobs/{job['id']}")).json() == job

    cancelled = await admin.post(f"/jobs/{job['id']}/cancel")
    assert (cancelled.status_code, cancelled.json()["state"]) == (202, "cancelled")
    assert (await admin.get("/jobs?state=cancelled")).json()["jobs"][0]["id"] == job["id"]
    again = await admin.post(f"/jobs/{job['id']}/restart")
    assert (again.status_code, again.json()["attempt"]) == (202, 2)
    refused = await admin.post(f"/jobs/{job['id']}/restart")
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "conflict")
    for path in ("/jobs/nothing", "/jobs/nothing/events"):
        assert (await admin.get(path)).status_code == 404
    assert (await admin.post("/jobs/nothing/cancel")).status_code == 404


async def test_a_full_queue_is_a_429(admin, monkeypatch):
    monkeypatch.setattr(admin.link.jobs._ledger, "_max_queued", 1)
    assert (await admin.post("/catalogs/rollback")).status_code == 202
    response = await admin.post("/catalogs/rollback")
    assert response.status_code == 429
    assert response.headers["Retry-After"]


async def test_a_database_that_is_away_is_a_503(admin, monkeypatch):
    async def broken(*args, **kwargs):
        raise RuntimeError("the password of the database is hunter2")

    monkeypatch.setattr(admin.link.jobs, "list", broken)
    response = await admin.get("/jobs")
    assert (response.status_code, response.json()["error"]["code"]) == (503, "store_unavailable")
    assert "hunter2" not in response.text


async def test_events_follow_a_job_to_its_end(admin):
    ledger = admin.link.jobs._ledger
    job = (await admin.post("/catalogs/rollback")).json()
    seen = []

    def finish_once_watched(sent):
        if b"data: " in sent and not seen:
            seen.append(True)
            record = ledger.get(job["id"])
            ledger.finish(record, JobState.SUCCEEDED, message="done", result={"release": "x"})
        return False

    text = await watch_until(admin, job, finish_once_watched)
    first, last = events_in(text)
    assert first["state"] == "queued"
    assert (last["state"], last["result"]) == ("succeeded", {"release": "x"})
    assert admin.running.app.state.job_watchers == set()

    again = await admin.get(f"/jobs/{job['id']}/events")  # of a job that has ended
    assert again.headers["content-type"].startswith("text/event-stream")
    assert events_in(again.text) == [last]


def events_in(text):
    return [
        json.loads(line.removeprefix("data: "))
        for line in text.splitlines()
        if line.startswith("data: ")
    ]


async def test_a_watcher_who_leaves_frees_its_place(admin, monkeypatch):
    from server.api.admin import jobs

    monkeypatch.setattr(jobs, "_MAX_WATCHERS", 1)
    job = (await admin.post("/catalogs/rollback")).json()
    watching = asyncio.create_task(admin.get(f"/jobs/{job['id']}/events"))
    watchers = admin.running.app.state.job_watchers
    await until(lambda: watchers)
    refused = await admin.get(f"/jobs/{job['id']}/events")
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "overloaded")
    watching.cancel()
    await asyncio.gather(watching, return_exceptions=True)
    assert not watchers


async def watch_until(admin, job, leave):
    """Events of a job as a client sees them that leaves at some moment."""
    sent = []
    leaves = asyncio.Event()
    headers = [(b"authorization", b"Bearer a-key-of-the-tests")]
    scope = http_scope(f"/admin/jobs/{job['id']}/events", headers, "GET")
    asked = []

    async def receive():
        if not asked:
            asked.append(True)
            return {"type": "http.request", "body": b"", "more_body": False}
        await leaves.wait()
        return {"type": "http.disconnect"}

    async def send(message):
        sent.append(message.get("body", b""))
        if leave(b"".join(sent)):
            leaves.set()

    async with asyncio.timeout(LIMIT_S):
        await admin.running.app(scope, receive, send)
    return b"".join(sent).decode()


async def test_a_watcher_whose_connection_closes_is_forgotten(admin, monkeypatch):
    monkeypatch.setattr("server.api.admin.jobs._KEEP_ALIVE_S", 0.05)
    job = (await admin.post("/catalogs/rollback")).json()
    # A job that waits changes nothing, so the stream says now and then that it is there.
    seen = await watch_until(admin, job, lambda sent: sent.count(b": \n\n") >= 3)
    assert seen.count("data: ") == 1
    assert admin.running.app.state.job_watchers == set()
    line = 'rectokens_rejected_total{reason="client_gone"}'
    assert await admin.running.metric(line) == 1


async def test_a_stream_says_so_if_the_database_goes_away(admin, monkeypatch):
    job = (await admin.post("/catalogs/rollback")).json()
    get, asked = admin.link.jobs.get, []

    async def get_or_fail(job_id):
        asked.append(job_id)
        if len(asked) > 2:
            raise RuntimeError("the password of the database is hunter2")
        return await get(job_id)

    monkeypatch.setattr(admin.link.jobs, "get", get_or_fail)
    text = (await admin.get(f"/jobs/{job['id']}/events")).text
    first, last = text.strip().split("\n\n")
    assert json.loads(first.removeprefix("data: "))["id"] == job["id"]
    assert last.startswith("event: error\ndata: ")
    assert json.loads(last.partition("data: ")[2])["error"]["code"] == "store_unavailable"
    assert "hunter2" not in text
    assert admin.running.app.state.job_watchers == set()


async def test_versions_are_listed_with_what_they_are(admin, small_store, tiny_lm):
    small_store.add(2, items=50)
    served = small_store.catalogs[1]
    catalogs = (await admin.get("/catalogs")).json()
    assert catalogs["served"] == served
    by_version = {one["version"]: one for one in catalogs["catalogs"]}
    assert by_version[served]["state"] == "active"
    assert by_version[served]["fits_model"] is True
    assert by_version[small_store.catalogs[2]]["state"] == "available"
    assert by_version[small_store.catalogs[2]]["numbers"]["num_items"] == 50

    releases = (await admin.get("/releases")).json()
    assert releases["served"] == small_store.releases[1]
    assert {one["version"] for one in releases["releases"]} == set(small_store.releases.values())
    assert releases["releases"][0]["model"] == small_store.model
    assert [one["release"] for one in releases["history"]] == [small_store.releases[1]]

    (tokenizer,) = (await admin.get("/tokenizers")).json()["tokenizers"]
    assert tokenizer["version"] == small_store.tokenizer
    assert tokenizer["fits_model"] is True
    assert tokenizer["numbers"]["p_unique"] == 0.9
    detail = (await admin.get(f"/tokenizers/{small_store.tokenizer}")).json()
    assert detail["report"] == {"p_unique": 0.9}
    assert detail["fitted_on"] == {"rows": 100}
    assert (await admin.get(f"/tokenizers/{VERSION}")).status_code == 404

    (small_store.root / "catalogs" / served / "manifest.json").write_text("{")
    damaged = {one["version"]: one for one in (await admin.get("/catalogs")).json()["catalogs"]}
    assert damaged[served]["state"] == "damaged"
    assert "manifest.json" in damaged[served]["problem"]


async def test_constraint_sets_that_are_served(admin, small_store):
    sets = (await admin.get("/constraint-sets")).json()
    assert sets["catalog_version"] == small_store.catalogs[1]
    assert sets["constraint_sets"] == [{"name": "even", "num_items": 20, "predicate": None}]
    detail = (await admin.get("/constraint-sets/even?limit=3&offset=1")).json()
    assert detail["num_items"] == 20
    assert len(detail["item_ids"]) == 3
    assert all(int(item.split("-")[1]) % 2 == 0 for item in detail["item_ids"])
    assert (await admin.get("/constraint-sets/odd")).status_code == 404


async def test_drain_and_resume(admin):
    drained = await admin.post("/drain", {"timeout_ms": 1_000})
    assert drained.json() == {"phase": "draining", "idle": True}
    ready = await admin.client.get("/ready")
    assert (ready.status_code, ready.json()["error"]["code"]) == (503, "draining")
    refused = await admin.running.post({"history": []})
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
    assert (await admin.client.get("/health")).status_code == 200
    assert (await admin.post("/resume")).json() == {"phase": "ready", "idle": True}
    assert (await admin.running.post({"history": []})).status_code == 200


async def test_a_drain_waits_for_running_requests(admin):
    engine = admin.running.service.release.engine
    go_on, inside = asyncio.Event(), asyncio.Event()
    loop, run = asyncio.get_running_loop(), engine.run

    def slow(prepared, *args):
        loop.call_soon_threadsafe(inside.set)
        asyncio.run_coroutine_threadsafe(go_on.wait(), loop).result(LIMIT_S)
        return run(prepared, *args)

    engine.run = slow
    request = asyncio.create_task(admin.running.post({"history": []}))
    await inside.wait()
    short = await admin.post("/drain", {"timeout_ms": 10})
    assert short.json() == {"phase": "draining", "idle": False}
    waiting = asyncio.create_task(admin.post("/drain"))
    await asyncio.sleep(0.05)
    assert not waiting.done()
    go_on.set()
    assert (await waiting).json() == {"phase": "draining", "idle": True}
    assert (await request).status_code == 200


async def test_a_service_without_a_store_says_so(start_app, dummy):
    running = await start_app(dummy.make_release(), admin__keys="k" * 20)
    headers = {"Authorization": "Bearer " + "k" * 20}
    for path in ("jobs", "catalogs", "releases", "tokenizers", "uploads"):
        response = await running.client.get(f"/admin/{path}", headers=headers)
        assert (response.status_code, response.json()["error"]["code"]) == (409, "no_store")


async def test_jobs_are_counted_by_state(admin):
    await admin.post("/catalogs/rollback")
    await admin.link.count_jobs(admin.running.service)
    line = f'rectokens_jobs{{state="{JobState.QUEUED}"}}'
    assert await admin.running.metric(line) == 1
