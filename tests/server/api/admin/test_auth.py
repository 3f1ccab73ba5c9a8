"""Nobody without a key; nobody by accident."""

from __future__ import annotations

import hashlib
import hmac

import httpx
import pytest

from server.access.keys import ApiKey, digest_of, new_key
from server.api.admin import auth
from server.settings import SettingsError

KEY, OTHER = "the-first-of-two-keys", "the-second-of-two-keys"
ROUTES = [
    ("POST", "/admin/reindex"),
    ("PATCH", "/admin/items"),
    ("GET", "/admin/constraint-sets"),
    ("GET", "/admin/constraint-sets/x"),
    ("PUT", "/admin/constraint-sets/x"),
    ("DELETE", "/admin/constraint-sets/x"),
    ("GET", "/admin/catalogs"),
    ("POST", "/admin/catalogs/0123456789abcdef/activate"),
    ("POST", "/admin/catalogs/rollback"),
    ("GET", "/admin/releases"),
    ("POST", "/admin/releases/0123456789abcdef/activate"),
    ("POST", "/admin/releases/rollback"),
    ("POST", "/admin/tokenizers"),
    ("GET", "/admin/tokenizers"),
    ("GET", "/admin/tokenizers/0123456789abcdef"),
    ("POST", "/admin/uploads"),
    ("GET", "/admin/uploads"),
    ("DELETE", "/admin/uploads/x"),
    ("GET", "/admin/jobs"),
    ("GET", "/admin/jobs/x"),
    ("GET", "/admin/jobs/x/events"),
    ("POST", "/admin/jobs/x/cancel"),
    ("POST", "/admin/jobs/x/restart"),
    ("POST", "/admin/drain"),
    ("POST", "/admin/resume"),
]


def bearer(key):
    return {"Authorization": f"Bearer {key}"}


async def test_the_list_above_is_complete(start_app, dummy):
    running = await start_app(dummy.make_release())
    paths = (await running.client.get("/openapi.json")).json()["paths"]
    there = {
        (method.upper(), path)
        for path, methods in paths.items()
        if path.startswith("/admin")
        for method in methods
    }
    filled = {
        (method, path.replace("0123456789abcdef", "{version}").replace("/x", "/{}"))
        for method, path in ROUTES
    }
    for name in ("{job_id}", "{name}", "{path}"):
        there = {(method, path.replace(name, "{}")) for method, path in there}
    assert filled == there


async def test_every_route_is_documented(start_app, dummy):
    running = await start_app(dummy.make_release())
    openapi = (await running.client.get("/openapi.json")).json()
    assert openapi["components"]["securitySchemes"]["AdminKey"]["scheme"] == "bearer"
    for path, methods in openapi["paths"].items():
        for method, route in methods.items() if path.startswith("/admin") else ():
            where = f"{method} {path}"
            assert route["security"] == [{"AdminKey": []}], where
            assert route["tags"] == ["admin"], where
            assert route["summary"], where
            assert route["description"], where
            assert {"401", "403", "422"} <= route["responses"].keys(), where
            if method in ("put", "patch"):
                assert route["requestBody"]["required"], where


async def test_every_route_is_closed_without_a_key(start_app, dummy):
    running = await start_app(dummy.make_release())
    for method, path in ROUTES:
        response = await running.client.request(method, path, content=b"{not json")
        assert response.status_code == 403, path
        assert response.json()["error"]["code"] == "forbidden"
        assert "RECTOKENS_ADMIN__KEYS" in response.json()["error"]["message"]


async def test_every_route_asks_for_the_key_before_it_reads_the_body(start_app, dummy):
    running = await start_app(dummy.make_release(), admin__keys=KEY)
    for method, path in ROUTES:
        response = await running.client.request(
            method, path, content=b"{not json", headers=bearer("wrong")
        )
        assert response.status_code == 401, path
        assert response.json()["error"]["code"] == "unauthorized"
        assert response.headers["WWW-Authenticate"] == "Bearer"


@pytest.mark.parametrize(
    "authorization",
    [
        "",
        KEY,
        f"Basic {KEY}",
        f"Bearer {KEY[:-1]}",
        f"Bearer {KEY}x",
        f"Bearer {KEY.upper()}",
        "Bearer ",
        f"Bearer {KEY},{OTHER}",
    ],
)
async def test_wrong_keys(start_app, dummy, authorization):
    running = await start_app(dummy.make_release(), admin__keys=f"{KEY},{OTHER}")
    headers = {"Authorization": authorization} if authorization else {}
    response = await running.client.post("/admin/resume", headers=headers)
    assert response.status_code == 401
    assert KEY not in response.text


