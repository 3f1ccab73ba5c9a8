"""A fine-tuned model with its tokenizer and the items it speaks of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.data.amazon import AmazonReviews
from examples.data.item_codes import ItemTokType, encode_all_items, load_item_tokenizer
from examples.data.reviews import Features
from examples.finetune.retrieval import ItemCatalog
from rectokens.artifacts.tokenizer import tokenizer_fingerprint
from rectokens.integrations.hf import ItemAwareTokenizer
from rectokens.schemas.compact_csr_trie import CompactCSRTrie


@dataclass(frozen=True, eq=False)
class ChatModel:
    """What evaluations of a fine-tuned model need.

    Attributes:
        model: the causal LM without wrapper, in eval mode on its device.
        tokenizer: with item tokens.
        reviews: the data.
        items: all its items as a catalog.
        trie: their semantic IDs as token ids, on the model's device.
        fingerprint: of the item tokenizer.
    """

    model: Any
    tokenizer: ItemAwareTokenizer
    reviews: AmazonReviews
    items: ItemCatalog
    trie: CompactCSRTrie
    fingerprint: str


def load_chat_model(
    model_dir: str,
    hf_model_name: str | None,
    item_tok_path: str,
    item_tok_type: ItemTokType,
    *,
    num_levels: int | None,
    codebook_size: int | None,
    root: str,
    split: str,
    features: Features,
    behaviour_weight: float,
    behaviour_dims: int,
    encode_batch_size: int,
    bf16: bool,
    device: str,
) -> ChatModel:
    """Load all of it.

    Args:
        model_dir: as ``finetune_qwen`` wrote it.
        hf_model_name: where the text tokenizer is from if not from there.
        item_tok_path, item_tok_type: the item tokenizer.
        num_levels, codebook_size: L and K that it must have; None takes any.
        root, split: the data.
        features, behaviour_weight, behaviour_dims: of the item vectors.
        encode_batch_size: items encoded at a time.
        bf16: weights in bfloat16, else float32.
        device: ``auto`` (CUDA where there is one), ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        ValueError: a model, text tokenizer and item tokenizer that do not belong together.
        OSError: something that cannot be read.
    """
    item_tok = load_item_tokenizer(
        item_tok_path, item_tok_type, num_levels=num_levels, codebook_size=codebook_size
    )
    L, K = item_tok.num_levels, item_tok.codebook_size
    if hf_model_name is None:
        tokenizer = ItemAwareTokenizer.from_pretrained(model_dir)
        for name, value in (("num_levels", L), ("codebook_size", K)):
            found = getattr(tokenizer, name)
            if found != value:
                raise ValueError(f"{model_dir} has {name} {found}; {item_tok_path} has {value}")
    else:
        source = AutoTokenizer.from_pretrained(hf_model_name)
        tokenizer = ItemAwareTokenizer(source, num_levels=L, codebook_size=K)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    wrapped = AutoModelForCausalLM.from_pretrained(
        model_dir, dtype=torch.bfloat16 if bf16 else torch.float32
    )
    rows = int(wrapped.get_input_embeddings().weight.shape[0])
    if rows != tokenizer.vocab_size:
        raise ValueError(
            f"{model_dir} has {rows} rows of embeddings; its tokenizer with {L} levels of {K} "
            f"codes has {tokenizer.vocab_size} tokens"
        )
    reviews = AmazonReviews(root, split)
    vectors = reviews.vectors(
        features, behaviour_weight=behaviour_weight, behaviour_dims=behaviour_dims
    )
    codes = encode_all_items(vectors, item_tok, tokenizer, encode_batch_size, "cpu")
    fingerprint = tokenizer_fingerprint(item_tok)
    return ChatModel(
        model=getattr(wrapped, "model", wrapped).to(device).eval()
        if wrapped.config.model_type == "item_aware_causal_lm"
        else wrapped.to(device).eval(),
        tokenizer=tokenizer,
        reviews=reviews,
        items=ItemCatalog.of(reviews, codes, K, fingerprint),
        # One dense layer costs nothing; more would be vocabulary squared.
        trie=tokenizer.build_item_trie(codes.to(device)),
        fingerprint=fingerprint,
    )
