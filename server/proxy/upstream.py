"""Calls to the upstream over one pool of connections, and every way in which they can fail."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import httpx
import orjson

from server.api.sse import MEDIA_TYPE
from server.errors import ErrorKind, ServiceError, error_body, kind_of_status
from server.proxy.errors import ProxyError
from server.settings_serving import ProxySettings

_SHOWN_CHARS = 300
# An error's body is shown in part; reading more of it has no use.
_MAX_ERROR_BYTES = 65_536
_KEY_REFUSED = (401, 403)
_PASSED_HEADERS = ("Retry-After", "WWW-Authenticate")
# As starlette reads and writes them: whatever bytes they are, they are passed on as they came.
_HEADER_ENCODING = "latin-1"
_READY_TIMEOUT_S = 5.0
_MAX_IDLE = 64


@dataclass(frozen=True, slots=True)
class Answer:
    """What goes back to the client as it is: an answer, or a refusal that is the client's to fix.

    Attributes:
        status: 200, or 400 to 499.
        content: JSON.
        headers: that the client needs to act on it.
    """

    status: int
    content: bytes
    headers: Mapping[str, str]


class Upstream:
    """The server that takes ``prompt_embeds``.

    Args:
        settings: of the proxy.
        on_answer: told the seconds until an answer was complete or a stream began.

    Raises:
        ProxyError: no usable URL.
    """

    def __init__(self, settings: ProxySettings, on_answer: Callable[[float], None]) -> None:
        self._max_bytes = settings.max_response_bytes
        self._on_answer = on_answer
        headers = {"Accept-Encoding": "identity", "User-Agent": "rectokens-proxy"}
        self._has_key = settings.upstream_key is not None
        if settings.upstream_key is not None:
            headers["Authorization"] = f"Bearer {settings.upstream_key.get_secret_value()}"
        self._base_url = _base_url(settings.upstream)
        self._urls: dict[str, httpx.URL] = {}
        self._client = httpx.AsyncClient(
            base_url=self._base_url,
            timeout=httpx.Timeout(settings.read_timeout_s, connect=settings.connect_timeout_s),
            # Requests in flight are bounded before they get here; none waits for a connection.
            # The pool looks at every connection for every idle one: few may stay idle.
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=_MAX_IDLE),
            headers=headers,
            follow_redirects=False,
            # No proxies and no .netrc from the environment: they would see the prompts.
            trust_env=False,
        )

    async def close(self) -> None:
        """Close all connections."""
        await self._client.aclose()

    async def is_ready(self) -> bool:
        """Whether the upstream answers; a key that it asks for is the clients' affair, if we have
        none.
        """
        try:
            response = await self._client.get("/v1/models", timeout=_READY_TIMEOUT_S)
        except httpx.HTTPError:
            return False
        return response.status_code in ((200,) if self._has_key else (200, *_KEY_REFUSED))

    async def get(self, path: str, headers: Mapping[str, str]) -> Answer:
        """A GET; see ``post``."""
        return await self._whole(self._client.build_request("GET", path, headers=_as_sent(headers)))

    async def post(self, path: str, body: bytes, headers: Mapping[str, str]) -> Answer:
        """Send JSON and wait for the whole answer, which is JSON.

        Raises:
            ServiceError: 502 where the upstream cannot be reached, fails, or answers anything
                else; 503 where it is not available; 504 where it is silent for too long.
        """
        return await self._whole(self._request(path, body, headers))

    async def stream(
        self, path: str, body: bytes, headers: Mapping[str, str]
    ) -> httpx.Response | Answer:
        """Send JSON and wait for the head of a stream of events.

        Returns:
            The open response, which the caller closes; or an answer, if the upstream refuses.

        Raises:
            ServiceError: as ``post``.
        """
        started = time.perf_counter()
        with mapped_failures():
            response = await self._client.send(self._request(path, body, headers), stream=True)
            try:
                if response.status_code != 200:
                    return await self._refusal(response)
                found = response.headers.get("content-type", "")
                if not found.startswith(MEDIA_TYPE):
                    raise ServiceError(
                        ErrorKind.UPSTREAM_FAILED,
                        f"the upstream answered {found[:80]!r}; expected {MEDIA_TYPE!r}",
                    )
            except BaseException:
                await response.aclose()
                raise
        self._on_answer(time.perf_counter() - started)
        return response

    def _request(self, path: str, body: bytes, headers: Mapping[str, str]) -> httpx.Request:
        given = {"Content-Type": "application/json", **headers}
        # Whole, and made once: the client would put it together anew each time, at some cost.
        url = self._urls.get(path)
        if url is None:
            url = self._urls[path] = self._base_url.copy_with(path=self._base_url.path + path)
        return self._client.build_request("POST", url, content=body, headers=_as_sent(given))

    async def _whole(self, request: httpx.Request) -> Answer:
        started = time.perf_counter()
        with mapped_failures():
            response = await self._client.send(request, stream=True)
            try:
                if response.status_code != 200:
                    return await self._refusal(response)
                content = await _read(response, self._max_bytes)
            finally:
                await response.aclose()
        self._on_answer(time.perf_counter() - started)
        return Answer(200, content, {})

    async def _refusal(self, response: httpx.Response) -> Answer:
        """A 4xx in the one error shape, to be passed on; anything else is raised."""
        status = response.status_code
        try:
            content = await _read(response, _MAX_ERROR_BYTES)
        finally:
            await response.aclose()
        if self._has_key and status in _KEY_REFUSED:
            raise ServiceError(
                ErrorKind.UPSTREAM_FAILED,
                f"the upstream answered {status}: it does not take the proxy's key",
            )
        if 400 <= status < 500:
            response.headers.encoding = _HEADER_ENCODING
            passed = {k: response.headers[k] for k in _PASSED_HEADERS if k in response.headers}
            return Answer(status, orjson.dumps(_in_our_shape(status, content)), passed)
        retry = response.headers.get("retry-after", "")
        kind = {
            503: ErrorKind.UPSTREAM_UNAVAILABLE,
            504: ErrorKind.UPSTREAM_TIMEOUT,
        }.get(status, ErrorKind.UPSTREAM_FAILED)
        raise ServiceError(
            kind,
            f"the upstream answered {status}",
            retry_after_s=float(retry) if retry.isdecimal() and len(retry) < 6 else None,
        )


def _as_sent(headers: Mapping[str, str]) -> httpx.Headers:
    return httpx.Headers(dict(headers), encoding=_HEADER_ENCODING)


@contextmanager
def mapped_failures() -> Iterator[None]:
    """Failures of the connection as errors of ours.

    Raises:
        ServiceError: 502 or 504.
    """
    try:
        yield
    except httpx.TimeoutException as error:
        what = "accept the connection" if isinstance(error, httpx.ConnectTimeout) else "answer"
        raise ServiceError(
            ErrorKind.UPSTREAM_TIMEOUT, f"the upstream did not {what} in time"
        ) from error
    except httpx.ConnectError as error:
        raise ServiceError(
            ErrorKind.UPSTREAM_UNREACHABLE, "the upstream cannot be reached"
        ) from error
    except httpx.HTTPError as error:
        raise ServiceError(
            ErrorKind.UPSTREAM_FAILED, "the upstream broke off, or does not speak HTTP"
        ) from error


async def bounded(chunks: AsyncIterator[bytes], max_bytes: int) -> bytes:
    """All chunks as one.

    Raises:
        ServiceError: more than ``max_bytes``.
    """
    content = bytearray()
    async for chunk in chunks:
        content += chunk
        if len(content) > max_bytes:
            raise ServiceError(
                ErrorKind.UPSTREAM_FAILED, f"the upstream's answer has over {max_bytes} bytes"
            )
    return bytes(content)


async def _read(response: httpx.Response, max_bytes: int) -> bytes:
    return await bounded(response.aiter_raw(), max_bytes)


def _in_our_shape(status: int, content: bytes) -> dict[str, object]:
    """An error of the upstream, its own words kept, in the shape of all our errors."""
    ours = error_body(kind_of_status(status), content[:_SHOWN_CHARS].decode(errors="replace"))
    try:
        theirs = orjson.loads(content)
    except orjson.JSONDecodeError:
        return ours
    if isinstance(theirs, dict):
        # Older servers answer the inner object alone, others {"detail": ...}.
        inner = theirs.get("error", theirs)
        fields = inner if isinstance(inner, dict) else {"message": inner}
        message = fields.get("message", fields.get("detail"))
        for name, value in (*fields.items(), ("message", message)):
            if name in ours["error"] and isinstance(value, str):
                ours["error"][name] = value
    return ours


def _base_url(text: str | None) -> httpx.URL:
    if text is None:
        raise ProxyError("there is no upstream; give --upstream, for example http://localhost:8000")
    try:
        url = httpx.URL(text)
    except httpx.InvalidURL as error:
        raise ProxyError(f"the upstream's URL cannot be read: {error}") from error
    if (
        url.scheme not in ("http", "https")
        or not url.host
        or url.userinfo
        or (url.port or 1) >= 1 << 16
    ):
        # Not shown: it may hold a password.
        raise ProxyError(
            "the upstream's URL must be http:// or https://, a host and perhaps a port, and no user"
        )
    return url.copy_with(path=url.path.rstrip("/").removesuffix("/v1") + "/")
