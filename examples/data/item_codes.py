"""Item tokenizers from files, and the semantic IDs that they give to all items."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from rectokens.artifacts.tokenizer import load_tokenizer
from rectokens.integrations.hf.tokenizer import ItemAwareTokenizer
from rectokens.tokenizers.residual import ResidualTokenizer
from rectokens.tokenizers.rq_kmeans import RQKMeansTokenizer
from rectokens.tokenizers.rqvae import RQVAETokenizer

ItemTokType = Literal["rqvae", "rqkmeans"]

_CLASSES = {"rqvae": RQVAETokenizer, "rqkmeans": RQKMeansTokenizer}


def load_item_tokenizer(
    path: str | PathLike[str],
    item_tok_type: ItemTokType = "rqvae",
    *,
    num_levels: int | None = None,
    codebook_size: int | None = None,
) -> ResidualTokenizer:
    """Read a tokenizer from a file that a training script wrote, or from an artifact folder.

    Args:
        path: ``final.pt``, ``epoch_{n}.pt``, or a tokenizer artifact.
        item_tok_type: ``rqvae`` or ``rqkmeans``.
        num_levels: L that it must have; None takes any.
        codebook_size: K that it must have; None takes any.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: another type, L or K; a damaged file.
    """
    if item_tok_type not in get_args(ItemTokType):
        allowed = ", ".join(map(repr, get_args(ItemTokType)))
        raise ValueError(f"item_tok_type is {item_tok_type!r}; allowed are {allowed}")
    wanted = _CLASSES[item_tok_type]
    path = Path(path)
    tokenizer: ResidualTokenizer = (
        load_tokenizer(path).tokenizer if path.is_dir() else wanted.load(path)
    )
    if not isinstance(tokenizer, wanted):
        raise ValueError(
            f"{path} holds a {type(tokenizer).__name__}; item_tok_type is {item_tok_type!r}"
        )
    for name, value in (("num_levels", num_levels), ("codebook_size", codebook_size)):
        if value is not None and getattr(tokenizer, name) != value:
            raise ValueError(f"{path} has {name} {getattr(tokenizer, name)}; {value} was asked for")
    return tokenizer.eval()


def encode_all_items(
    item_embs: Tensor,
    item_tok: ResidualTokenizer,
    aware_tok: ItemAwareTokenizer,
    batch_size: int = 512,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Semantic IDs of all items.

    Args:
        item_embs: (N, D).
        item_tok: fitted; it is moved to ``device``.
        aware_tok: whose item tokens the codes are for.
        batch_size: items at a time.
        device: where to compute.

    Returns:
        long (N, L) raw codes in [0, K), on the CPU.

    Raises:
        ValueError: vectors of a width that the item tokenizer does not take, or tokenizers of
            another L or K.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    if item_embs.ndim != 2 or item_embs.shape[1] != item_tok.feature_dim:
        raise ValueError(
            f"item vectors have shape {tuple(item_embs.shape)}; the item tokenizer takes "
            f"(N, {item_tok.feature_dim}). Were it and these made from the same features?"
        )
    for name in ("num_levels", "codebook_size"):
        if getattr(item_tok, name) != getattr(aware_tok, name):
            raise ValueError(
                f"the item tokenizer has {name} {getattr(item_tok, name)}, the text tokenizer "
                f"{getattr(aware_tok, name)}; they must be equal"
            )
    item_tok = item_tok.to(device)
    parts = [item_tok.encode(rows.to(device)).codes.cpu() for rows in item_embs.split(batch_size)]
    return torch.cat(parts) if parts else torch.empty(0, item_tok.num_levels, dtype=torch.long)
