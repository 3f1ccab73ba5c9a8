"""Reads a folder of Amazon review sequences: items, text embeddings, one sequence a user."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from server.demo.data import DataFolderError, DemoData

SEQUENCES = "sequences.txt.gz"
ITEMS = "items.jsonl.gz"
EMBEDDINGS = "embeddings.f16.npy"
DEFAULT_SUBFOLDER = "amazon-beauty"


def load_amazon(folder: Path) -> DemoData:
    """Read the data set in ``folder``, or in its subfolder ``amazon-beauty``.

    ``sequences.txt.gz`` has one user a line, ``user item item ...``, oldest first, items
    numbered from 1. ``items.jsonl.gz`` has one object a line in item order: ``id``, ``asin``,
    ``text`` and, where known, ``title``, ``brand`` and ``categories``. ``embeddings.f16.npy``
    is (N, D), row i - 1 for item i.

    Raises:
        DataFolderError: a file is missing, cut short, malformed, or does not fit the others.
    """
    folder = _find_folder(folder)
    items = _read_items(folder / ITEMS)
    embeddings = _read_embeddings(folder / EMBEDDINGS)
    if len(embeddings) != len(items):
        raise DataFolderError(
            f"{folder / EMBEDDINGS} has {len(embeddings)} rows and {ITEMS} has {len(items)} "
            "items; they must be equal, row i - 1 being item i"
        )
    sequences = _read_sequences(folder / SEQUENCES, len(items))
    try:
        return DemoData(
            name=folder.resolve().name,
            item_ids=tuple(item["asin"] for item in items),
            texts=tuple(item["text"] for item in items),
            embeddings=embeddings,
            sequences=sequences,
            metadata=pl.DataFrame(
                {
                    "title": [item.get("title") or "" for item in items],
                    "brand": [item.get("brand") or "" for item in items],
                    "category": [" > ".join(item.get("categories") or ()) for item in items],
                }
            ),
        )
    except ValueError as error:
        raise DataFolderError(f"{folder}: {error}") from error


def _find_folder(folder: Path) -> Path:
    """The folder that holds the files: the one given, or the usual one inside it."""
    if not folder.is_dir():
        raise DataFolderError(f"{folder} is no folder; give one that holds {SEQUENCES}")
    wanted = (SEQUENCES, ITEMS, EMBEDDINGS)
    if not any((folder / name).exists() for name in wanted):
        inner = folder / DEFAULT_SUBFOLDER
        if not inner.is_dir():
            raise DataFolderError(
                f"{folder} holds none of {', '.join(wanted)}, and no folder {DEFAULT_SUBFOLDER}"
            )
        folder = inner
    missing = [name for name in wanted if not (folder / name).is_file()]
    if missing:
        raise DataFolderError(f"{folder} lacks {', '.join(missing)}; all of {wanted} are needed")
    return folder


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines of a gzip text file."""
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            yield from enumerate(file, start=1)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataFolderError(f"{path} is damaged or cut short: {error}") from error
    except UnicodeDecodeError as error:
        raise DataFolderError(f"{path} is not UTF-8: {error}") from error


def _read_items(path: Path) -> list[dict[str, Any]]:
    items: list[dict[str, Any]] = []
    for number, line in _lines(path):
        try:
            item = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataFolderError(f"{path} line {number} is no JSON: {error}") from error
        if not isinstance(item, dict):
            raise DataFolderError(f"{path} line {number} is no JSON object")
        if item.get("id") != number:
            raise DataFolderError(
                f"{path} line {number} has id {item.get('id')!r}; expected {number}, "
                "items being in order of their number"
            )
        for key in ("asin", "text"):
            if not isinstance(item.get(key), str) or not item[key]:
                raise DataFolderError(f"{path} line {number}: {key!r} must be a text, not empty")
        categories = item.get("categories")
        if categories is not None and not (
            isinstance(categories, list) and all(isinstance(name, str) for name in categories)
        ):
            raise DataFolderError(f"{path} line {number}: 'categories' must be a list of texts")
        items.append(item)
    if not items:
        raise DataFolderError(f"{path} has no items")
    return items


def _read_embeddings(path: Path) -> NDArray[np.float32]:
    try:
        embeddings = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise DataFolderError(f"{path} is no readable .npy array: {error}") from error
    if not isinstance(embeddings, np.ndarray) or embeddings.ndim != 2:
        raise DataFolderError(f"{path} holds no (N, D) array")
    if embeddings.dtype.kind != "f":
        raise DataFolderError(f"{path} has dtype {embeddings.dtype}; expected a float type")
    return embeddings.astype(np.float32)


def _read_sequences(path: Path, num_items: int) -> tuple[tuple[int, ...], ...]:
    sequences: list[tuple[int, ...]] = []
    for number, line in _lines(path):
        try:
            _, *items = (int(field) for field in line.split())
        except ValueError as error:
            raise DataFolderError(
                f"{path} line {number}: expected 'user item item ...', all whole numbers: {error}"
            ) from error
        outside = [item for item in items if not 1 <= item <= num_items]
        if outside:
            raise DataFolderError(
                f"{path} line {number} names item {outside[0]}; allowed are 1 to {num_items}"
            )
        sequences.append(tuple(item - 1 for item in items))
    if not sequences:
        raise DataFolderError(f"{path} has no users")
    return tuple(sequences)