async def test_each_of_several_keys_opens(start_app, dummy, tmp_path):
    file = tmp_path / "keys"
    file.write_text(ApiKey("ops", digest_of("the-third-key-in-a-file")).line())
    running = await start_app(
        dummy.make_release(), admin__keys=f"{KEY}, {OTHER}", admin__keys_file=str(file)
    )
    for key in (KEY, OTHER, "the-third-key-in-a-file"):
        assert (await running.client.post("/admin/resume", headers=bearer(key))).status_code == 200
    assert await running.metric('rectokens_rejected_total{reason="unauthorized"}') == 0


async def test_keys_of_the_file_are_replaced_while_the_service_runs(start_app, dummy, tmp_path):
    old, new = new_key(), new_key()
    file = tmp_path / "keys"
    file.write_text(ApiKey("ops", digest_of(old)).line())
    running = await start_app(
        dummy.make_release(), admin__keys_file=str(file), access__reload_s="0"
    )

    async def status(key):
        return (await running.client.post("/admin/resume", headers=bearer(key))).status_code

    assert (await status(old), await status(new)) == (200, 401)
    file.write_text(ApiKey("ops", digest_of(new)).line())
    assert (await status(old), await status(new)) == (401, 200)
    file.write_text("")  # nobody; not everybody
    assert (await status(old), await status(new)) == (401, 401)
    file.write_text(ApiKey("ops", digest_of(new), expires_s=1.0).line())
    refused = await running.client.post("/admin/resume", headers=bearer(new))
    assert refused.json()["error"]["message"] == "the admin key of ops has expired"


@pytest.mark.parametrize(
    "content", [b"the-key-itself-and-not-its-hash\n", "schlüssel".encode(), b"\xff"]
)
async def test_a_bad_file_of_keys_stops_the_start(start_app, dummy, tmp_path, content):
    file = tmp_path / "keys"
    file.write_bytes(content)
    with pytest.raises(SettingsError, match="KEYS_FILE"):
        await start_app(dummy.make_release(), admin__keys_file=str(file))
    with pytest.raises(SettingsError, match="KEYS_FILE"):
        await start_app(dummy.make_release(), admin__keys_file=str(tmp_path / "nowhere"))


async def test_keys_are_compared_in_constant_time_all_of_them(start_app, dummy, monkeypatch):
    compared = []
    compare_digest = hmac.compare_digest

    def spy(one, other):
        compared.append((one, other))
        return compare_digest(one, other)

    running = await start_app(dummy.make_release(), admin__keys=f"{KEY},{OTHER}")
    monkeypatch.setattr(auth.hmac, "compare_digest", spy)
    for given in (KEY, "x", "y" * 5_000):
        compared.clear()
        await running.client.post("/admin/resume", headers=bearer(given))
        # Digests of one length, so that not even the length of what was given matters.
        digest = hashlib.sha256(given.encode()).digest()
        assert [other for _, other in compared] == [digest, digest]
        assert {len(one) for one, _ in compared} == {32}


def client_from(running, host, **kwargs):
    transport = httpx.ASGITransport(running.app, client=(host, 1234))
    return httpx.AsyncClient(transport=transport, base_url="http://localhost", **kwargs)


@pytest.mark.parametrize(
    ("host", "headers", "status"),
    [
        ("127.0.0.1", {}, 200),
        ("127.8.9.1", {}, 200),
        ("::1", {}, 200),
        ("::ffff:127.0.0.1", {}, 200),
        ("127.0.0.1", {"Host": "[::1]:8000"}, 200),
        ("127.0.0.1", {"Origin": "http://localhost:3000"}, 200),
        ("10.0.0.7", {}, 403),
        ("::ffff:10.0.0.7", {}, 403),
        ("127.0.0.1", {"X-Forwarded-For": "127.0.0.1"}, 403),
        ("127.0.0.1", {"Forwarded": "for=127.0.0.1"}, 403),
        ("127.0.0.1", {"X-Real-IP": "127.0.0.1"}, 403),
        ("127.0.0.1", {"Via": "1.1 proxy"}, 403),
        ("127.0.0.1", {"Host": "rebound.example"}, 403),
        ("127.0.0.1", {"Origin": "https://site.example"}, 403),
        ("127.0.0.1", {"Origin": "null"}, 403),
        ("localhost.example", {}, 403),
    ],
)
async def test_open_on_loopback(start_app, dummy, host, headers, status):
    running = await start_app(dummy.make_release(), admin__open_on_loopback=True)
    async with client_from(running, host) as client:
        assert (await client.post("/admin/resume", headers=headers)).status_code == status


async def test_with_a_key_loopback_is_not_open(start_app, dummy):
    running = await start_app(dummy.make_release(), admin__open_on_loopback=True, admin__keys=KEY)
    async with client_from(running, "127.0.0.1") as client:
        assert (await client.post("/admin/resume")).status_code == 401
