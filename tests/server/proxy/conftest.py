"""A mock upstream on loopback that misbehaves to order, and a proxy in front of it."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import uvicorn

from rectokens.artifacts.model import RetrievalSpec, save_model
from rectokens.catalog.artifact import save_catalog
from rectokens.catalog.build import build_catalog
from rectokens.prompts.recipe import PromptRecipe
from server.run import listen
from tests.metrics_page import sample_of
from tests.waiting import LIMIT_S, until

FINGERPRINT = "ab" * 32
_TEXT = "<unk> <s> </s> the user likes matte lipstick and a b c : assistant"
WORDS = _TEXT.split()
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m.role }} : {{ m.content }} </s> {% endfor %}"
    "{% if add_generation_prompt %}assistant :{% endif %}"
)


def make_tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from rectokens.integrations.hf.tokenizer import ItemAwareTokenizer

    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    plain = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    plain.chat_template = CHAT_TEMPLATE
    return ItemAwareTokenizer(plain, num_levels=3, codebook_size=4)


@dataclass(frozen=True)
class Store:
    """A model with its tokenizer and a catalog of thirty items."""

    model: Path
    catalog: Path
    tokenizer: Any
    lm: Any


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory, tiny_lm: Callable[..., Any]) -> Store:
    root = tmp_path_factory.mktemp("proxy")
    tokenizer = make_tokenizer()
    recipe = PromptRecipe("interleaved", 1, {"max_items": 8, "bos_token_id": 1})
    lm = tiny_lm("qwen3", vocab_size=tokenizer.vocab_size)
    model = save_model(
        root / "models",
        lm,
        RetrievalSpec(FINGERPRINT, tokenizer.item_tokens, recipe),
        text_tokenizer=tokenizer,
    )
    codes = torch.tensor([[i // 16 % 4, i // 4 % 4, i % 4] for i in range(30)])
    names = [f"B{i:03d}" for i in range(30)]
    catalog = build_catalog(names, codes, codebook_size=4, tokenizer_fingerprint=FINGERPRINT)
    return Store(model, save_catalog(root / "catalogs", catalog), tokenizer, lm)


@dataclass
class Call:
    """One request that reached the upstream."""

    method: str
    path: str
    headers: dict[str, str]
    body: Any
    writer: asyncio.StreamWriter
    gone: asyncio.Event = field(default_factory=asyncio.Event)

    async def answer(self, status: int = 200, body: Any = None, **headers: str) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        await self.head(status, **{"content-length": str(len(content)), **headers})
        await self.send(content)

    async def head(self, status: int = 200, **headers: str) -> None:
        given = {"content-type": "application/json", **headers}
        lines = [f"HTTP/1.1 {status} X", *(f"{k}: {v}" for k, v in given.items()), "", ""]
        await self.send("\r\n".join(lines).encode())

    async def send(self, content: bytes) -> None:
        self.writer.write(content)
        await self.writer.drain()

    async def begin_events(self) -> None:
        await self.head(**{"content-type": "text/event-stream", "transfer-encoding": "chunked"})

    async def chunk(self, content: bytes) -> None:
        await self.send(f"{len(content):x}\r\n".encode() + content + b"\r\n")


Behaviour = Callable[[Call], Awaitable[None]]


def completion(text: str = "hello", **more: Any) -> dict[str, Any]:
    choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": "stop"}
    return {
        "id": "cmpl-1",
        "object": "text_completion",
        "created": 1,
        "model": "m",
        "choices": [choice],
        **more,
    }


class MockUpstream:
    """An HTTP server by hand: every call goes to ``behave``."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.connections = 0
        self.opened = 0
        self.behave: Behaviour = self.ok
        self.port = 0
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @staticmethod
    async def ok(call: Call) -> None:
        await call.answer(body=completion())

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.opened += 1
        self._tasks.add(asyncio.current_task())  # type: ignore[arg-type]
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                first, *lines = head.decode().split("\r\n")[:-2]
                headers = dict(line.lower().split(": ", 1) for line in lines)
                raw = {line.split(": ", 1)[0].lower(): line.split(": ", 1)[1] for line in lines}
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                method, path, _ = first.split(" ")
                call = Call(method, path, raw, json.loads(body) if body else None, writer)
                self.calls.append(call)
                work = asyncio.ensure_future(self.behave(call))
                # Nothing more comes before the answer, so reading tells of the client's leaving.
                watch = asyncio.ensure_future(reader.read(1))
                await asyncio.wait({work, watch}, return_when=asyncio.FIRST_COMPLETED)
                if not work.done():
                    call.gone.set()
                    work.cancel()
                    await asyncio.gather(work, return_exceptions=True)
                    return
                if not watch.done():
                    watch.cancel()
                    await asyncio.gather(watch, return_exceptions=True)
                work.result()
        except (asyncio.IncompleteReadError, ConnectionError, CloseNowError):
            pass
        except asyncio.CancelledError:
            # The test is over; asyncio would write a traceback for every connection.
            pass
        finally:
            self.connections -= 1
            self._tasks.discard(asyncio.current_task())  # type: ignore[arg-type]
            writer.close()


