"""The input embeddings of a model, out of its folder and nothing else of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from rectokens.artifacts.errors import ArtifactError
from rectokens.artifacts.json_fields import read_json
from server.proxy.errors import ProxyError

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class EmbeddingTable:
    """Rows of a model's input embedding layer.

    Attributes:
        weight: (V, H), memory-mapped: only the pages of tokens that were asked for are read.
        scale: what the layer multiplies its rows with, 1 for most models.
    """

    weight: Tensor
    scale: float = 1.0

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.weight.shape[0]

    @property
    def hidden_size(self) -> int:
        """H."""
        return self.weight.shape[1]

    def check(self, token_ids: Sequence[int]) -> None:
        """Raise if there are no ids, or one that is no row.

        Raises:
            ValueError: names the id.
        """
        if not token_ids:
            raise ValueError("the prompt has no tokens; the model needs at least one")
        low, high = min(token_ids), max(token_ids)
        if low < 0 or high >= self.vocab_size:
            bad = low if low < 0 else high
            raise ValueError(f"token id {bad} is not one of the model's 0 to {self.vocab_size - 1}")

    def embed(self, token_ids: Sequence[int]) -> Tensor:
        """What the layer gives for token ids (T,): (T, H) in the dtype of the table.

        Raises:
            ValueError: no ids, or one that is no row.
        """
        self.check(token_ids)
        rows = nn.functional.embedding(torch.tensor(token_ids), self.weight)
        # In the table's dtype, the factor rounded to it first: as the layer does it.
        return rows if self.scale == 1.0 else rows * torch.tensor(self.scale, dtype=rows.dtype)


def open_embedding_table(model_dir: Path) -> EmbeddingTable:
    """Find and map the input embeddings of a Hugging Face model folder.

    The model's class is made without memory (on torch's meta device) to learn which weight its
    embedding layer reads and whether it scales the rows.

    Args:
        model_dir: a folder with ``config.json`` and safetensors weights, in one file or in
            shards with an index.

    Raises:
        ProxyError: no such folder, an architecture that transformers does not know, no
            safetensors weights, or no embeddings among them; names what is missing.
    """
    layer, name, head_name = _embedding_layer(model_dir)
    files = _weight_files(model_dir)
    stored = _stored_name(name, head_name, files, model_dir)
    try:
        with safe_open(files[stored], framework="pt") as tensors:
            weight: Tensor = tensors.get_tensor(stored)
    except (SafetensorError, OSError) as error:
        raise ProxyError(f"{files[stored]} cannot be read: {error}") from error
    if weight.shape != layer.weight.shape or weight.dtype not in _DTYPES:
        raise ProxyError(
            f"{stored} in {files[stored]} is {weight.dtype} of shape {tuple(weight.shape)}; "
            f"expected float32, float16 or bfloat16 of shape {tuple(layer.weight.shape)}"
        )
    return EmbeddingTable(weight, _scale(layer))


def _embedding_layer(model_dir: Path) -> tuple[Any, str, str | None]:
    """The model's embedding layer, its weight's name, and the name of a head tied to it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(model_dir, local_files_only=True)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (ValueError, OSError, KeyError) as error:
        raise ProxyError(f"{model_dir} holds no causal LM that is known: {error}") from error
    layer, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = {module: name for name, module in model.named_modules()}
    tied = head is not None and getattr(config.get_text_config(), "tie_word_embeddings", False)
    return layer, f"{names[layer]}.weight", f"{names[head]}.weight" if tied else None


def _scale(layer: Any) -> float:
    if type(layer) is nn.Embedding:
        return 1.0
    scale = getattr(layer, "scalar_embed_scale", None)
    if not isinstance(scale, int | float):
        raise ProxyError(
            f"the model's input embeddings are a {type(layer).__name__}, which is more than a table"
        )
    return float(scale)


def _weight_files(model_dir: Path) -> dict[str, Path]:
    """File of every stored weight."""
    index = model_dir / _INDEX
    try:
        if index.exists():
            weights = read_json(index, finite=False).mapping("weight_map")
            for file in weights.values():
                if not isinstance(file, str) or Path(file).name != file:
                    raise ProxyError(f"{index} names the file {file!r}; expected a plain name")
            return {name: model_dir / file for name, file in weights.items()}
        single = model_dir / _SINGLE
        with safe_open(single, framework="pt") as tensors:
            return dict.fromkeys(tensors.keys(), single)
    except (SafetensorError, OSError, ArtifactError) as error:
        raise ProxyError(
            f"{model_dir} has no readable safetensors weights ({_SINGLE} or {_INDEX}): {error}"
        ) from error


def _stored_name(name: str, head_name: str | None, files: dict[str, Path], model_dir: Path) -> str:
    """What a weight is called in the folder; checkpoints put other words in front."""
    leaf = ".".join(name.split(".")[-2:])
    for wanted in (name, head_name):
        if wanted in files:
            return str(wanted)
        if wanted == name:
            like = [one for one in files if one == leaf or one.endswith("." + leaf)]
            if len(like) == 1:
                return like[0]
    raise ProxyError(f"{model_dir} has no weight {name}, which the input embeddings are")
