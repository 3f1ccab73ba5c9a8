"""The folder that a data set is read from: where it lies, and how it is written."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rectokens.core.atomic_file import fsync_folder, ordinary_mode, partial_sibling
from server.demo.amazon import EMBEDDINGS, ITEMS, SEQUENCES
from server.demo.data import DataFolderError

SPLITS = ("beauty", "sports", "toys")
FILES = (SEQUENCES, ITEMS, EMBEDDINGS)


@dataclass(frozen=True, slots=True)
class Item:
    """What is known of an item.

    Attributes:
        asin: Amazon's id of it.
        title: empty where unknown, as the others.
        brand: of it.
        categories: from wide to narrow.
        price: in dollars, None where unknown.
    """

    asin: str
    title: str = ""
    brand: str = ""
    categories: tuple[str, ...] = ()
    price: float | None = None

    @property
    def text(self) -> str:
        """One line with all that is known; the ASIN alone where nothing is."""
        parts = []
        if self.title:
            parts.append(f"title: {self.title}")
        if self.brand:
            parts.append(f"brand: {self.brand}")
        if self.categories:
            parts.append(f"categories: {' > '.join(self.categories)}")
        if self.price is not None:
            parts.append(f"price: {self.price:.2f}")
        return "; ".join(parts) or f"asin: {self.asin}"


def check_split(split: str) -> None:
    """Raise ValueError unless there is such a data set."""
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; allowed are {', '.join(map(repr, SPLITS))}")


def find_folder(root: Path, split: str) -> Path | None:
    """The folder of a data set, or None where there is none yet.

    Looked for are the files themselves in ``root``, then ``root/amazon-{split}``, then
    ``root/{split}``.

    Raises:
        ValueError: an unknown split.
        DataFolderError: a folder that holds some of the files and lacks others, or one that by
            its name is another data set's; names the folder and the files.
    """
    check_split(split)
    for folder in (root, *candidates(root, split)):
        present = [name for name in FILES if (folder / name).is_file()]
        if not present:
            continue
        missing = [name for name in FILES if name not in present]
        if missing:
            raise DataFolderError(
                f"{folder} has {', '.join(present)} and lacks {', '.join(missing)}; all of "
                f"{', '.join(FILES)} are needed. Complete the folder, or remove it to have the "
                "data downloaded"
            )
        other = folder.resolve().name.removeprefix("amazon-")
        if folder == root and other in SPLITS and other != split:
            raise DataFolderError(
                f"{folder} by its name holds {other!r}, and split is {split!r}; "
                f"give its parent folder, or split={other!r}"
            )
        return folder
    return None


def candidates(root: Path, split: str) -> tuple[Path, Path]:
    """Folders inside ``root`` that may hold a data set."""
    return root / f"amazon-{split}", root / split


def write_folder(
    folder: Path,
    items: Sequence[Item],
    embeddings: NDArray[np.floating],
    sequences: Sequence[Sequence[int]],
) -> None:
    """Write a data set; the folder appears with all its files or not at all.

    Args:
        folder: must not exist, or be empty; its parents are made.
        items: N, row r being item r + 1 of the files.
        embeddings: (N, D), stored as float16.
        sequences: of each user, rows oldest first.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_sibling(folder.parent)
    partial.mkdir()
    try:
        _write_lines(partial / ITEMS, (_item_line(row, item) for row, item in enumerate(items)))
        np.save(partial / EMBEDDINGS, embeddings.astype(np.float16))
        _write_lines(
            partial / SEQUENCES,
            (
                " ".join(str(number + 1) for number in (user, *sequence))
                for user, sequence in enumerate(sequences)
            ),
        )
        for name in FILES:
            with open(partial / name, "rb") as file:
                os.fsync(file.fileno())
        partial.chmod(ordinary_mode() | 0o111)
        os.replace(partial, folder)
        fsync_folder(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _item_line(row: int, item: Item) -> str:
    fields = {
        "id": row + 1,
        "asin": item.asin,
        "text": item.text,
        "title": item.title,
        "brand": item.brand,
        "categories": list(item.categories),
        "price": item.price,
    }
    return json.dumps(fields, ensure_ascii=False)


def _write_lines(path: Path, lines: Iterable[str]) -> None:
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in lines)
