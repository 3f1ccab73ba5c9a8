"""Fetch a data set and lay it out."""

from __future__ import annotations

import logging
from pathlib import Path

from filelock import FileLock

from examples.data.fetch import fetch
from examples.data.layout import FILES, Item, write_folder
from examples.data.raw_reviews import read_products, read_reviews
from examples.data.text_vectors import embed_texts
from server.demo.data import DataFolderError

DEFAULT_BASE_URL = "https://snap.stanford.edu/data/amazon/productGraph/categoryFiles"
_NAMES = {"beauty": "Beauty", "sports": "Sports_and_Outdoors", "toys": "Toys_and_Games"}
_log = logging.getLogger(__name__)


def download_folder(folder: Path, split: str, *, base_url: str, text_model: str) -> None:
    """Make ``folder`` from the published files; it appears whole or not at all.

    The files are kept beside it, in ``{folder}.raw``: what came is not fetched again. Programs
    that want the same folder wait for the one that makes it.

    Args:
        folder: to make; must not hold any of the data set's files.
        split: ``beauty``, ``sports`` or ``toys``.
        base_url: where the files lie.
        text_model: see :func:`~examples.data.text_vectors.embed_texts`.

    Raises:
        DataFolderError: a file that cannot be fetched or is damaged, or no such text model.
    """
    raw = folder.with_name(f"{folder.name}.raw")
    raw.mkdir(parents=True, exist_ok=True)
    with FileLock(raw / ".lock"):
        if all((folder / name).is_file() for name in FILES):
            return
        base = base_url.rstrip("/")
        reviews, products = f"reviews_{_NAMES[split]}_5.json.gz", f"meta_{_NAMES[split]}.json.gz"
        _log.info("fetching %s from %s", split, base)
        try:
            paths = [fetch(f"{base}/{name}", raw / name) for name in (reviews, products)]
        except DataFolderError as error:
            raise DataFolderError(
                f"{error}. Without a network put {', '.join(FILES)} into {folder}"
            ) from error
        try:
            asins, histories = read_reviews(paths[0])
            known = read_products(paths[1], asins)
        except DataFolderError:
            # Whole by the server's word, but unreadable: the next run fetches it anew.
            for path in paths:
                path.unlink(missing_ok=True)
            raise
        items = [known.get(asin, Item(asin)) for asin in asins]
        vectors = embed_texts([item.text for item in items], text_model)
        write_folder(folder, items, vectors, histories)
