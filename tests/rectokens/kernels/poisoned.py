"""Memory that shows what a kernel did not write."""

import torch


def new_empty(tensor, *shape, dtype=None, **_):
    """In place of ``Tensor.new_empty``: NaN, or an id that no trie has."""
    shape = (shape[0],) if isinstance(shape[0], int) and len(shape) == 1 else shape
    shape = shape[0] if isinstance(shape[0], (tuple, list)) else shape
    dtype = dtype or tensor.dtype
    return torch.full(shape, float("nan") if dtype.is_floating_point else -77, dtype=dtype)
