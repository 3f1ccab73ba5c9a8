"""How good a tokenizer's codes are on given vectors."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from rectokens.tokenizers.batches import Batch, checked_batches
from rectokens.tokenizers.residual import ResidualTokenizer

HISTOGRAM_BINS = 32


def quality_report(tokenizer: ResidualTokenizer, batches: Iterable[Batch]) -> dict[str, Any]:
    """Quality figures over all rows, in one pass; memory grows by the codes and a hash a row.

    Args:
        tokenizer: fitted.
        batches: (B, D) each, tensors or arrays.

    Returns:
        JSON values. From the codes alone: ``num_items``, ``num_semantic_ids``,
        ``collision_rate`` (share of items whose semantic ID another item has too),
        ``duplicates_rate`` ((N - distinct) / N), ``p_unique`` (distinct / N),
        ``largest_group``. ``collision_rate_floor`` and ``duplicates_rate_floor``: the part that
        equal rows make unavoidable. Per level, as lists: ``reconstruction_error``, what the
        levels up to this one leave of the variance, sum ||x - x̂||² / sum ||x - mean||² (over
        sum ||x||² where the rows are all equal); ``codes_used``; ``entropy_bits``, of the codes'
        shares, at most log2 K; ``code_use``, the :func:`code_use` of each level.

    Raises:
        RuntimeError: the tokenizer is not fitted.
        TypeError, ValueError: batches that are unreadable, empty, of another width, or hold NaN
            or infinite values.
    """
    # Imported here: codes must be fitted and used without the packages of the catalog.
    from rectokens.catalog.collisions import collision_report
    from rectokens.catalog.identical_rows import IdenticalRows

    codebooks = tokenizer.codebooks
    identical = IdenticalRows()
    dim = tokenizer.feature_dim
    sums = torch.zeros(dim, dtype=torch.float64)
    squares = energy = 0.0
    errors = [0.0] * tokenizer.num_levels
    parts: list[Tensor] = []
    # Sums of squares are taken about the first row: far from the origin they would cancel.
    origin: Tensor | None = None
    for batch in checked_batches(batches, dim):
        origin = batch[0] if origin is None else origin
        codes = tokenizer.encode(batch).codes
        for level, error in enumerate(_errors_by_level(tokenizer, codebooks, batch, codes)):
            errors[level] += error
        centred = batch.double() - origin.double()
        sums += centred.sum(dim=0)
        squares += float(centred.square().sum())
        energy += float(batch.double().square().sum())
        identical.update(batch)
        parts.append(codes.to("cpu", torch.int32))
    if not parts:
        raise ValueError("batches have no rows; a report needs at least 1")

    codes = torch.cat(parts)
    num_items = codes.shape[0]
    variance = squares - float(sums.square().sum()) / num_items
    scale = next((value for value in (variance, energy) if value > 0), 1.0)
    collisions = collision_report(codes)
    use = [
        code_use(torch.bincount(column.long(), minlength=tokenizer.codebook_size))
        for column in codes.unbind(1)
    ]
    return {
        **collisions,
        "p_unique": collisions["num_semantic_ids"] / num_items,
        **identical.report(),
        "reconstruction_error": [error / scale for error in errors],
        "codes_used": [level["codes_used"] for level in use],
        "entropy_bits": [level["entropy_bits"] for level in use],
        "code_use": use,
    }


def code_use(counts: Tensor) -> dict[str, Any]:
    """How evenly the codes of one level are used.

    Args:
        counts: int64 (K,), items that have each code, of at least one item.

    Returns:
        ``codes_used`` of ``codes``; ``entropy_bits`` of the distribution of items over codes and
        ``perplexity``, 2 to that; ``histogram``, items in up to 32 bins of neighbouring codes.
    """
    used = counts[counts > 0].double()
    shares = used / used.sum()
    entropy = max(-float((shares * shares.log2()).sum()), 0.0)
    bins = min(HISTOGRAM_BINS, counts.numel())
    bin_of = torch.arange(counts.numel()) * bins // counts.numel()
    histogram = torch.zeros(bins, dtype=torch.long).index_add_(0, bin_of, counts)
    return {
        "codes": counts.numel(),
        "codes_used": used.numel(),
        "entropy_bits": entropy,
        "perplexity": 2**entropy,
        "histogram": histogram.tolist(),
    }


def _errors_by_level(
    tokenizer: ResidualTokenizer, codebooks: list[Tensor], batch: Tensor, codes: Tensor
) -> list[float]:
    """Sum of ||x - x̂||² over a batch (B, D), after each level."""
    errors = []
    latent = torch.zeros(1, device=codes.device)
    rows = batch.to(codes.device)
    with torch.no_grad():
        for level, codebook in enumerate(codebooks):
            latent = latent + codebook[codes[:, level]]
            gaps = rows - tokenizer.from_latent(latent).float()
            errors.append(float(gaps.double().square().sum()))
    return errors
