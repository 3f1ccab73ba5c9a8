"""Text, chats and items to token ids, with the model's own tokenizer."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rectokens.artifacts.binding import check_binding
from rectokens.artifacts.model import SPEC_NAME, RetrievalSpec, load_model_manifest
from rectokens.catalog.artifact import load_catalog
from rectokens.catalog.catalog import Catalog
from rectokens.prompts.builder import PromptBuilder
from rectokens.prompts.markup import ItemMention, split_mentions
from rectokens.prompts.parts import ItemPart, Part, TextPart
from rectokens.prompts.registry import prompt_builder
from rectokens.schemas.item_tokens import ItemTokens
from server.errors import invalid
from server.prompts import unknown_items_error
from server.proxy.errors import ProxyError

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
# Arguments of apply_chat_template that decide more than what the template shows.
_RESERVED = frozenset(
    {"conversation", "chat_template", "tokenize", "return_tensors", "return_dict"}
)
# What a template raises where messages or options are not what it makes sense of.
_OF_TEMPLATES = (
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)


class ProxyPrompts:
    """Makes prompts. Safe to share between threads.

    Args:
        tokenizer: the model's, None for a model of items alone.
        spec: how the model speaks of items, None for one that does not.
        catalog: resolves ``<item:ID>``; None leaves it text.

    Raises:
        ProxyError: neither a tokenizer nor a catalog, or a recipe that cannot be followed.
    """

    def __init__(self, tokenizer: Any, spec: RetrievalSpec | None, catalog: Catalog | None) -> None:
        if tokenizer is None and catalog is None:
            raise ProxyError("the model has no tokenizer; give --catalog for prompts of items")
        if catalog is not None and spec is None:
            raise ProxyError(f"the model has no {SPEC_NAME}, without which a catalog has no use")
        self._tokenizer = tokenizer
        self._backend = None if tokenizer is None else _text_backend(tokenizer, spec)
        self._items = None if spec is None else spec.item_tokens
        self._catalog = catalog
        self._builder: PromptBuilder | None = None
        self._start: list[int] = []
        if spec is not None and catalog is not None:
            self._start = [spec.item_tokens.start_token_id]
            try:
                self._builder = prompt_builder(spec.prompt, spec.item_tokens, tokenizer)
            except ValueError as error:
                raise ProxyError(str(error)) from error

    def completion(self, text: str, param: str, *, add_special_tokens: bool) -> Sequence[int]:
        """Token ids of a completion's prompt.

        With a catalog, the prompt that the model's recipe makes of the text and its items: what
        our own server makes of the same text. Without one, the tokenizer's.

        Raises:
            ServiceError: items that are unknown, or text where the recipe takes none.
        """
        if self._builder is None:
            return self._encode(text, add_special_tokens=add_special_tokens)
        pieces = split_mentions(text)
        codes = self._codes(pieces, param)
        parts: list[Part] = [
            ItemPart(codes[p.item_id]) if isinstance(p, ItemMention) else TextPart(p)
            for p in pieces
        ]
        try:
            return self._builder.build(parts).token_ids
        except ValueError as error:
            raise invalid(param, str(error)) from error

    def chat(
        self, messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any]
    ) -> Sequence[int]:
        """Token ids of a chat, by the tokenizer's template; items stand where they are named.

        Args:
            messages: of the chat, contents as text.
            options: for the template.

        Raises:
            ServiceError: no template, one that refuses these messages, or unknown items.
        """
        from jinja2 import TemplateError

        if self._tokenizer is None or not getattr(self._tokenizer, "chat_template", None):
            raise invalid("messages", "the model's tokenizer has no chat template")
        reserved = sorted(_RESERVED & options.keys())
        if reserved:
            raise invalid("chat_template_kwargs", f"{reserved[0]} is not an option of a template")
        try:
            text = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tokenize=False,
                **{"add_generation_prompt": True, **options},
            )
        except (TemplateError, *_OF_TEMPLATES) as error:
            raise invalid("messages", f"the chat template refuses the messages: {error}") from error
        if self._builder is None:
            return self._encode(text, add_special_tokens=False)
        pieces = split_mentions(text, keep_blank=True)
        codes = self._codes(pieces, "messages")
        ids: list[int] = []
        for piece in pieces:
            if isinstance(piece, ItemMention):
                ids += [*self._start, *self._builder.target(codes[piece.item_id])]
            else:
                ids += self._encode(piece, add_special_tokens=False)
        return ids

    def _encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        if self._backend is None:
            raise invalid("prompt", "the model has no tokenizer, it takes items only")
        ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        if self._items is not None:
            bad = next((one for one in ids if _is_item_token(one, self._items)), None)
            if bad is not None:
                raise invalid(
                    "prompt",
                    f"text encodes to the item token id {bad}: item tokens are words of the "
                    "model's tokenizer; name items as <item:ID>",
                )
        return ids

    def _codes(self, pieces: Sequence[str | ItemMention], param: str) -> dict[str, tuple[int, ...]]:
        """Codes of the items named, by item id."""
        assert self._catalog is not None
        names = list({p.item_id: None for p in pieces if isinstance(p, ItemMention)})
        indices = self._catalog.index_of(names)
        found = (indices >= 0).tolist()
        unknown = [name for name, known in zip(names, found, strict=True) if not known]
        if unknown:
            raise unknown_items_error(param, self._catalog, unknown)
        codes = self._catalog.codes_of(indices).tolist()
        return {name: tuple(row) for name, row in zip(names, codes, strict=True)}


def load_prompts(model_dir: Path, catalog_dir: Path | None) -> ProxyPrompts:
    """What a model folder, and a catalog, say about prompts.

    Args:
        model_dir: one of our model artifacts, or any Hugging Face folder.
        catalog_dir: a catalog of the same tokenizer fingerprint, or None.

    Raises:
        ProxyError: something is missing, damaged, or does not belong together.
    """
    try:
        spec = None
        if (model_dir / SPEC_NAME).exists():
            # Hashing all the weights would read what the proxy exists not to read.
            spec = load_model_manifest(model_dir, verify_checksums=False).spec
        catalog = None if catalog_dir is None else load_catalog(catalog_dir)
        if spec is not None and catalog is not None:
            check_binding(spec, catalog)
        tokenizer = None
        if any((model_dir / name).exists() for name in _TOKENIZER_FILES):
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(model_dir, local_files_only=True)
    except (ValueError, OSError) as error:
        raise ProxyError(str(error)) from error
    return ProxyPrompts(tokenizer, spec, catalog)


def _text_backend(tokenizer: Any, spec: RetrievalSpec | None) -> Any:
    """A copy of the tokenizer for text, in which no text can become an item token."""
    from tokenizers import Tokenizer

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ProxyError(
            f"the model's tokenizer is a {type(tokenizer).__name__}; a fast one is needed"
        )
    state = json.loads(backend.to_str())
    if spec is not None:
        state["added_tokens"] = _hidden(state["added_tokens"], backend, spec.item_tokens)
    copy = Tokenizer.from_str(json.dumps(state))
    moved = [t["id"] for t in state["added_tokens"] if copy.token_to_id(t["content"]) != t["id"]]
    if moved:
        raise ProxyError(f"the tokenizer's token id {moved[0]} cannot be told from item tokens")
    copy.no_truncation()
    copy.no_padding()
    return copy


def _hidden(added: list[dict[str, Any]], backend: Any, items: ItemTokens) -> list[dict[str, Any]]:
    """Added tokens among which item tokens are never found in a text."""
    words = backend.get_vocab(with_added_tokens=False)
    unguessable = secrets.token_hex(16)
    kept = []
    for token in added:
        if not _is_item_token(token["id"], items):
            kept.append(token)
        elif token["content"] not in words:
            # Renamed, not removed: removing would shift the ids that follow.
            kept.append({**token, "content": f"\x00{unguessable}:{token['id']}"})
    return kept


def _is_item_token(token_id: int, items: ItemTokens) -> bool:
    markers = (items.start_token_id, items.end_token_id)
    return items.offset <= token_id < items.end or token_id in markers
