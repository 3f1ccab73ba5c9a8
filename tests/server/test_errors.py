from __future__ import annotations

import pytest

from server.errors import ERROR_TABLE, ErrorKind, ServiceError, error_body, kind_of_status


def test_every_kind_has_a_row():
    assert set(ERROR_TABLE) == set(ErrorKind)


@pytest.mark.parametrize("kind", ErrorKind)
def test_the_body_has_the_one_shape(kind):
    body = error_body(kind, "what happened", "top_k")
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["code"] == kind.value


@pytest.mark.parametrize("status", [400, 401, 403, 404, 405, 408, 413, 415, 422, 429, 500, 503])
def test_a_framework_status_keeps_its_status(status):
    assert ERROR_TABLE[kind_of_status(status)].status == status


@pytest.mark.parametrize(("status", "code"), [(418, "bad_request"), (501, "internal")])
def test_an_unforeseen_status_has_a_kind_all_the_same(status, code):
    assert kind_of_status(status) == code


@pytest.mark.parametrize(("seconds", "header"), [(0.2, "1"), (1.2, "2"), (60.0, "60")])
def test_retry_after_is_whole_seconds_and_never_zero(seconds, header):
    error = ServiceError(ErrorKind.OVERLOADED, "full", retry_after_s=seconds)
    assert error.headers == {"Retry-After": header}
    assert ServiceError(ErrorKind.OVERLOADED, "full").headers == {}
