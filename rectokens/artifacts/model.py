"""The model artifact: an ordinary Hugging Face folder that knows its semantic IDs and prompt."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from rectokens.artifacts.errors import ArtifactError
from rectokens.artifacts.json_fields import JsonObject, read_json, write_json
from rectokens.artifacts.manifest import (
    Manifest,
    ParentRef,
    open_artifact,
    require_tokenizer,
    write_artifact,
)
from rectokens.prompts.recipe import PromptRecipe
from rectokens.schemas.item_tokens import ItemTokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SPEC_NAME = "generative_retrieval.json"
CARD_NAME = "README.md"
_FORMAT_NAME = "generative-retrieval"
_FORMAT_VERSION = 1
_MAX_TOKEN_ID = 2**31 - 1
_HEX64 = re.compile(r"[0-9a-f]{64}")
# Formats that a reader would have to unpickle.
_PICKLE_SUFFIXES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")
_NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class RetrievalSpec:
    """What ``generative_retrieval.json`` says: how a language model speaks of items.

    Attributes:
        tokenizer_fingerprint: of the tokenizer whose codes the model was trained on.
        item_tokens: token ids of codes, start and end. Its ``num_levels`` counts the extra level
            of the collision policy ``extra_level``.
        prompt: how a history becomes token ids.
    """

    tokenizer_fingerprint: str
    item_tokens: ItemTokens
    prompt: PromptRecipe

    def to_json(self) -> dict[str, Any]:
        """The content of ``generative_retrieval.json``."""
        tokens = self.item_tokens
        return {
            "format": {"name": _FORMAT_NAME, "version": _FORMAT_VERSION},
            "tokenizer_fingerprint": self.tokenizer_fingerprint,
            "num_levels": tokens.num_levels,
            "codebook_size": tokens.codebook_size,
            "item_tokens": {
                "offset": tokens.offset,
                "level_stride": tokens.level_stride,
                "start_token_id": tokens.start_token_id,
                "end_token_id": tokens.end_token_id,
            },
            "prompt": {
                "builder": self.prompt.builder,
                "version": self.prompt.version,
                "params": dict(self.prompt.params),
            },
        }

    @classmethod
    def from_json(cls, fields: JsonObject) -> RetrievalSpec:
        """Read the content of ``generative_retrieval.json``, strictly.

        Raises:
            ArtifactError: unknown format version, a field that is missing, unknown, of another
                type or out of range, or token ids that overlap.
        """
        fields.format_version(_FORMAT_NAME, _FORMAT_VERSION)
        fingerprint = fields.string("tokenizer_fingerprint")
        tokens, prompt = fields.child("item_tokens"), fields.child("prompt")
        try:
            item_tokens = ItemTokens(
                offset=tokens.integer("offset", 0, _MAX_TOKEN_ID),
                level_stride=tokens.integer("level_stride", 1, _MAX_TOKEN_ID),
                num_levels=fields.integer("num_levels", 1, 64),
                codebook_size=fields.integer("codebook_size", 1, 2**16),
                start_token_id=tokens.integer("start_token_id", 0, _MAX_TOKEN_ID),
                end_token_id=tokens.optional_integer("end_token_id", 0, _MAX_TOKEN_ID),
            )
            recipe = PromptRecipe(
                builder=prompt.string("builder"),
                version=prompt.integer("version", 1),
                params=prompt.mapping("params"),
            )
        except ArtifactError:
            raise
        except (TypeError, ValueError) as error:
            raise ArtifactError(f"{fields.where}: {error}") from error
        for reader in (tokens, prompt, fields):
            reader.done()
        spec = cls(fingerprint, item_tokens, recipe)
        spec.check(fields.where)
        return spec

    def check(self, where: str) -> None:
        """Refuse a fingerprint or token ids that cannot be right.

        Raises:
            ArtifactError: malformed fingerprint; start or end token inside a level's block.
        """
        if not _HEX64.fullmatch(self.tokenizer_fingerprint):
            raise ArtifactError(
                f"{where}: tokenizer_fingerprint is {self.tokenizer_fingerprint!r}; expected 64 "
                "hexadecimal digits"
            )
        tokens = self.item_tokens
        for name in ("start_token_id", "end_token_id"):
            token = getattr(tokens, name)
            if token is None:
                continue
            level, code = divmod(token - tokens.offset, tokens.level_stride)
            if 0 <= level < tokens.num_levels and code < tokens.codebook_size:
                raise ArtifactError(
                    f"{where}: {name} is {token}, which is also the token of level {level}, "
                    f"code {code}"
                )

    def max_token_id(self) -> int:
        """Largest token id of any item token, start and end included."""
        tokens = self.item_tokens
        return max(tokens.end - 1, tokens.start_token_id, tokens.end_token_id or 0)


@dataclass(frozen=True, slots=True)
class ModelArtifact:
    """A model folder that was checked; its weights are not loaded.

    Attributes:
        path: the folder, for ``AutoModelForCausalLM.from_pretrained``.
        manifest: ``manifest.version`` is the model version.
        spec: what ties the model to a tokenizer and a prompt.
    """

    path: Path
    manifest: Manifest
    spec: RetrievalSpec


def save_model(
    root: Path,
    model: PreTrainedModel,
    spec: RetrievalSpec,
    *,
    text_tokenizer: PreTrainedTokenizerBase | None = None,
    parents: Mapping[str, ParentRef] = _NOTHING,
    numbers: Mapping[str, float | int | str] = _NOTHING,
    card: str | None = None,
) -> Path:
    """Write a model artifact that transformers alone can load.

    Args:
        root: folder of the version folders.
        model: a causal LM whose vocabulary holds the item tokens. An ``ItemAwareCausalLM`` is
            unwrapped, since transformers alone does not know its type.
        spec: how the model speaks of items.
        text_tokenizer: saved beside the weights, for models that take text.
        parents: what it was made from; the tokenizer's fingerprint is filled in from ``spec``.
        numbers: counts and quality figures.
        card: the model card, Markdown, stored as ``README.md``.

    Returns:
        ``root/<version>``.

    Raises:
        ArtifactError: ``spec`` cannot be right, or names token ids the model does not have.
    """
    spec.check(SPEC_NAME)
    if getattr(model.config, "model_type", None) == "item_aware_causal_lm":
        model = model.model
    rows = model.get_input_embeddings().weight.shape[0]
    _require_vocabulary(spec, rows, "the model's input embedding")
    declared = parents.get("tokenizer", ParentRef(None, spec.tokenizer_fingerprint))
    if declared.fingerprint not in (None, spec.tokenizer_fingerprint):
        raise ArtifactError(
            f"parent tokenizer has fingerprint {declared.fingerprint}; the model's is "
            f"{spec.tokenizer_fingerprint}"
        )
    tokenizer = ParentRef(declared.version, spec.tokenizer_fingerprint)

    def populate(folder: Path) -> None:
        model.save_pretrained(folder)
        if text_tokenizer is not None:
            text_tokenizer.save_pretrained(folder)
        write_json(folder / SPEC_NAME, spec.to_json())
        if card is not None:
            (folder / CARD_NAME).write_text(card, encoding="utf-8")

    counts = {
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "num_levels": spec.item_tokens.num_levels,
        "codebook_size": spec.item_tokens.codebook_size,
        "vocab_size": rows,
    }
    return write_artifact(
        root,
        "model",
        populate,
        parents={**parents, "tokenizer": tokenizer},
        numbers={**counts, **numbers},
    )


def load_model_manifest(path: Path, *, verify_checksums: bool = True) -> ModelArtifact:
    """Check a model folder and read how the model speaks of items, without its weights.

    Raises:
        ArtifactError: not an intact model artifact; pickled weights; a missing or malformed
            ``config.json`` or ``generative_retrieval.json``; item tokens beyond the vocabulary.
    """
    path = Path(path)
    manifest = open_artifact(path, "model", verify_checksums=verify_checksums)
    pickled = [name for name in manifest.files if name.endswith(_PICKLE_SUFFIXES)]
    if pickled:
        raise ArtifactError(
            f"{path / pickled[0]} may be a pickle; weights are accepted as safetensors only"
        )
    for name in ("config.json", SPEC_NAME):
        if name not in manifest.files:
            raise ArtifactError(f"{path} lacks {name}, which a model artifact must have")
    if not any(name.endswith(".safetensors") for name in manifest.files):
        raise ArtifactError(f"{path} has no weights: no .safetensors file")
    spec = RetrievalSpec.from_json(read_json(path / SPEC_NAME))
    vocab_size = _vocab_size(path / "config.json")
    if vocab_size is not None:
        _require_vocabulary(spec, vocab_size, str(path / "config.json"))
    require_tokenizer(path, manifest, SPEC_NAME, spec.tokenizer_fingerprint)
    return ModelArtifact(path=path, manifest=manifest, spec=spec)


def _require_vocabulary(spec: RetrievalSpec, vocab_size: int, where: str) -> None:
    if spec.max_token_id() >= vocab_size:
        raise ArtifactError(
            f"{SPEC_NAME} uses token ids up to {spec.max_token_id()}, but {where} has only "
            f"{vocab_size} tokens"
        )


def _vocab_size(config: Path) -> int | None:
    """Vocabulary size that a Hugging Face configuration states, wherever it states it."""
    fields = read_json(config, finite=False)
    levels = [fields]
    if "text_config" in fields.names():  # models of text and images
        levels.append(fields.child("text_config"))
    for level in levels:
        if "vocab_size" in level.names():
            return level.integer("vocab_size", 1)
    return None
