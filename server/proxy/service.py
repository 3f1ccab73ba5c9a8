"""The running proxy: from a request, read, to what the upstream says."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import anyio
import structlog

from server.errors import ErrorKind, ServiceError, invalid
from server.proxy.ahead import AheadEncoder
from server.proxy.bodies import written
from server.proxy.embedding_table import open_embedding_table
from server.proxy.encoder import EmbedsEncoder, EncodedPrompt
from server.proxy.errors import ProxyError
from server.proxy.metrics import ProxyMetrics
from server.proxy.prompts import ProxyPrompts, load_prompts
from server.proxy.requests import Chat, ProxyRequest, TextsOrIds
from server.proxy.upstream import Upstream
from server.settings import Settings
from server.settings_serving import ProxySettings

_log = structlog.get_logger(__name__)

T = TypeVar("T")


@dataclass(frozen=True, slots=True, eq=False)
class ProxyParts:
    """What of a proxy belongs to one model and one catalog.

    Attributes:
        prompts: text and chats to token ids.
        encoder: token ids to ``prompt_embeds``.
    """

    prompts: ProxyPrompts
    encoder: EmbedsEncoder


class Proxy:
    """Turns prompts into embeddings and sends them on.

    Args:
        settings: of the proxy.
        parts: of the model and the catalog that it begins with.

    Raises:
        ProxyError: no usable upstream.
    """

    def __init__(self, settings: ProxySettings, parts: ProxyParts) -> None:
        self.settings = settings
        self.metrics = ProxyMetrics()
        self.metrics.in_flight.set_function(lambda: self._in_flight)
        self.upstream = Upstream(settings, self.metrics.upstream_answered)
        self._parts = parts
        self._ahead = AheadEncoder(lambda: self._in_flight > 0)
        self._pool = ThreadPoolExecutor(settings.encode_threads, thread_name_prefix="encode")
        self._in_flight = 0
        self._started = False
        self._draining = False
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def hidden_size(self) -> int:
        """H of the embeddings that are sent."""
        return self._parts.encoder.table.hidden_size

    def start(self) -> None:
        """Begin work of its own, in the event loop that runs; :meth:`stop` ends it."""
        self._started = True
        self._encode_ahead()
        # httpx would have this import half of anyio during the first prompt.
        anyio.Event()

    def replace(self, parts: ProxyParts) -> None:
        """Encode with another model or catalog from the next request on; from any thread."""
        self._parts = parts
        if self._started:
            self._encode_ahead()

    def require_running(self) -> None:
        """Raise if the proxy is shutting down.

        Raises:
            ServiceError: 503.
        """
        if self._draining:
            raise ServiceError(ErrorKind.DRAINING, "the proxy is shutting down")

    @contextmanager
    def in_flight(self) -> Iterator[None]:
        """Count a request while it is being answered.

        Raises:
            ServiceError: 429, there are too many; 503, shutting down.
        """
        self.require_running()
        if self._in_flight >= self.settings.max_in_flight:
            raise ServiceError(
                ErrorKind.OVERLOADED,
                f"{self._in_flight} requests are in flight; at most {self.settings.max_in_flight}",
                retry_after_s=1.0,
            )
        self._in_flight += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._in_flight -= 1
            if self._in_flight == 0:
                self._idle.set()

    async def in_pool(self, function: Callable[..., T], *args: Any) -> T:
        """A function's result, off the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, function, *args)

    def upstream_body(self, request: ProxyRequest) -> bytes:
        """What the upstream is sent, prompts encoded; takes long enough to need a thread.

        Raises:
            ServiceError: 422, a prompt that cannot be encoded; 400, fields nested too deeply to be
                passed on.
        """
        body = dict(request.rest)
        parts = self._parts  # the same for all of a request
        if isinstance(request.prompt, Chat):
            ids = parts.prompts.chat(request.prompt.messages, request.prompt.options)
            (body["prompt_embeds"],) = self._encode(parts.encoder, [ids], ["messages"])
        elif request.prompt is not None:
            data = self._encode(parts.encoder, *_token_ids(parts.prompts, request.prompt))
            body["prompt_embeds"] = data if request.prompt.as_list else data[0]
        return written(body, ErrorKind.MALFORMED_JSON, "body is not JSON: it is")

    async def drain(self, timeout_s: float) -> bool:
        """Take no more requests, then wait for those in flight.

        Returns:
            Whether all of them were answered within ``timeout_s``.
        """
        self._draining = True
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            _log.warning("drain timed out", in_flight=self._in_flight)
            return False
        return True

    async def stop(self) -> None:
        """End work of its own and close the connections to the upstream."""
        self._draining = True
        self._pool.shutdown(wait=False, cancel_futures=True)
        await asyncio.to_thread(self._ahead.close)
        await self.upstream.close()

    def _encode_ahead(self) -> None:
        rows = self._parts.encoder.rows
        if self.settings.encode_ahead and rows is not None:
            self._ahead.begin(rows)

    def _encode(
        self, encoder: EmbedsEncoder, prompts: Sequence[Sequence[int]], params: Sequence[str]
    ) -> list[str]:
        tokens, limit = sum(map(len, prompts)), self.settings.max_prompt_tokens
        if tokens > limit:
            raise ServiceError(
                ErrorKind.PROMPT_TOO_LONG,
                f"the prompt has {tokens} tokens; this proxy takes at most {limit}",
                param=params[0].partition(".")[0],
            )
        encoded: list[EncodedPrompt] = []
        for ids, param in zip(prompts, params, strict=True):
            try:
                encoded.append(encoder.encode(ids))
            except ValueError as error:
                raise invalid(param, str(error)) from error
        for one in encoded:
            self.metrics.encoded(one.tokens, one.plain_bytes, len(one.data), one.seconds)
        return [one.data for one in encoded]


