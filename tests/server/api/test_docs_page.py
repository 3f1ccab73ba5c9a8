"""``/docs`` works where nothing but the service can be reached."""

from __future__ import annotations

import re

import pytest


@pytest.mark.parametrize("path", ["/docs", "/docs/"])
async def test_only_the_page_is_there(start_app, dummy, path):
    running = await start_app(dummy.make_release())
    assert (await running.client.get(path)).status_code == (200 if path == "/docs" else 404)


async def test_the_page_loads_nothing_of_elsewhere(start_app, dummy):
    running = await start_app(dummy.make_release())
    page = await running.client.get("/docs")
    assert page.status_code == 200
    assert "default-src 'none'" in page.headers["Content-Security-Policy"]
    assert not re.findall(r"//[a-z]", page.text)
    loaded = re.findall(r"(?:src|href)=\"([^\"]+)\"", page.text)
    assert len(loaded) == 3
    for name in loaded:
        file = await running.client.get(f"/{name}")
        assert file.status_code == 200, name
        assert len(file.content) > 500
    (document,) = re.findall(r"url: '([^']+)'", page.text)
    assert (await running.client.get(f"/{document}")).json()["info"]["title"] == "rectokens"


async def test_files_beside_are_not_served(start_app, dummy):
    running = await start_app(dummy.make_release())
    for path in ("/docs/../core.py", "/docs/%2e%2e/core.py", "/docs/nothing.js"):
        response = await running.client.get(path)
        assert (response.status_code, response.json()["error"]["code"]) == (404, "not_found")


async def test_without_the_package_there_is_no_page(start_app, dummy, monkeypatch):
    monkeypatch.setattr("server.api.docs_page.find_spec", lambda name: None)
    running = await start_app(dummy.make_release())
    assert (await running.client.get("/docs")).status_code == 404
    assert (await running.client.get("/openapi.json")).status_code == 200
