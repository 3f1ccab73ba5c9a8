"""One error shape on every route, the framework's own errors included."""

from __future__ import annotations

import pytest

from server.api.schemas import ErrorResponse
from server.errors import ERROR_TABLE


@pytest.fixture
async def running(start_app, dummy):
    return await start_app(dummy.make_release())


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/", 404, "not_found"),
        ("GET", "/v1/nothing", 404, "not_found"),
        ("POST", "/v1/recommend/", 404, "not_found"),
        ("GET", "/v1/recommend", 405, "method_not_allowed"),
        ("PUT", "/v1/recommend", 405, "method_not_allowed"),
        ("DELETE", "/health", 405, "method_not_allowed"),
        ("POST", "/v1/models", 405, "method_not_allowed"),
        ("GET", "/../../etc/passwd", 404, "not_found"),
        ("GET", "/" + "x" * 5_000, 404, "not_found"),
    ],
)
async def test_the_framework_s_own_errors(running, method, path, status, code):
    response = await running.client.request(method, path)
    assert response.status_code == status
    assert response.headers["content-type"] == "application/json"
    error = ErrorResponse.model_validate_json(response.text, strict=True).error
    assert error.code == code
    assert len(error.message) < 200
    assert method in error.message
    if status == 405:
        assert response.headers["allow"]


async def test_every_route_documents_its_errors_in_the_one_shape(running):
    spec = (await running.client.get("/openapi.json")).json()
    operations = [
        (path, method, operation)
        for path, methods in spec["paths"].items()
        for method, operation in methods.items()
    ]
    paths = {path for path, _, _ in operations}
    assert {path for path in paths if not path.startswith("/admin/")} == {
        "/v1/recommend",
        "/v1/recommend/batch",
        "/v1/score",
        "/v1/completions",
        "/v1/models",
        "/health",
        "/ready",
        "/metrics",
    }
    shape = {"$ref": "#/components/schemas/ErrorResponse"}
    for path, _, operation in operations:
        assert operation["summary"], path
        errors = {k: v for k, v in operation["responses"].items() if not k.startswith("2")}
        assert "500" in errors, path
        for status, response in errors.items():
            assert response["content"]["application/json"]["schema"] == shape, (path, status)
    assert "HTTPValidationError" not in spec["components"]["schemas"]


async def test_recommend_documents_every_status_it_can_answer(running):
    spec = (await running.client.get("/openapi.json")).json()
    recommend = spec["paths"]["/v1/recommend"]["post"]
    documented = set(recommend["responses"])
    # 403, 409 and 507 are of /admin, 404 and 405 of another path; nobody reads a 499; 431 is
    # said before there is a route; 502 is the proxy's.
    not_its_own = {403, 404, 405, 409, 431, 499, 502, 507}
    assert documented == {"200"} | {
        str(spec.status) for spec in ERROR_TABLE.values() if spec.status not in not_its_own
    }


async def test_the_request_has_an_example_that_works(running):
    spec = (await running.client.get("/openapi.json")).json()
    (example,) = spec["components"]["schemas"]["RecommendRequest"]["examples"]
    assert (await running.post({**example, "history": ["B001", "B002"]})).status_code == 200


async def test_the_response_s_example_is_a_response(running):
    from server.api.schemas import RecommendResponse

    spec = (await running.client.get("/openapi.json")).json()
    (example,) = spec["components"]["schemas"]["RecommendResponse"]["examples"]
    RecommendResponse.model_validate(example)


async def test_there_is_a_page_of_documentation(running):
    response = await running.client.get("/docs")
    assert response.status_code == 200
    assert "swagger" in response.text
