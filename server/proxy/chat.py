"""Completions as chats: the upstream completes, the client chats."""

from __future__ import annotations

from typing import Any

from server.api.sse import event
from server.errors import ErrorKind, ServiceError
from server.proxy.bodies import written


def to_chat(completion: Any) -> bytes:
    """A ``text_completion`` as a ``chat.completion``, in JSON; fields of neither shape are kept.

    Raises:
        ServiceError: 502, it is no completion.
    """
    choices = [
        {
            **_rest(choice),
            "message": {"role": "assistant", "content": choice.get("text", "")},
            "logprobs": _logprobs(choice.get("logprobs")),
        }
        for choice in _choices(completion)
    ]
    return _answer({**_head(completion, "chat.completion"), "choices": choices})


class ChatStream:
    """The chunks of one stream of completions as those of a chat, which names the role first."""

    def __init__(self) -> None:
        self._begun: set[Any] = set()

    def __call__(self, raw: bytes, chunk: Any) -> bytes:
        """One event. An error is passed on as it is.

        Raises:
            ServiceError: 502, it is no chunk.
        """
        if isinstance(chunk, dict) and "error" in chunk and "choices" not in chunk:
            return raw
        choices = []
        for choice in _choices(chunk):
            role = {} if choice.get("index") in self._begun else {"role": "assistant"}
            self._begun.add(choice.get("index"))
            choices.append(
                {
                    **_rest(choice),
                    "delta": {**role, "content": choice.get("text", "")},
                    "logprobs": _logprobs(choice.get("logprobs")),
                }
            )
        return event(_answer({**_head(chunk, "chat.completion.chunk"), "choices": choices}))


def _choices(completion: Any) -> list[dict[str, Any]]:
    choices = completion.get("choices") if isinstance(completion, dict) else None
    if not isinstance(choices, list) or not all(map(_is_choice, choices)):
        raise ServiceError(ErrorKind.UPSTREAM_FAILED, "the upstream's answer is no completion")
    return choices


def _is_choice(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("index"), int | None)


def _answer(body: dict[str, Any]) -> bytes:
    return written(body, ErrorKind.UPSTREAM_FAILED, "the upstream's answer is")


def _head(completion: dict[str, Any], kind: str) -> dict[str, Any]:
    name = str(completion.get("id", ""))
    return {**completion, "id": f"chatcmpl-{name.removeprefix('cmpl-')}", "object": kind}


def _rest(choice: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in choice.items() if name not in ("text", "logprobs")}


def _logprobs(given: Any) -> dict[str, Any] | None:
    """Log-probabilities of a completion, lists by kind, as those of a chat, one entry a token."""
    if not isinstance(given, dict):
        return None
    tokens, values = given.get("tokens") or [], given.get("token_logprobs") or []
    tops = given.get("top_logprobs") or [None] * (len(tokens) if isinstance(tokens, list) else 0)
    if (
        not all(isinstance(one, list) for one in (tokens, values, tops))
        or not all(isinstance(top, dict | None) for top in tops)
        or not len(tokens) == len(values) == len(tops)
    ):
        raise ServiceError(ErrorKind.UPSTREAM_FAILED, "the upstream's logprobs do not fit together")
    return {
        "content": [
            {
                **_entry(token, value),
                "top_logprobs": [_entry(*pair) for pair in (top or {}).items()],
            }
            for token, value, top in zip(tokens, values, tops, strict=True)
        ]
    }


def _entry(token: Any, value: Any) -> dict[str, Any]:
    return {"token": token, "logprob": value, "bytes": list(str(token).encode())}
