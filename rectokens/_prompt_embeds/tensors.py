"""Tensors from their descriptions and the archive's members."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from rectokens._prompt_embeds.description import TensorDescription
from rectokens._prompt_embeds.errors import PromptEmbedsError


def check_dense(name: str, tensor: TensorDescription, members: Mapping[str, memoryview]) -> None:
    """Refuse a tensor that is anything but the whole of its storage, in row-major order.

    Raises:
        PromptEmbedsError: negative sizes, strides that are not contiguous, an offset, or a storage
            or member that is larger or smaller than the tensor.
    """
    if any(extent < 0 for extent in tensor.size):
        raise PromptEmbedsError(f"{name} has a negative size")
    expected = 1
    for extent, stride in zip(reversed(tensor.size), reversed(tensor.stride), strict=True):
        if extent > 1 and stride != expected:
            raise PromptEmbedsError(f"{name} is not contiguous; save a contiguous tensor")
        expected *= max(extent, 1)
    numel = math.prod(tensor.size)
    storage = tensor.storage
    if tensor.offset != 0 or storage.numel != numel:
        raise PromptEmbedsError(
            f"{name} has {numel} elements in a storage of {storage.numel} at offset "
            f"{tensor.offset}; save a clone that fills its storage"
        )
    member = members.get(f"data/{storage.key}")
    if member is None:
        raise PromptEmbedsError(f"{name} has no data in the archive")
    wanted = numel * storage.dtype.itemsize
    if len(member) != wanted:
        raise PromptEmbedsError(f"{name} needs {wanted} bytes, the archive has {len(member)}")


def check_members_used(
    tensors: Mapping[str, TensorDescription], members: Mapping[str, memoryview]
) -> None:
    """Refuse data that no tensor, or more than one, refers to.

    Raises:
        PromptEmbedsError: the above.
    """
    keys = sorted(f"data/{tensor.storage.key}" for tensor in tensors.values())
    if keys != sorted(name for name in members if name.startswith("data/")):
        raise PromptEmbedsError("tensors and data members of the archive are not one to one")


def build(tensor: TensorDescription, members: Mapping[str, memoryview]) -> Tensor:
    """A CPU tensor of its own memory; the description has passed `check_dense`."""
    data = bytearray(members[f"data/{tensor.storage.key}"])
    return torch.frombuffer(data, dtype=tensor.storage.dtype).reshape(tensor.size)
