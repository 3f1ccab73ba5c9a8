"""The interface of a prompt builder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from rectokens.prompts.parts import BuiltPrompt, Part


class PromptBuilder(Protocol):
    """Turns a history into token ids, the same way for training and for serving.

    Two guarantees bind the methods. With ``ids, labels = training_sequence(parts)`` and p the
    position in ``ids`` where the codes of the item ``parts[k]`` begin:

    - ``build(parts[:k]).token_ids == ids[:p]`` for every item with labels of a history that is
      not truncated, and for the last item of any history;
    - ``target(parts[k].codes)`` equals the ids from p on.

    So one causal pass over a training sequence trains the model on every prompt that serving
    would send for that history. A builder holds no state that a call changes; threads share it.
    """

    @property
    def name(self) -> str:
        """Name in the registry."""
        ...

    @property
    def version(self) -> int:
        """Version of the layout."""
        ...

    @property
    def max_prompt_tokens(self) -> int:
        """Longest prompt that ``build`` can return, in tokens."""
        ...

    def build(self, parts: Sequence[Part], *, max_tokens: int | None = None) -> BuiltPrompt:
        """The prompt of a history, oldest part first; an empty one gives the start prompt.

        Args:
            parts: the history.
            max_tokens: longest prompt wanted. Where the layout allows a longer one, more of the
                oldest items are left out, in whole blocks counted from the beginning of the
                history, so that a growing one's prompt seldom begins anew. Texts stay.

        Raises:
            PromptTooLongError: longer than ``max_tokens`` with no more than the newest item.
            ValueError: codes that are no semantic ID of this model, or a part it does not take.
        """
        ...

    def build_items(
        self, codes: NDArray[np.integer], *, max_tokens: int | None = None
    ) -> BuiltPrompt:
        """What ``build`` makes of a history of items only, in a fraction of its time.

        Args:
            codes: integers (n, L), oldest item first.
            max_tokens: as for ``build``.

        Raises:
            PromptTooLongError: as ``build``.
            ValueError: codes that are no semantic IDs of this model.
        """
        ...

    def target(self, codes: Sequence[int]) -> list[int]:
        """The tokens that follow a prompt when the next item has these codes (L,).

        Raises:
            ValueError: codes that are no semantic ID of this model.
        """
        ...

    def training_sequence(self, parts: Sequence[Part]) -> tuple[list[int], list[int]]:
        """A user's whole history as one training example.

        Returns:
            Token ids and labels, of equal length. Labels are not shifted (transformers shifts
            them); -100 everywhere but on the items' targets.

        Raises:
            ValueError: no item among the parts, or as ``build``.
        """
        ...
