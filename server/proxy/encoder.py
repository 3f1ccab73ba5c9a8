"""Token ids to the text of a ``prompt_embeds`` field."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

from rectokens.prompt_embeds import dump_payload, dump_tensor
from rectokens.turboquant import codec_for, warmup_encode
from server.proxy.embedding_table import EmbeddingTable
from server.proxy.encoded_table import EncodedTable
from server.proxy.errors import ProxyError

_USUAL_TOKENS = 256


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """One prompt, ready to send.

    Attributes:
        data: the field's text.
        tokens: T.
        plain_bytes: what the embeddings would be as plain base64.
        seconds: spent embedding and encoding.
    """

    data: str
    tokens: int
    plain_bytes: int
    seconds: float


class EmbedsEncoder:
    """Embeds prompts and writes them as the upstream reads them. Safe to share between threads.

    Args:
        table: the model's input embeddings.
        compression: ``none`` or ``turboquant``.
        bits: bits an element when compressed.
        max_encoded_bytes: most that encoded rows, kept for the next prompt, may take.

    Attributes:
        table: as given.
        rows: encoded rows of the table; None without compression.

    Raises:
        ProxyError: embeddings of a size that cannot be compressed.
    """

    def __init__(
        self,
        table: EmbeddingTable,
        compression: Literal["none", "turboquant"],
        bits: int,
        max_encoded_bytes: int = 0,
    ) -> None:
        self.table = table
        self.rows: EncodedTable | None = None
        self._bits = bits
        self._codec: str | None = None
        if compression == "none":
            return
        try:
            self._codec = codec_for(table.hidden_size)
        except ValueError as error:
            raise ProxyError(
                f"hidden size {table.hidden_size} cannot be compressed ({error}); "
                "set embedding_compression to none"
            ) from error
        self.rows = EncodedTable(table, bits, self._codec, max_encoded_bytes)

    def warm_up(self) -> None:
        """Prepare for the first prompt, by all that one of usual length goes through."""
        if self._codec is not None:
            warmup_encode(self.table.hidden_size, self._bits, codec=self._codec)
        # Rows that cannot be encoded are for the prompt that asks for them to tell.
        with suppress(ValueError):
            self.encode(range(min(_USUAL_TOKENS, self.table.vocab_size)))

    def encode(self, token_ids: Sequence[int]) -> EncodedPrompt:
        """Embed and encode one prompt, token ids (T,).

        Raises:
            ValueError: no ids, or one that the model does not have.
        """
        started = time.perf_counter()
        hidden_size = self.table.hidden_size
        if self.rows is None or self._codec is None:
            data = dump_tensor(self.table.embed(token_ids))
        else:
            packed, norms = self.rows.encode(token_ids)
            data = dump_payload(packed, norms, self._bits, hidden_size, self._codec)
        row_bytes = hidden_size * self.table.weight.element_size()
        plain_bytes = -(-len(token_ids) * row_bytes // 3) * 4
        return EncodedPrompt(data, len(token_ids), plain_bytes, time.perf_counter() - started)