class CloseNowError(Exception):
    """Raised by a behaviour to close the connection as it is."""


@contextlib.asynccontextmanager
async def serving(app: Any) -> AsyncIterator[str]:
    """An app on a free port of loopback, in this event loop; yields its base URL."""
    # As the service listens: asyncio takes Nagle's delay off sockets that say they are TCP.
    listener = listen("127.0.0.1", 0)
    server = uvicorn.Server(
        uvicorn.Config(
            app, log_config=None, access_log=False, ws="none", timeout_graceful_shutdown=1
        )
    )
    task = asyncio.ensure_future(server._serve(sockets=[listener]))
    await until(lambda: server.started or task.done())
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        await task
        listener.close()


@pytest.fixture
def mock_tools() -> Any:
    """What tests need of this file, which is no package: an object with its names."""
    import types

    return types.SimpleNamespace(
        CloseNowError=CloseNowError,
        completion=completion,
        serving=serving,
        make_tokenizer=make_tokenizer,
    )


@pytest.fixture(autouse=True)
def _clean_environment(no_settings: None) -> None:
    pass


@pytest.fixture
async def upstream() -> AsyncIterator[MockUpstream]:
    mock = MockUpstream()
    server = await asyncio.start_server(mock.serve, "127.0.0.1", 0, limit=1 << 26, backlog=2048)
    mock.port = server.sockets[0].getsockname()[1]
    yield mock
    server.close()
    for task in list(mock._tasks):
        task.cancel()
    await asyncio.gather(*mock._tasks, return_exceptions=True)


class RunningProxy:
    """A proxy on loopback, with a client for it."""

    def __init__(self, proxy: Any, client: httpx.AsyncClient) -> None:
        self.proxy = proxy
        self.client = client

    async def complete(self, prompt: Any = "the user", **body: Any) -> httpx.Response:
        return await self.client.post("/v1/completions", json={"prompt": prompt, **body})

    async def chat(self, content: Any = "the user", **body: Any) -> httpx.Response:
        messages = [{"role": "user", "content": content}]
        return await self.client.post("/v1/chat/completions", json={"messages": messages, **body})

    async def metric(self, line: str) -> float:
        return sample_of((await self.client.get("/metrics")).text, line)


@pytest.fixture(scope="session")
def parts(store: Store) -> Any:
    """The table, and the prompts without and with the catalog; loading them takes a while."""
    from server.proxy.embedding_table import open_embedding_table
    from server.proxy.prompts import load_prompts

    prompts = {
        False: load_prompts(store.model, None),
        True: load_prompts(store.model, store.catalog),
    }
    return open_embedding_table(store.model), prompts


@pytest.fixture
async def start_proxy(parts: Any, upstream: MockUpstream) -> AsyncIterator[Any]:
    """``await start_proxy(catalog=False, url=None, **settings)``; ``group__name`` and ``__name``
    are any settings, other names are the proxy's own.
    """
    from server.proxy.app import create_proxy_app
    from server.proxy.encoder import EmbedsEncoder
    from server.proxy.service import Proxy, ProxyParts
    from server.settings import load_settings

    table, prompts = parts
    async with contextlib.AsyncExitStack() as stack:

        async def start(
            *, catalog: bool = False, url: str | None = None, **flags: Any
        ) -> RunningProxy:
            named = {
                k.removeprefix("__").replace("__", ".") if "__" in k else f"proxy.{k}": v
                for k, v in flags.items()
            }
            settings = load_settings({"proxy.upstream": url or upstream.url, **named})
            chosen = settings.proxy
            encoder = EmbedsEncoder(
                table,
                chosen.embedding_compression,
                chosen.embedding_bits,
                chosen.encoded_table_mib << 20,
            )
            proxy = Proxy(chosen, ProxyParts(prompts[catalog], encoder))
            base = await stack.enter_async_context(serving(create_proxy_app(settings, proxy)))
            client = await stack.enter_async_context(
                httpx.AsyncClient(base_url=base, timeout=LIMIT_S, limits=httpx.Limits())
            )
            return RunningProxy(proxy, client)

        yield start


@pytest.fixture
def encoded_rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of rows of the calls that encoded."""
    from rectokens.turboquant import encode_embeddings
    from server.proxy import encoded_table

    calls: list[int] = []

    def counted(x: Any, *rest: Any, **named: Any) -> Any:
        calls.append(len(x))
        return encode_embeddings(x, *rest, **named)

    monkeypatch.setattr(encoded_table, "encode_embeddings", counted)
    return calls
