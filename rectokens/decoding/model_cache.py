"""A model's cache by the name that the model has for it.

Models of transformers took and returned ``past_key_values`` until 5.2x and ``cache`` since, where
the old name warns and is to go. The library's own protocol, and plain modules, say
``past_key_values``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

_OLD, _NEW = "past_key_values", "cache"


def cache_argument(model: Callable[..., Any], cache: Any) -> dict[str, Any]:
    """``cache`` as the keyword argument that ``model`` takes it by."""
    named = named_parameters(model)
    return {_NEW if _NEW in named and _OLD not in named else _OLD: cache}


def returned_cache(output: Any) -> Any:
    """The cache in what a model returned.

    Raises:
        AttributeError: it has none, by either name.
    """
    return output.cache if hasattr(output, _NEW) else output.past_key_values


def named_parameters(model: Callable[..., Any]) -> frozenset[str]:
    """What ``model`` can be given by keyword, but for a catch-all; empty if that cannot be told."""
    model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper hides the signature
    forward = model.forward if isinstance(model, nn.Module) else model
    try:
        parameters = inspect.signature(forward).parameters.values()
    except (TypeError, ValueError):  # a callable that cannot be inspected
        return frozenset()
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return frozenset(p.name for p in parameters if p.kind in by_name)
