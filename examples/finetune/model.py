"""A causal language model of some folder, made ready for item tokens and for training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.data.precomputed import PrecomputedSequenceDataset
from rectokens.integrations.hf import ItemAwareCausalLM, ItemAwareTokenizer


@dataclass(frozen=True)
class LoraSettings:
    """Low-rank adapters instead of all weights (Hu et al. 2021); the item tokens' rows too.

    Attributes:
        rank: of the adapters; 0 trains all weights.
        alpha: their scale times the rank.
        dropout: in front of them.
        targets: module names, or ``all-linear``.
    """

    rank: int = 0
    alpha: float = 32.0
    dropout: float = 0.05
    targets: str | tuple[str, ...] = "all-linear"

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise ValueError(f"rank is {self.rank}; it must be at least 0")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout is {self.dropout}; allowed are 0 to below 1")


def load_text_tokenizer(
    model_name: str, num_levels: int, codebook_size: int, *, expand: bool
) -> ItemAwareTokenizer:
    """The model's tokenizer with item tokens.

    Args:
        model_name: name or folder.
        num_levels, codebook_size: L and K.
        expand: add the item tokens; False for a folder that was saved with them.

    Raises:
        ValueError: a folder saved with item tokens of other L or K, or none without ``expand``.
    """
    if expand:
        return ItemAwareTokenizer(
            AutoTokenizer.from_pretrained(model_name),
            num_levels=num_levels,
            codebook_size=codebook_size,
        )
    tokenizer = ItemAwareTokenizer.from_pretrained(model_name)
    for name, wanted in (("num_levels", num_levels), ("codebook_size", codebook_size)):
        found = getattr(tokenizer, name)
        if found != wanted:
            raise ValueError(f"{model_name} was saved with {name} {found}; {wanted} was asked for")
    return tokenizer


def load_model(
    model_name: str, tokenizer: ItemAwareTokenizer, *, expand: bool, seed: int
) -> ItemAwareCausalLM:
    """The model with a row for every token of the tokenizer, weights in float32.

    Args:
        model_name: name or folder.
        tokenizer: with item tokens.
        expand: give it rows for them; False wants a model that has them.
        seed: of the new rows.

    Raises:
        ValueError: without ``expand``, a model with another number of rows.
    """
    inner: Any = AutoModelForCausalLM.from_pretrained(model_name, dtype=torch.float32)
    rows = int(inner.get_input_embeddings().weight.shape[0])
    if not expand and rows != tokenizer.vocab_size:
        raise ValueError(
            f"{model_name} has {rows} rows of embeddings and its tokenizer {tokenizer.vocab_size} "
            "tokens; no_expand_vocab wants a model that was saved with its item tokens"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ItemAwareCausalLM.from_causal_lm(inner, tokenizer, seed=seed)


def require_same_vocabulary(
    samples: PrecomputedSequenceDataset, path: str | Path, tokenizer: ItemAwareTokenizer
) -> None:
    """Refuse samples that were made for another vocabulary.

    Raises:
        ValueError: names the file, and both values of what differs.
    """
    for name in ("original_vocab_size", "num_levels", "codebook_size"):
        found, wanted = getattr(samples, name), getattr(tokenizer, name)
        if found != wanted:
            raise ValueError(
                f"{path} was made for {name} {found}; the model's tokenizer has {wanted}"
            )


def require_same_item_tokenizer(
    samples: PrecomputedSequenceDataset, path: str | Path, fingerprint: str
) -> None:
    """Refuse samples that were made with another item tokenizer, where the file says with which.

    Raises:
        ValueError: names the file, and the beginnings of both fingerprints.
    """
    made_with = samples.meta.get("tokenizer_fingerprint", fingerprint)
    if made_with != fingerprint:
        raise ValueError(
            f"{path} was made with the item tokenizer {made_with[:12]}; the one given is "
            f"{fingerprint[:12]}"
        )


def train_item_rows_only(model: Any, first: int) -> None:
    """Freeze everything but the rows of the item tokens, in the embeddings and in the head.

    Rows share a tensor, so the others' gradients are set to zero; train without weight decay.

    Args:
        model: a causal LM.
        first: row of the first item token.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)

    def item_rows(gradient: Tensor) -> Tensor:
        kept = gradient.clone()
        kept[:first] = 0
        return kept

    weights: dict[int, nn.Parameter] = {}
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        if module is not None:
            weights[id(module.weight)] = module.weight
    for weight in weights.values():
        weight.requires_grad_(True)
        weight.register_hook(item_rows)


def with_adapters(model: Any, settings: LoraSettings, first: int, rows: int, seed: int) -> Any:
    """The model with adapters, to be merged by ``merge_and_unload`` after training.

    Args:
        model: a causal LM.
        settings: of the adapters.
        first, rows: item tokens, whose embedding rows are trained themselves.
        seed: of the adapters' first weights.
    """
    from peft import LoraConfig, get_peft_model

    targets = settings.targets
    name = next(
        name for name, module in model.named_modules() if module is model.get_input_embeddings()
    )
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        trainable_token_indices={name.rsplit(".", 1)[-1]: list(range(first, rows))},
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return get_peft_model(model, config)
