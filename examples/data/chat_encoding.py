"""Chats with items to token ids, by the model's own chat template."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from examples.data.chat_templates import Part
from rectokens.integrations.hf.collator import IGNORED_LABEL
from rectokens.integrations.hf.tokenizer import ItemAwareTokenizer
from rectokens.prompts.text import TextEncoder

Shape = tuple[tuple[str, int], ...]
"""Role and number of parts of each message of a chat."""

_UNLIMITED = 2**31
# Private-use characters around a part's number: no template has them or changes them.
_OPEN, _CLOSE = "\ue000", "\ue001"
_MARKED = re.compile(f"{_OPEN}(\\d+){_CLOSE}")


class ChatEncoder:
    """Encodes chats the same way for training and for asking.

    The chat template sees a mark in place of each part of a content; what it writes around the
    marks is encoded with its special tokens. A text is data: a special token's name in it stays
    text. An item is start token, code tokens, end token. Texts are encoded part by part, so a
    part's tokens do not depend on its neighbours; each distinct text is encoded once.

    Args:
        tokenizer: with a chat template.

    Raises:
        ValueError: the tokenizer has no chat template.
    """

    def __init__(self, tokenizer: ItemAwareTokenizer) -> None:
        if not tokenizer.chat_template:
            raise ValueError(
                f"the tokenizer of {tokenizer.name_or_path or 'the model'!r} has no chat template; "
                "use a model with one, such as an instruction-tuned one"
            )
        self._tokenizer = tokenizer
        self._items = tokenizer.item_tokens
        self._encode_text = TextEncoder(tokenizer, tokenizer.item_tokens, _UNLIMITED)
        self._texts: dict[str, list[int]] = {}
        self._renderings: dict[Shape, list[list[int] | int]] = {}
        self._special = frozenset(tokenizer.all_special_ids)

    def prompt(self, messages: Sequence[dict[str, Any]]) -> list[int]:
        """Token ids that end where the assistant's answer begins: how every sample begins.

        Args:
            messages: with ``role`` and ``content``; a content is a text or a list of parts.

        Raises:
            ValueError: a message or part of another form, or codes that are none of the model's.
        """
        answer = {"role": "assistant", "content": ""}
        ids, starts = self._filled([*messages, answer])
        return ids[: starts[-2]]

    def sample(self, messages: Sequence[dict[str, Any]]) -> tuple[list[int], list[int]]:
        """Token ids of a chat, and labels: -100 outside the assistant's turn, its last message.

        The turn is the answer and the end-of-turn token after it, if the template writes one.

        Raises:
            ValueError: the last message is not the assistant's; as :meth:`prompt` otherwise.
        """
        if not messages or messages[-1].get("role") != "assistant":
            raise ValueError("the last message of a sample must be the assistant's")
        ids, starts = self._filled(messages)
        first, after = starts[-len(_parts(messages[-1])) - 1], starts[-1]
        if after < len(ids) and ids[after] in self._special:
            after += 1
        ignored = [IGNORED_LABEL]
        return ids, ignored * first + ids[first:after] + ignored * (len(ids) - after)

    def _filled(self, messages: Sequence[dict[str, Any]]) -> tuple[list[int], list[int]]:
        """Ids; and where each part in turn begins, and where the last one ends."""
        parts = [part for message in messages for part in _parts(message)]
        shape = tuple((message["role"], len(_parts(message))) for message in messages)
        if shape not in self._renderings:
            self._renderings[shape] = self._render(shape)
        ids: list[int] = []
        starts: list[int] = []
        end = 0
        for piece in self._renderings[shape]:
            if isinstance(piece, int):
                starts.append(len(ids))
                ids += self._part(parts[piece])
                end = len(ids)
            else:
                ids += piece
        return ids, [*starts, end]

    def _render(self, shape: Shape) -> list[list[int] | int]:
        """What the template writes, encoded, with the numbers of the parts in between."""
        number = 0
        messages = []
        for role, count in shape:
            marks = (f"{_OPEN}{number + place}{_CLOSE}" for place in range(count))
            messages.append({"role": role, "content": "".join(marks)})
            number += count
        text: str = self._tokenizer.apply_chat_template(messages, tokenize=False)
        pieces = _MARKED.split(text)
        if [int(mark) for mark in pieces[1::2]] != list(range(number)):
            raise ValueError(
                "the model's chat template does not write every message once and in order; "
                "it cannot be used for samples"
            )
        return [
            int(piece) if at % 2 else self._tokenizer.encode(piece, add_special_tokens=False)
            for at, piece in enumerate(pieces)
            if piece
        ]

    def _part(self, part: Part) -> list[int]:
        if part.get("type") == "text" and isinstance(part.get("text"), str):
            text = part["text"]
            if text not in self._texts:
                self._texts[text] = self._encode_text(text)[0]
            return self._texts[text]
        if part.get("type") == "item" and "codes" in part:
            codes = self._items.encode(part["codes"])
            return [self._tokenizer.item_sep_token_id, *codes, self._tokenizer.item_end_token_id]
        raise ValueError(f"a part is {part!r}; expected a text with 'text' or an item with 'codes'")


def _parts(message: dict[str, Any]) -> list[Part]:
    content = message.get("content")
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if isinstance(content, list) and content and "role" in message:
        return content
    raise ValueError(f"a message's content is {content!r}; expected a text or a list of parts")
