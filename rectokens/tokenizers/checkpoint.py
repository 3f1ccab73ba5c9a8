"""Tokenizer files: tensors and a plain configuration, readable without running code."""

from __future__ import annotations

import os
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rectokens.core.atomic_file import atomic_file


def write_checkpoint(path: str | PathLike[str], payload: dict[str, Any]) -> None:
    """Write ``payload`` to one file, creating missing parent folders.

    The file appears whole or not at all: it is written beside its place and renamed.

    Args:
        payload: tensors, numbers, strings, lists and dicts only.
    """
    # Through a file object: given a name, torch would store the temporary one inside.
    with atomic_file(Path(path)) as partial, open(partial, "wb") as file:
        torch.save(payload, file)


def cpu_state(module: nn.Module) -> dict[str, Tensor]:
    """The state of a module, on the CPU, so that the file opens on any machine."""
    return {name: value.cpu() for name, value in module.state_dict().items()}


def read_checkpoint(path: str | PathLike[str], keys: tuple[str, ...]) -> dict[str, Any]:
    """Read what :func:`write_checkpoint` wrote, on the CPU, with ``weights_only=True``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no checkpoint, a damaged one, or one that lacks any of ``keys``.
    """
    try:
        payload = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # torch reports damage by many types, pickle's among them
        raise ValueError(f"{os.fspath(path)} is no readable tokenizer file: {error}") from error
    missing = (
        [key for key in keys if key not in payload] if isinstance(payload, dict) else list(keys)
    )
    if missing:
        raise ValueError(f"{os.fspath(path)} is no tokenizer file: it has no {', '.join(missing)}")
    return dict(payload)
