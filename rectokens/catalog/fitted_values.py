"""Values for a metadata column that is there, in its type and none of them changed by that."""

from __future__ import annotations

import polars as pl


def fitted(column: pl.Series, dtype: pl.DataType) -> pl.Series:
    """A column in the type of the catalog's.

    polars casts between most types, some of them with a loss: 1.5 becomes 1, a number a day since
    1970, a struct its text. Here a value becomes only what says the same.

    Args:
        column: values as they were given.
        dtype: of the catalog's column. Null, of a column that has no value yet, takes any type.

    Returns:
        The column in that type.

    Raises:
        ValueError: a value has no such form; names the column and both types.
    """
    found = column.dtype
    if found == dtype or dtype == pl.Null:
        return column
    reason = "no value of one is a value of the other"
    if found == pl.Null or _can_say_the_same(found, dtype):
        try:
            cast = column.cast(dtype, strict=True)
            if not _is_exact(found, dtype) or cast.cast(found).eq_missing(column).all():
                return cast
            reason = "it would change them"
        except pl.exceptions.PolarsError as error:
            reason = str(error).splitlines()[0]
    raise ValueError(
        f"metadata column {column.name!r} has type {found!s:.100} and values that are not "
        f"{dtype!s:.100}, the catalog's type: {reason:.200}"
    )


def _kind(dtype: pl.DataType) -> str:
    if dtype.is_numeric() or dtype == pl.Boolean:
        return "number"
    if dtype.is_temporal():
        return "time"
    if isinstance(dtype, pl.Struct):
        return "struct"
    if isinstance(dtype, (pl.List, pl.Array)):
        return "list"
    return "text"


def _can_say_the_same(found: pl.DataType, dtype: pl.DataType) -> bool:
    kinds = _kind(found), _kind(dtype)
    return kinds[0] == kinds[1] or kinds in {
        ("number", "text"), ("time", "text"), ("text", "number")
    }  # fmt: skip


def _is_exact(found: pl.DataType, dtype: pl.DataType) -> bool:
    """Whether what a value is cast to must give it back: not so where that has fewer digits."""
    return _kind(found) == _kind(dtype) in ("number", "time") and not dtype.is_float()
