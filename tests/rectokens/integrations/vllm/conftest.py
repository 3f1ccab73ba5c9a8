"""vLLM's modules as far as the plugin sees them, laid out as in three of its versions."""

from __future__ import annotations

import asyncio
import base64
import io
import sys
import types
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

LAYOUTS = {
    "0.21.0": "vllm.entrypoints.chat_utils",
    "0.32.0": "vllm.renderers.chat_utils",
    "0.33.0": "vllm.renderers.chat_utils.content_parser",
}


@dataclass
class FakeVllm:
    """The modules, and what vLLM's own loader was asked."""

    home: Any
    base: Any
    chat: Any
    calls: list[tuple[Any, bytes]] = field(default_factory=list)

    def render(self, config: Any, data: bytes) -> torch.Tensor:
        """What a completion's prompt becomes."""
        return self.base.safe_load_prompt_embeds(config, data)

    def read_chat(self, config: Any, data: bytes) -> torch.Tensor:
        """What a part of a chat becomes."""
        return asyncio.run(self.chat.safe_load_prompt_embeds_async(config, data))


@pytest.fixture(params=LAYOUTS)
def version(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def fake_vllm(version: str, monkeypatch: pytest.MonkeyPatch) -> FakeVllm:
    for name in [one for one in sys.modules if one.partition(".")[0] == "vllm"]:
        monkeypatch.delitem(sys.modules, name)

    def module(name: str, **names: Any) -> Any:
        made = types.ModuleType(name)
        made.__path__ = []  # type: ignore[attr-defined]
        vars(made).update(names)
        monkeypatch.setitem(sys.modules, name, made)
        parent, _, last = name.rpartition(".")
        if parent:
            if parent not in sys.modules:
                module(parent)
            setattr(sys.modules[parent], last, made)
        return made

    def make_async(function: Any) -> Any:
        async def call(*arguments: Any) -> Any:
            return await asyncio.to_thread(function, *arguments)

        return call

    def safe_load_prompt_embeds(model_config: Any, embed: bytes) -> torch.Tensor:
        fake.calls.append((model_config, embed))
        if not model_config.enable_prompt_embeds:
            raise ValueError("You must set `--enable-prompt-embeds`")
        loaded = torch.load(io.BytesIO(base64.b64decode(embed)), weights_only=True)
        return loaded.to(model_config.dtype)

    module("vllm", __version__=version)
    module("vllm.utils.async_utils", make_async=make_async)
    names = {
        "safe_load_prompt_embeds": safe_load_prompt_embeds,
        "safe_load_prompt_embeds_async": make_async(safe_load_prompt_embeds),
    }
    home = module("vllm.renderers.embed_utils", **names)
    base = module("vllm.renderers.base", safe_load_prompt_embeds=safe_load_prompt_embeds)
    fake = FakeVllm(home, base, module(LAYOUTS[version], **names))
    return fake
