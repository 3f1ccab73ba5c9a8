"""Room for item tokens in a model's embeddings, and what to put there."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

ItemInit = Literal["mean", "codebook"]


def resize_and_initialize(
    hf_model: nn.Module,
    item_tokenizer: Any,
    *,
    init_item_embeddings: ItemInit = "mean",
    seed: int = 0,
) -> None:
    """Give a model's embeddings and head one row per token of ``item_tokenizer``, in place.

    Rows of the source tokenizer's tokens keep their values; rows beyond them that the model had
    as padding, fewer than are needed, are made anew. A head tied to the embeddings stays tied.
    ``"mean"`` leaves the new ones as
    ``resize_token_embeddings`` makes them: transformers draws them from the mean and a tiny part
    of the covariance of the existing rows (Hewitt, "Initializing New Word Embeddings for
    Pretrained Language Models", 2021). ``"codebook"`` then overwrites the rows of the codes as
    :func:`codebook_rows` describes, in the embeddings and in an untied head, each at the scale
    of its own existing rows.

    Args:
        hf_model: offers ``get_input_embeddings``, ``get_output_embeddings`` (may give None) and
            ``resize_token_embeddings(n)``; a ``config`` if it has one gets the new
            ``vocab_size``.
        item_tokenizer: an ``ItemAwareTokenizer``; its ``vocab_size`` is the number of rows.
        init_item_embeddings: ``"mean"`` or ``"codebook"``.
        seed: of the projection of codebook vectors.

    Raises:
        ValueError: an unknown option; ``"codebook"`` without codebooks that fit; or the model's
            own resizing gave another number of rows.
    """
    if init_item_embeddings not in get_args(ItemInit):
        raise ValueError(
            f"init_item_embeddings is {init_item_embeddings!r}; "
            f"allowed are {', '.join(map(repr, get_args(ItemInit)))}"
        )
    codebooks: list[Tensor] = []
    if init_item_embeddings == "codebook":
        codebooks = _codebooks(item_tokenizer)

    rows = int(item_tokenizer.vocab_size)
    model: Any = hf_model
    tied = _is_tied(model)
    if any(weight.shape[0] != rows for weight in _weights(model)):
        original = int(item_tokenizer.original_vocab_size)
        if original < model.get_input_embeddings().weight.shape[0] < rows:
            # Padding that the tokenizer never used, as in Qwen's checkpoints: were it kept, item
            # tokens would start from rows that no training has touched.
            model.resize_token_embeddings(original)
        model.resize_token_embeddings(rows)
        if tied and not _is_tied(model):
            model.get_output_embeddings().weight = model.get_input_embeddings().weight
        _fit_head(model.get_output_embeddings(), rows)
    found = [weight.shape[0] for weight in _weights(model)]
    if any(n != rows for n in found):
        raise ValueError(f"resize_token_embeddings({rows}) left {found} embedding and head rows")
    _update_config(getattr(model, "config", None), rows)

    if codebooks:
        first, size = item_tokenizer.original_vocab_size, item_tokenizer.codebook_size
        for weight in _weights(model):
            new = codebook_rows(codebooks, weight[:first].detach(), seed=seed)
            with torch.no_grad():
                for level, level_rows in enumerate(new):
                    start = first + level * size
                    weight[start : start + size] = level_rows.to(weight)


def codebook_rows(codebooks: list[Tensor], existing: Tensor, *, seed: int = 0) -> list[Tensor]:
    """Embedding rows for codes, so that codes close in their codebook start close in the model.

    Every level is centred, mapped to H dimensions by one fixed random orthonormal projection,
    brought to the root-mean-square distance from the mean that existing rows have, and put
    around their mean. With H >= D the projection keeps all angles and ratios of distances of a
    level. Levels are scaled one by one, since residual codebooks shrink from level to level and
    the later ones would all but coincide.

    Args:
        codebooks: per level (K, D), the same D throughout.
        existing: (V0, H), rows whose mean and scale are taken.
        seed: of the projection; the same seed gives the same rows.

    Returns:
        Per level float32 (K, H) on the device of ``existing``.

    Raises:
        ValueError: no existing rows, or codebooks of differing D or with NaN or infinite values.
    """
    if existing.shape[0] < 1:
        raise ValueError("there are no existing embedding rows to take the scale from")
    dims = {int(codebook.shape[1]) for codebook in codebooks}
    if len(dims) != 1:
        raise ValueError(f"codebooks have dimensions {sorted(dims)}; expected one and the same")
    existing = existing.float()
    mean = existing.mean(dim=0)
    scale = (existing - mean).square().sum(dim=1).mean().sqrt()
    projection = _projection(dims.pop(), existing.shape[1], seed).to(existing.device)
    rows = []
    for level, codebook in enumerate(codebooks):
        vectors = codebook.detach().to(existing.device, torch.float32)
        if not bool(torch.isfinite(vectors).all()):
            raise ValueError(f"the codebook of level {level} has NaN or infinite values")
        projected = (vectors - vectors.mean(dim=0)) @ projection
        spread = projected.square().sum(dim=1).mean().sqrt()
        # A codebook of equal rows has no directions to scale up; its codes start at the mean.
        factor = scale / spread if spread > 0 else torch.zeros_like(spread)
        rows.append(mean + factor * projected)
    return rows


def _projection(dim: int, hidden: int, seed: int) -> Tensor:
    """Random (D, H) with orthonormal rows if D <= H, else orthonormal columns; on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    gaussian = torch.randn(max(dim, hidden), min(dim, hidden), generator=generator)
    q, r = torch.linalg.qr(gaussian)
    # QR leaves the signs of columns to the library; fixed, they make the result unique.
    q = q * r.diagonal().sign()
    projection: Tensor = q.T.contiguous() if dim <= hidden else q
    return projection


def _codebooks(item_tokenizer: Any) -> list[Tensor]:
    """Codebooks (K, D) of the levels that the RQ tokenizer has, checked against L and K.

    It may have fewer levels than there are item tokens for: the level that tells colliding items
    apart has no codebook.
    """
    tokenizer = item_tokenizer.item_tokenizer
    quantizer = getattr(tokenizer, "rq", None) or getattr(tokenizer, "_rq", None)
    if quantizer is None:
        raise ValueError(
            'init_item_embeddings="codebook" needs an item tokenizer with residual codebooks; '
            f"item_tokenizer is {type(tokenizer).__name__}"
        )
    codebooks: list[Tensor] = [level.codebook.embeddings for level in quantizer.levels]
    if len(codebooks) > item_tokenizer.num_levels:
        raise ValueError(
            f"the item tokenizer has {len(codebooks)} levels; "
            f"there are tokens for {item_tokenizer.num_levels}"
        )
    for level, codebook in enumerate(codebooks):
        if codebook.shape[0] != item_tokenizer.codebook_size:
            raise ValueError(
                f"the codebook of level {level} has {codebook.shape[0]} codes; "
                f"there are tokens for {item_tokenizer.codebook_size}"
            )
    return codebooks


def _is_tied(model: Any) -> bool:
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def _weights(model: Any) -> list[Tensor]:
    """Weight of the embeddings, then of the head if there is one that is not tied to them."""
    weights: list[Tensor] = [model.get_input_embeddings().weight]
    head = model.get_output_embeddings()
    if head is not None and head.weight is not weights[0]:
        weights.append(head.weight)
    return weights


def _fit_head(head: Any, rows: int) -> None:
    """Resize a linear head that ``resize_token_embeddings`` did not; new rows are the mean."""
    if not isinstance(head, nn.Linear):
        return
    for name in ("weight", "bias"):
        old: nn.Parameter | None = getattr(head, name)
        if old is None or old.shape[0] == rows:
            continue
        kept = old.detach()[:rows]
        mean = old.detach().float().mean(dim=0, keepdim=True).to(old.dtype)
        new = torch.cat([kept, mean.expand(rows - kept.shape[0], *old.shape[1:])])
        setattr(head, name, nn.Parameter(new, requires_grad=old.requires_grad))
    head.out_features = rows


def _update_config(config: Any, rows: int) -> None:
    """Set ``vocab_size`` of a model's (text) configuration."""
    if config is None:
        return
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    if getattr(text, "vocab_size", None) != rows:
        text.vocab_size = rows
