"""Token ids of a history of items only, laid out as rows of one table.

A history is mostly items, up to thousands of them, and a prompt is built for every request: one
array operation here does what the builders' loops over parts define.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rectokens.schemas.item_tokens import ItemTokens


@dataclass(frozen=True, slots=True)
class ItemLayout:
    """Where token ids stand: ``head (before c0 .. c(L-1) after)* end``.

    Attributes:
        item_tokens: of the model.
        head: before all items.
        before: before each item's codes.
        after: after them.
        end: after all items.
    """

    item_tokens: ItemTokens
    head: Sequence[int]
    before: Sequence[int]
    after: Sequence[int]
    end: Sequence[int]

    def prompt(self, codes: NDArray[np.integer]) -> tuple[int, ...]:
        """The prompt of n items with these codes, integers (n, L).

        Raises:
            ValueError: codes that are no semantic IDs of this model.
        """
        tokens = self.item_tokens.encode_rows(codes)
        first = len(self.before)
        rows = np.empty((len(tokens), first + tokens.shape[1] + len(self.after)), dtype=np.int64)
        rows[:, :first] = self.before
        rows[:, first : first + tokens.shape[1]] = tokens
        rows[:, first + tokens.shape[1] :] = self.after
        return (*self.head, *rows.ravel().tolist(), *self.end)
