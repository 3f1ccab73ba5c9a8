"""The 5-core review files of 2014 as they are published: reviews, and what is known of products."""

from __future__ import annotations

import ast
import gzip
import html
import json
import re
import zlib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from examples.data.layout import Item
from server.demo.data import DataFolderError

_ASIN = re.compile(r"""['"]asin['"]:\s*['"]([^'"]+)['"]""")
# Neighbouring numbers must not tell what came first or which ASINs are near.
_NUMBERING_SEED = 20140723


def read_reviews(path: Path) -> tuple[list[str], list[list[int]]]:
    """Items and users' histories of a file of reviews, one JSON object a line.

    A history is in order of time; reviews carry a day, and within a day the file's order counts.
    Of an item that a user reviewed twice the first review counts. Items are numbered at random.

    Returns:
        ASINs, and for each user rows of them, oldest first; users in order of their id.

    Raises:
        DataFolderError: a file that is damaged, cut short, or holds something else.
    """
    visits: dict[str, dict[str, tuple[int, int]]] = {}
    for number, line in _lines(path):
        try:
            review = json.loads(line)
            user, asin = str(review["reviewerID"]), str(review["asin"])
            moment = (int(review["unixReviewTime"]), number)
        except (ValueError, KeyError, TypeError) as error:
            raise DataFolderError(
                f"{path} line {number} is no review with reviewerID, asin and unixReviewTime: "
                f"{error!r}"
            ) from error
        met = visits.setdefault(user, {})
        met[asin] = min(moment, met.get(asin, moment))
    if not visits:
        raise DataFolderError(f"{path} has no reviews")
    ordered = sorted({asin for met in visits.values() for asin in met})
    shuffled = np.random.default_rng(_NUMBERING_SEED).permutation(len(ordered)).tolist()
    asins = [ordered[place] for place in shuffled]
    row_of = {asin: row for row, asin in enumerate(asins)}
    histories = [
        [row_of[asin] for asin in sorted(met, key=met.__getitem__)]
        for _, met in sorted(visits.items())
    ]
    return asins, histories


def read_products(path: Path, asins: Collection[str]) -> dict[str, Item]:
    """What a file of products says of the given ones; one Python literal or JSON object a line.

    Raises:
        DataFolderError: a file that is damaged, cut short, or holds something else.
    """
    wanted = set(asins)
    items: dict[str, Item] = {}
    for number, line in _lines(path):
        match = _ASIN.search(line)
        if match is None or match[1] not in wanted:
            continue
        try:
            fields = json.loads(line) if line.startswith('{"') else ast.literal_eval(line)
            items[match[1]] = _item(match[1], fields)
        except (ValueError, SyntaxError, TypeError, AttributeError, MemoryError) as error:
            raise DataFolderError(f"{path} line {number} is no product: {error!r}") from error
    return items


def _item(asin: str, fields: dict[str, Any]) -> Item:
    paths = fields.get("categories") or [[]]
    price = fields.get("price")
    return Item(
        asin=asin,
        title=_plain(fields.get("title")),
        brand=_plain(fields.get("brand")),
        categories=tuple(_plain(name) for name in paths[0]),
        price=None if price is None else float(price),
    )


def _plain(text: Any) -> str:
    """One line without HTML entities; empty for nothing."""
    return " ".join(html.unescape(str(text)).split()) if text else ""


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            yield from enumerate(file, start=1)
    except (EOFError, gzip.BadGzipFile, zlib.error, UnicodeDecodeError) as error:
        raise DataFolderError(f"{path} is damaged or cut short: {error}") from error
