"""Tokenizer files: tensors and a plain configuration, readable without running code."""

from __future__ import annotations

import os
import tempfile
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def write_checkpoint(path: str | PathLike[str], payload: dict[str, Any]) -> None:
    """Write ``payload`` to one file, creating missing parent folders.

    The file appears whole or not at all: it is written beside its place and renamed.

    Args:
        payload: tensors, numbers, strings, lists and dicts only.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save(payload, file)
            file.flush()
            os.fsync(file.fileno())
        # A temporary file is private to its owner; the result follows the process's umask.
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(name, 0o666 & ~mask)
        os.replace(name, target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


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