def _token_ids(prompts: ProxyPrompts, given: TextsOrIds) -> tuple[list[Sequence[int]], list[str]]:
    params = [f"prompt.{i}" if given.as_list else "prompt" for i in range(len(given.prompts))]
    ids = [
        prompts.completion(one, param, add_special_tokens=given.add_special_tokens)
        if isinstance(one, str)
        else one
        for one, param in zip(given.prompts, params, strict=True)
    ]
    return ids, params


def load_proxy(settings: Settings, model: Path | None, catalog: Path | None) -> Proxy:
    """A proxy, ready for its first prompt; see :func:`load_parts`.

    Raises:
        ProxyError: the upstream, the model or the catalog cannot be used.
    """
    return Proxy(settings.proxy, load_parts(settings.proxy, model, catalog))


def load_parts(proxy: ProxySettings, model: Path | None, catalog: Path | None) -> ProxyParts:
    """What a proxy needs of a model and a catalog.

    Args:
        proxy: the settings.
        model: folder with the tokenizer and the embeddings.
        catalog: folder of the catalog whose items prompts may name, or None.

    Raises:
        ProxyError: the model or the catalog cannot be used.
    """
    # Here, because transformers takes seconds that a refused setting should not cost.
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    if model is None:
        raise ProxyError("there is no model to embed prompts with; give --model")
    if not (model / "config.json").is_file():
        raise ProxyError(f"{model} is no model folder: it has no config.json")
    encoder = EmbedsEncoder(
        open_embedding_table(model),
        proxy.embedding_compression,
        proxy.embedding_bits,
        proxy.encoded_table_mib << 20,
    )
    encoder.warm_up()
    parts = ProxyParts(load_prompts(model, catalog), encoder)
    _log.info(
        "proxy ready",
        hidden_size=encoder.table.hidden_size,
        compression=proxy.embedding_compression,
        bits=proxy.embedding_bits if proxy.embedding_compression != "none" else None,
    )
    return parts
