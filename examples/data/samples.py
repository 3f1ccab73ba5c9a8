"""Which chats are made of which users and items."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from examples.data import chat_templates as templates
from examples.data.chat_templates import Chat

SEQUENCE_TEMPLATES = (
    "sid_sequence_to_sid",
    "description_sequence_to_sid",
    "mixed_sequence_to_sid",
    "description_sequence_to_sid_and_description",
    "sid_sequence_to_sid_and_description",
)


@dataclass(frozen=True, slots=True)
class Question:
    """A user's history, rows oldest first, and the row to answer with."""

    user: int
    history: tuple[int, ...]
    target: int


@dataclass(frozen=True, slots=True)
class MadeChat:
    """A chat and what it was made of; user and history are -1 and empty for an item alone."""

    chat: Chat
    template: str
    question: Question


class ChatMaker:
    """Makes chats of items that are known by row.

    Args:
        texts: N descriptions.
        codes: N semantic IDs.
    """

    def __init__(self, texts: Sequence[str], codes: Sequence[Sequence[int]]) -> None:
        self._texts = texts
        self._codes = codes

    def item_chats(self, rows: Sequence[int]) -> Iterator[MadeChat]:
        """Both item chats of each item: its semantic ID to find, its description to write."""
        for row in rows:
            text, codes = self._texts[row], self._codes[row]
            alone = Question(-1, (), row)
            yield MadeChat(templates.description_to_sid(text, codes), "description_to_sid", alone)
            yield MadeChat(templates.sid_to_description(codes, text), "sid_to_description", alone)

    def sequence_chats(
        self,
        questions: Sequence[Question],
        names: Sequence[str],
        per_user: int,
        rng: np.random.Generator,
    ) -> Iterator[MadeChat]:
        """``per_user`` chats of each question, each by another of the templates, drawn at random.

        Raises:
            ValueError: an unknown or repeated template, or ``per_user`` outside 1 to as many.
        """
        for name in names:
            if name not in SEQUENCE_TEMPLATES:
                allowed = ", ".join(map(repr, SEQUENCE_TEMPLATES))
                raise ValueError(f"template is {name!r}; allowed are {allowed}")
        if len(set(names)) != len(names):
            raise ValueError(f"templates are {list(names)}; each may be named once")
        if not 1 <= per_user <= len(names):
            raise ValueError(f"samples_per_user is {per_user}; allowed are 1 to {len(names)}")
        for question in questions:
            for place in rng.permutation(len(names))[:per_user]:
                name = names[int(place)]
                yield MadeChat(self._sequence_chat(name, question), name, question)

    def shortened(self, made: MadeChat) -> MadeChat | None:
        """The same without the oldest item of the history; None where one or none is left."""
        question = replace(made.question, history=made.question.history[1:])
        if not question.history:
            return None
        return MadeChat(self._sequence_chat(made.template, question), made.template, question)

    def _sequence_chat(self, name: str, question: Question) -> Chat:
        codes = [self._codes[row] for row in question.history]
        texts = [self._texts[row] for row in question.history]
        target, target_text = self._codes[question.target], self._texts[question.target]
        make: dict[str, Callable[[], Chat]] = {
            "sid_sequence_to_sid": lambda: templates.sid_sequence_to_sid(codes, target),
            "description_sequence_to_sid": lambda: templates.description_sequence_to_sid(
                texts, target
            ),
            "mixed_sequence_to_sid": lambda: templates.mixed_sequence_to_sid(
                list(zip(texts, codes, strict=True)), target
            ),
            "description_sequence_to_sid_and_description": lambda: (
                templates.description_sequence_to_sid_and_description(texts, target, target_text)
            ),
            "sid_sequence_to_sid_and_description": lambda: (
                templates.sid_sequence_to_sid_and_description(codes, target, target_text)
            ),
        }
        return make[name]()
