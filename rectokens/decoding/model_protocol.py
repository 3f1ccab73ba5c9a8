"""What constrained decoding asks of a language model, and how it handles the model's cache.

A model is called as ``model(input_ids, past_key_values=..., attention_mask=..., use_cache=True)``
and returns an object with ``logits`` (rows, T, V) and ``past_key_values``: None (a model without
memory: it is shown the newest token only), a cache with ``reorder_cache``, or a tuple of layers,
each a tuple of tensors with rows in dimension 0. ``position_ids`` and ``logits_to_keep`` are
passed only to a model whose signature names them, and a model whose signature says ``cache`` gets
and returns its cache by that name. Prompts are padded on the left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rectokens.decoding.model_cache import cache_argument, named_parameters
from rectokens.modules.sparse_linear import SparseLinear

Model = Callable[..., Any]


def call_model(
    model: Model, input_ids: Tensor, past_key_values: Any, attention_mask: Tensor | None
) -> Any:
    """One forward pass.

    Args:
        model: see the module's text.
        input_ids: int64 (rows, T); negative ids, those of dead beams, are fed as 0.
        past_key_values: what the last call returned, None at the first.
        attention_mask: (rows, T_past + T) or None.

    Returns:
        The model's output object.
    """
    extra: dict[str, Any] = {}
    named = named_parameters(model)
    if attention_mask is not None and "position_ids" in named:
        positions = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
        extra["position_ids"] = positions[:, -input_ids.shape[1] :]
    if "logits_to_keep" in named:
        extra["logits_to_keep"] = 1
    return model(
        input_ids.clamp(min=0),
        **cache_argument(model, past_key_values),
        attention_mask=attention_mask,
        use_cache=True,
        **extra,
    )


def last_logits(output: Any, num_rows: int, vocab_size: int) -> Tensor:
    """Logits of the last position, (rows, C) with C at least V.

    Raises:
        ValueError: logits of another shape.
    """
    logits: Tensor = output.logits
    if logits.ndim != 3 or logits.shape[0] != num_rows or logits.shape[1] < 1:
        raise ValueError(
            f"model returned logits of shape {tuple(logits.shape)}; expected ({num_rows}, T, V)"
        )
    if logits.shape[2] < vocab_size:
        raise ValueError(
            f"model returned {logits.shape[2]} logits a position; the trie's vocab_size is "
            f"{vocab_size}"
        )
    return logits[:, -1]


def gather_cache_rows(past_key_values: Any, rows: Tensor) -> Any:
    """The cache whose row i is row ``rows[i]`` of the one given (an HF cache: in place).

    Raises:
        TypeError: a cache of an unknown kind.
    """
    if past_key_values is None:
        return None
    if hasattr(past_key_values, "reorder_cache"):
        reordered = past_key_values.reorder_cache(rows)
        return past_key_values if reordered is None else reordered
    if isinstance(past_key_values, (tuple, list)):
        return tuple(_gather_layer(layer, rows) for layer in past_key_values)
    raise TypeError(
        f"past_key_values is a {type(past_key_values).__name__}; expected None, an object with "
        "reorder_cache, or a tuple of (key, value) pairs"
    )


def sparse_output_layer(model: Model) -> SparseLinear | None:
    """The model's ``SparseLinear``, if it has one.

    Raises:
        ValueError: it has several.
    """
    module = _module_of(model)
    if module is None:
        return None
    found = [m for m in module.modules() if isinstance(m, SparseLinear)]
    if len(found) > 1:
        raise ValueError(f"model has {len(found)} SparseLinear layers; at most 1, the output layer")
    return found[0] if found else None


@contextmanager
def watching_logits(layer: SparseLinear | None) -> Iterator[list[Tensor]]:
    """Collects what ``layer`` returns while a model runs, at the last position: (rows, V)."""
    seen: list[Tensor] = []
    if layer is None:
        yield seen
        return

    def keep(_layer: nn.Module, _inputs: Any, output: Tensor) -> None:
        seen.append(output if output.ndim == 2 else output[:, -1])

    handle = layer.register_forward_hook(keep)
    try:
        yield seen
    finally:
        handle.remove()


@contextmanager
def evaluating(model: Model) -> Iterator[None]:
    """Evaluation mode inside (no dropout, caches kept); every module's own mode afterwards."""
    module = _module_of(model)
    training = [m for m in module.modules() if m.training] if module is not None else []
    if not training:
        yield
        return
    assert module is not None
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


def _module_of(model: Model) -> nn.Module | None:
    owner = getattr(model, "__self__", model)  # a bound method stands for its module
    return owner if isinstance(owner, nn.Module) else None


def _gather_layer(layer: Any, rows: Tensor) -> Any:
    if isinstance(layer, torch.Tensor):
        return layer.index_select(0, rows.to(layer.device))
    if layer is None:
        return None
    return tuple(_gather_layer(part, rows) for part in layer)
