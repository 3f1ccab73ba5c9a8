"""What clients ask the proxy, read: which prompts to encode and what to pass on as it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from server.errors import ServiceError, invalid
from server.settings_serving import ProxySettings

# Asked of the proxy, not of the upstream.
_CONSUMED = ("prompt", "add_special_tokens")
_CHAT_CONSUMED = (
    "messages",
    "chat_template",
    "chat_template_kwargs",
    "add_generation_prompt",
    "continue_final_message",
    "max_completion_tokens",
    "logprobs",
    "top_logprobs",
    "tools",
    "tool_choice",
    "functions",
    "function_call",
    "parallel_tool_calls",
    "modalities",
    "audio",
)
# Of those, what cannot be had by way of a completion, and the values that ask for nothing.
_NO_COMPLETION: dict[str, tuple[Any, ...]] = {
    "chat_template": (),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
}


@dataclass(frozen=True, slots=True)
class TextsOrIds:
    """Prompts of a completion.

    Attributes:
        prompts: each a text or token ids.
        as_list: whether the client sent a list of prompts, rather than one.
        add_special_tokens: whether the tokenizer adds its own, as to any prompt.
    """

    prompts: list[str | list[int]]
    as_list: bool
    add_special_tokens: bool


@dataclass(frozen=True, slots=True)
class Chat:
    """A chat, contents as text, and options for its template."""

    messages: list[dict[str, Any]]
    options: dict[str, Any]


@dataclass(frozen=True, slots=True)
class ProxyRequest:
    """A request, read.

    Attributes:
        prompt: what to encode; None where the client's own ``prompt_embeds`` are in ``rest``.
        rest: all that the upstream shall get beside.
        stream: whether events are wanted.
    """

    prompt: TextsOrIds | Chat | None
    rest: dict[str, Any]
    stream: bool

    @property
    def num_prompts(self) -> int:
        """How many prompts there are; each costs as much as a request."""
        if isinstance(self.prompt, TextsOrIds):
            return len(self.prompt.prompts)
        own = self.rest.get("prompt_embeds")
        return max(len(own), 1) if isinstance(own, list) else 1


def read_completion(body: Mapping[str, Any], settings: ProxySettings) -> ProxyRequest:
    """A body of ``/v1/completions``.

    Raises:
        ServiceError: 422; names the field.
    """
    stream = _common(body)
    rest = {name: value for name, value in body.items() if name not in _CONSUMED}
    prompt = body.get("prompt")
    if body.get("prompt_embeds") is not None:
        if not settings.accept_prompt_embeds:
            raise invalid(
                "prompt_embeds",
                "prompt_embeds is given, but this proxy makes them itself; give prompt",
            )
        if prompt not in (None, "", []):
            raise invalid("prompt", "both prompt and prompt_embeds are given; give one of them")
        return ProxyRequest(None, rest, stream)
    add_special_tokens = body.get("add_special_tokens", True)
    if not isinstance(add_special_tokens, bool):
        raise invalid("add_special_tokens", "add_special_tokens must be true or false")
    as_list = isinstance(prompt, list) and not _is_ids(prompt)
    prompts: list[Any] = prompt if isinstance(prompt, list) and as_list else [prompt]
    if not prompts:
        raise invalid("prompt", "prompt is an empty list; give at least one prompt")
    if len(prompts) > settings.max_prompts:
        raise invalid(
            "prompt", f"prompt has {len(prompts)} entries; at most {settings.max_prompts}"
        )
    for place, one in enumerate(prompts):
        if not isinstance(one, str) and not _is_ids(one):
            param = f"prompt.{place}" if as_list else "prompt"
            raise invalid(param, f"{param} must be a text or a list of token ids")
    return ProxyRequest(TextsOrIds(prompts, as_list, add_special_tokens), rest, stream)


def read_chat(body: Mapping[str, Any], settings: ProxySettings) -> ProxyRequest:
    """A body of ``/v1/chat/completions``, as the completion that it becomes.

    Raises:
        ServiceError: 422; names the field.
    """
    stream = _common(body)
    if body.get("prompt_embeds") is not None:
        raise invalid("prompt_embeds", "prompt_embeds is given; a chat has messages")
    for name, nothing in _NO_COMPLETION.items():
        value = body.get(name)
        if value is not None and value not in nothing:
            raise invalid(name, f"{name} is not supported: the upstream completes a prompt")
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise invalid("messages", "messages must be a list of at least one message")
    chat = Chat([_message(one, place) for place, one in enumerate(messages)], _options(body))
    rest = {name: value for name, value in body.items() if name not in _CHAT_CONSUMED}
    if rest.get("max_tokens") is None:
        wanted = body.get("max_completion_tokens")
        rest["max_tokens"] = settings.chat_max_tokens if wanted is None else wanted
    logprobs = _logprobs(body)
    if logprobs is not None:
        rest["logprobs"] = logprobs
    return ProxyRequest(chat, rest, stream)


def _common(body: Mapping[str, Any]) -> bool:
    if body.get("use_beam_search"):
        raise invalid("use_beam_search", "use_beam_search is not possible with prompt embeddings")
    stream = body.get("stream")
    if stream is not None and not isinstance(stream, bool):
        raise invalid("stream", "stream must be true or false")
    return bool(stream)


def _is_ids(value: object) -> bool:
    """A non-empty list of ints, bools not among them."""
    return isinstance(value, list) and bool(value) and all(type(one) is int for one in value)


def _message(message: object, place: int) -> dict[str, Any]:
    param = f"messages.{place}"
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise invalid(param, f"{param} must be an object with a role")
    content = message.get("content")
    if isinstance(content, list):
        texts = [
            part.get("text")
            for part in content
            if isinstance(part, dict) and part.get("type") == "text"
        ]
        if len(texts) != len(content) or not all(isinstance(text, str) for text in texts):
            raise _no_text(param)
        content = "".join(str(text) for text in texts)
    elif content is not None and not isinstance(content, str):
        raise _no_text(param)
    return {**message, "content": content or ""}


def _no_text(param: str) -> ServiceError:
    return invalid(f"{param}.content", f"{param}.content must be text, or parts of type text")


def _options(body: Mapping[str, Any]) -> dict[str, Any]:
    options = body.get("chat_template_kwargs") or {}
    if not isinstance(options, dict):
        raise invalid("chat_template_kwargs", "chat_template_kwargs must be an object")
    flags = {}
    for name in ("add_generation_prompt", "continue_final_message"):
        if body.get(name) is not None:
            if not isinstance(body[name], bool):
                raise invalid(name, f"{name} must be true or false")
            flags[name] = body[name]
    return {**options, **flags}


def _logprobs(body: Mapping[str, Any]) -> int | None:
    """How many log-probabilities a completion is asked for, None for none."""
    wanted, top = body.get("logprobs"), body.get("top_logprobs")
    if wanted is not None and not isinstance(wanted, bool):
        raise invalid("logprobs", "logprobs of a chat must be true or false")
    if not wanted:
        return None
    if top is not None and (type(top) is not int or top < 0):
        raise invalid("top_logprobs", f"top_logprobs is {str(top)[:40]}; it must be at least 0")
    return top or 0
