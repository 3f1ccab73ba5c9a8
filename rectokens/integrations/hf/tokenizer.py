"""A text tokenizer that also knows items."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any, Self

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rectokens.core.tokenizer import Tokenizer, TokenSequence
from rectokens.integrations.hf.configuration import ItemAwareCausalLMConfig
from rectokens.integrations.hf.item_vocabulary import extend_backend, item_vocabulary
from rectokens.schemas.compact_csr_trie import CompactCSRTrie
from rectokens.schemas.item_tokens import ItemTokens

# Settings that are plain attributes of a tokenizer, carried over as they are now rather than as
# the source was constructed.
_CARRIED = (
    "add_prefix_space",
    "chat_template",
    "clean_up_tokenization_spaces",
    "model_input_names",
    "model_max_length",
    "name_or_path",
    "padding_side",
    "split_special_tokens",
    "truncation_side",
)


class ItemAwareTokenizer(PreTrainedTokenizerFast):  # type: ignore[misc]
    """A fast tokenizer extended by one special token per (level, code), a start and an end token.

    Ids, with V0 the size of the source's vocabulary: ``<item_L{l}_C{c}>`` is V0 + l·K + c, then
    ``<|item_start|>`` and ``<|item_end|>``. The source is copied, never changed. Wrapping a
    tokenizer that has the tokens already finds them again.

    Text is encoded as by any tokenizer: an item token's string in it becomes that token. For
    text that strangers wrote use the prompt builders (:mod:`rectokens.prompts`), which keep it
    data.

    ``save_pretrained`` writes the text side; ``from_pretrained`` and ``AutoTokenizer`` restore
    it with levels, K and V0. The item tokenizer and a processor are not part of that folder:
    pass ``item_tokenizer=`` to ``from_pretrained``.

    Args:
        hf_tokenizer: a fast tokenizer, or a processor: an object whose ``tokenizer`` is one.
        item_tokenizer: vectors to codes; needed to encode item vectors only.
        num_levels: L.
        codebook_size: K.

    Raises:
        TypeError: the source is no fast tokenizer.
        ValueError: bad L or K, a source whose ids have gaps, item tokens of another L or K, or a
            named special token that the source's vocabulary lacks.
    """

    def __init__(
        self,
        hf_tokenizer: Any,
        item_tokenizer: Tokenizer | None = None,
        *,
        num_levels: int,
        codebook_size: int,
    ) -> None:
        is_tokenizer = isinstance(hf_tokenizer, PreTrainedTokenizerBase)
        source = hf_tokenizer if is_tokenizer else getattr(hf_tokenizer, "tokenizer", None)
        if not isinstance(source, PreTrainedTokenizerFast):
            raise TypeError(
                f"hf_tokenizer is a {type(hf_tokenizer).__name__}; expected a fast tokenizer "
                "(PreTrainedTokenizerFast) or a processor with one"
            )
        backend = copy.deepcopy(source.backend_tokenizer)
        _require_special_tokens(source)
        # Left over from the source's last call, and no property of the vocabulary.
        backend.no_truncation()
        backend.no_padding()
        first = extend_backend(backend, num_levels, codebook_size)

        self._tokenizer = backend
        self.num_levels = num_levels
        self.codebook_size = codebook_size
        self.original_vocab_size = first
        # Not among the "extra special tokens": transformers compares that list pairwise, which
        # takes seconds for tens of thousands. The backend knows that they are special.
        super().__init__(
            **_settings(source),
            num_levels=num_levels,
            codebook_size=codebook_size,
            original_vocab_size=first,
        )
        inherited = source if isinstance(source, ItemAwareTokenizer) else None
        self.processor = hf_tokenizer if not is_tokenizer else getattr(inherited, "processor", None)
        self.chat_template: Any = source.chat_template
        if self.chat_template is None:
            self.chat_template = getattr(self.processor, "chat_template", None)
        self.item_tokenizer: Tokenizer | None = (
            item_tokenizer
            if item_tokenizer is not None
            else getattr(inherited, "item_tokenizer", None)
        )

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        *init_inputs: Any,
        item_tokenizer: Tokenizer | None = None,
        **kwargs: Any,
    ) -> Self:
        """Restore a saved instance; arguments as transformers', and the item tokenizer.

        Raises:
            ValueError: the folder was not saved by this class.
        """
        # tokenizer.json has the added tokens; without this transformers reads them again, one
        # object each, and copies those: seconds for tens of thousands.
        kwargs.setdefault("added_tokens_decoder", {})
        base = PreTrainedTokenizerFast.from_pretrained(
            pretrained_model_name_or_path, *init_inputs, **kwargs
        )
        settings = {name: base.init_kwargs.get(name) for name in ("num_levels", "codebook_size")}
        missing = [name for name, value in settings.items() if value is None]
        if missing:
            raise ValueError(
                f"{pretrained_model_name_or_path} stores no {' and no '.join(missing)}: it was "
                "not saved by ItemAwareTokenizer; wrap its tokenizer instead"
            )
        return cls(base, item_tokenizer, **settings)

    # Vocabulary ---------------------------------------------------------------------------

    @property
    def vocab_size(self) -> int:
        """Size of the extended vocabulary, ``len(self)``."""
        return len(self)

    @property
    def text_tokenizer(self) -> Self:
        """The tokenizer of text: this object."""
        return self

    @property
    def item_tokens(self) -> ItemTokens:
        """Where the item tokens lie."""
        return ItemTokens(
            offset=self.original_vocab_size,
            level_stride=self.codebook_size,
            num_levels=self.num_levels,
            codebook_size=self.codebook_size,
            start_token_id=self.item_sep_token_id,
            end_token_id=self.item_end_token_id,
        )

    @property
    def item_sep_token_id(self) -> int:
        """Id of the start token, which separates text from an item."""
        return int(self.original_vocab_size + self.num_levels * self.codebook_size)

    @property
    def item_end_token_id(self) -> int:
        """Id of the end token."""
        return self.item_sep_token_id + 1

    def item_token_id(self, level: int, code: int) -> int:
        """Token id of one code.

        Raises:
            ValueError: level outside [0, L) or code outside [0, K).
        """
        return self.item_tokens.token_id(level, code)

    @property
    def all_special_tokens(self) -> list[str]:
        """Every special token's string, those of items included."""
        named: list[str] = super().all_special_tokens
        return named + item_vocabulary(self.num_levels, self.codebook_size)

    @property
    def all_special_ids(self) -> list[int]:
        """Ids of :attr:`all_special_tokens`."""
        named = self.convert_tokens_to_ids(super().all_special_tokens)
        return [*named, *range(self.original_vocab_size, self.item_end_token_id + 1)]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Encode as the processor does, or, without one, as any tokenizer."""
        if self.processor is not None:
            return self.processor(*args, **kwargs)
        return super().__call__(*args, **kwargs)

    # Sequences of text and items ----------------------------------------------------------

    def encode_sequence(self, parts: Sequence[str | Tensor]) -> list[int]:
        """Token ids of texts and item vectors in a row.

        A text is encoded without special tokens. An item is its L code tokens and the end token;
        the start token stands before it only if the part just before it is a text. All items of
        the call are encoded together.

        Args:
            parts: texts, and item vectors (D,).

        Raises:
            RuntimeError: an item, but no item tokenizer.
            ValueError: an item that is not (D,), or codes that do not fit L and K.
            TypeError: a part of another type.
        """
        for part in parts:
            if not isinstance(part, (str, Tensor)):
                raise TypeError(f"a part is a {type(part).__name__}; expected str or Tensor")
        items = iter(self._encode_items([part for part in parts if isinstance(part, Tensor)]))
        ids: list[int] = []
        after_text = False
        for part in parts:
            if isinstance(part, str):
                ids += self.encode(part, add_special_tokens=False)
            else:
                if after_text:
                    ids.append(self.item_sep_token_id)
                ids += next(items)
                ids.append(self.item_end_token_id)
            after_text = isinstance(part, str)
        return ids

    def decode_sequence(self, ids: Iterable[int] | Tensor) -> list[str | TokenSequence]:
        """Texts and items of token ids, in order.

        Item tokens give a ``TokenSequence`` of 1-D codes every L tokens; start and end tokens
        are boundaries and dropped. An item that a boundary or a text cuts short comes out short.

        Args:
            ids: token ids, a list or a 1-D tensor.
        """
        parts: list[str | TokenSequence] = []
        text: list[int] = []
        codes: list[int] = []

        def flush() -> None:
            if text:
                parts.append(self.decode(text))
                text.clear()
            if codes:
                parts.append(TokenSequence(torch.tensor(codes, dtype=torch.long)))
                codes.clear()

        boundaries = (self.item_sep_token_id, self.item_end_token_id)
        for token in ids.tolist() if isinstance(ids, Tensor) else map(int, ids):
            if token in boundaries:
                flush()
            elif self.original_vocab_size <= token < self.item_sep_token_id:
                if text or len(codes) == self.num_levels:
                    flush()
                codes.append((token - self.original_vocab_size) % self.codebook_size)
            else:
                if codes:
                    flush()
                text.append(token)
        flush()
        return parts

    def build_item_trie(
        self, catalog_codes: Tensor | TokenSequence, dense_lookup_layers: int = 1
    ) -> CompactCSRTrie:
        """Trie of a catalog's semantic IDs, over this tokenizer's token ids.

        Args:
            catalog_codes: integer (N, L), raw codes in [0, K), in any order, repeats allowed; or
                the ``TokenSequence`` that ``encode`` gave.
            dense_lookup_layers: depths with a dense table, ``vocab_size ** depth`` entries each.

        Returns:
            The trie on the codes' device, its ``vocab_size`` that of this tokenizer.

        Raises:
            ValueError: wrong shape, or a code out of range.
        """
        if isinstance(catalog_codes, TokenSequence):
            catalog_codes = catalog_codes.codes
        codes = _checked_codes(catalog_codes, self.num_levels, self.codebook_size)
        levels = torch.arange(self.num_levels, device=codes.device)
        token_ids = codes + (self.original_vocab_size + levels * self.codebook_size)
        # It sorts rows that are not in order.
        return CompactCSRTrie.from_sorted_batch(
            token_ids, vocab_size=len(self), dense_lookup_layers=dense_lookup_layers
        )

    def _encode_items(self, vectors: list[Tensor]) -> list[list[int]]:
        """Code tokens of item vectors (D,): one list of L ids each."""
        if not vectors:
            return []
        if self.item_tokenizer is None:
            raise RuntimeError("an item vector was given, but item_tokenizer is None")
        shapes = {tuple(vector.shape) for vector in vectors}
        if len(shapes) > 1 or len(next(iter(shapes))) != 1:
            raise ValueError(f"item vectors have shapes {sorted(shapes)}; expected one (D,)")
        device, dtype = _placement(self.item_tokenizer)
        batch = torch.stack([vector.detach().to(device=device, dtype=dtype) for vector in vectors])
        codes = self.item_tokenizer.encode(batch).codes.reshape(len(vectors), -1)
        codes = _checked_codes(codes, self.num_levels, self.codebook_size)
        levels = torch.arange(self.num_levels, device=codes.device)
        token_ids: list[list[int]] = (
            codes + (self.original_vocab_size + levels * self.codebook_size)
        ).tolist()
        return token_ids


def _settings(source: PreTrainedTokenizerFast) -> dict[str, Any]:
    """Constructor arguments that make a tokenizer behave as ``source`` does now."""
    settings = {name: getattr(source, name) for name in _CARRIED if hasattr(source, name)}
    standard = PreTrainedTokenizerFast.SPECIAL_TOKENS_ATTRIBUTES
    named = source.special_tokens_map
    settings.update({name: token for name, token in named.items() if name in standard})
    extra_named = {name: token for name, token in named.items() if name not in standard}
    if extra_named:
        settings["model_specific_special_tokens"] = extra_named
    if source.extra_special_tokens:
        settings["extra_special_tokens"] = source.extra_special_tokens
    return settings


def _require_special_tokens(source: PreTrainedTokenizerFast) -> None:
    """Refuse named special tokens without an id: they would be added in the midst of the items."""
    for name, token in source.special_tokens_map.items():
        if source.backend_tokenizer.token_to_id(token) is None:
            raise ValueError(
                f"{name} {token!r} is not in the tokenizer's vocabulary; add it with "
                "add_special_tokens before wrapping"
            )


def _placement(item_tokenizer: Tokenizer) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of an item tokenizer's tensors; CPU float32 if it has none."""
    for name in ("parameters", "buffers"):
        tensors = getattr(item_tokenizer, name, None)
        for tensor in tensors() if callable(tensors) else ():
            if tensor.is_floating_point():
                return tensor.device, tensor.dtype
    return torch.device("cpu"), torch.float32


def _checked_codes(codes: Tensor, num_levels: int, codebook_size: int) -> Tensor:
    """``codes`` as long (N, L), after a check of shape and range."""
    if codes.ndim != 2 or codes.shape[1] != num_levels:
        raise ValueError(f"codes have shape {tuple(codes.shape)}; expected (N, {num_levels})")
    if codes.is_floating_point() or codes.dtype == torch.bool:
        raise ValueError(f"codes have dtype {codes.dtype}; expected an integer dtype")
    if codes.numel():
        low, high = int(codes.min()), int(codes.max())
        if low < 0 or high >= codebook_size:
            raise ValueError(f"codes span {low} to {high}; allowed are 0 to {codebook_size - 1}")
    return codes.long()


AutoTokenizer.register(
    ItemAwareCausalLMConfig, fast_tokenizer_class=ItemAwareTokenizer, exist_ok=True
)
