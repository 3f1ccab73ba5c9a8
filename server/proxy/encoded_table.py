"""Encoded embeddings by token: a row is the same in every prompt, so it is encoded once."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor

from rectokens.turboquant import encode_embeddings, packed_dim
from server.proxy.embedding_table import EmbeddingTable


class EncodedTable:
    """Rows of an embedding table, encoded ahead or when a prompt first asks for them.

    Takes ``V * (packed_dim + 4)`` bytes in the end, of which the system gives only the pages of
    rows that were encoded. Safe to share between threads: two that encode the same row write the
    same bytes, and a row is known only after it is written.

    Args:
        table: the model's input embeddings, V rows.
        bits: bits an element.
        codec: of the encoding.
        max_bytes: most that the rows may take; if they would take more, none are kept.
    """

    def __init__(self, table: EmbeddingTable, bits: int, codec: str, max_bytes: int) -> None:
        self._table = table
        self._bits = bits
        self._codec = codec
        self._known: Tensor | None = None
        width = packed_dim(table.hidden_size, bits)
        if table.vocab_size * (width + 4) <= max_bytes:
            self._packed = torch.empty((table.vocab_size, width), dtype=torch.uint8)
            self._norms = torch.empty(table.vocab_size, dtype=torch.float32)
            self._known = torch.zeros(table.vocab_size, dtype=torch.bool)

    @property
    def num_rows(self) -> int:
        """How many rows can be kept: V, or 0 where none are."""
        return 0 if self._known is None else len(self._known)

    def encode(self, token_ids: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Packed rows ``(T, packed_dim)`` and norms ``(T,)`` of token ids (T,).

        Raises:
            ValueError: no ids, one that the model does not have, or embeddings that cannot be
                encoded.
        """
        self._table.check(token_ids)
        if self._known is None:
            return self._encoded(token_ids)
        ids = torch.tensor(token_ids)
        self._learn(ids[~self._known[ids]].unique(), self._known)
        # Not `packed[ids]`, which takes twenty times as long.
        return self._packed.index_select(0, ids), self._norms[ids]

    def encode_ahead(self, first: int, end: int) -> None:
        """Encode those of the rows ``first`` to ``end`` that are not known yet.

        Rows that cannot be encoded are left for the prompt that asks for them, with the others.
        """
        if self._known is not None:
            with suppress(ValueError):
                self._learn(first + (~self._known[first:end]).nonzero().flatten(), self._known)

    def _learn(self, missing: Tensor, known: Tensor) -> None:
        if missing.numel():
            self._packed[missing], self._norms[missing] = self._encoded(missing.tolist())
            known[missing] = True

    def _encoded(self, token_ids: Sequence[int]) -> tuple[Tensor, Tensor]:
        return encode_embeddings(self._table.embed(token_ids), self._bits, codec=self._codec)
