"""Constraint sets by a condition on metadata: ``in_stock = true and region = 'EU'``.

A condition is the WHERE-like part of SQL and nothing more. It is taken apart here into tokens of a
short list of kinds; only then is it put together again, every column quoted, and given to polars
to parse and evaluate. So no word of the caller's is ever read as a statement, a subquery or a
function that is not on the list (polars' SQL has some that read files).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Literal

import polars as pl
import torch
from torch import Tensor

# Above any condition a person writes; far below what a parser's recursion could not take.
MAX_PREDICATE_LENGTH = 4_000
# The time polars takes to plan a chain of conditions grows with the third power of its length.
MAX_PREDICATE_OPERATORS = 200
MAX_PREDICATE_DEPTH = 20

_Kind = Literal["column", "string", "number", "word", "function", "symbol"]
_WORDS = frozenset(
    "and or not in is null like ilike between true false date timestamp".split()  # noqa: SIM905
)
FUNCTIONS = ("abs", "array_contains", "coalesce", "ends_with", "length", "lower", "starts_with",
             "upper")  # fmt: skip
_TOKEN = re.compile(
    r"""(?P<space>[ \t\r\n]+)
    |(?P<string>'(?:[^']|'')*')
    |(?P<quoted>"(?:[^"]|"")+")
    |(?P<number>(?:\d+(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d+)?(?![\w.]))
    |(?P<name>[^\W\d]\w*)
    |(?P<symbol><>|!=|<=|>=|[=<>(),+*/%-])""",
    re.VERBOSE,
)


class PredicateError(ValueError):
    """A predicate that cannot be used; the message quotes it and says what is allowed."""


@dataclass(frozen=True, slots=True)
class Predicate:
    """A condition that decides which items a constraint set holds.

    Attributes:
        text: as it was written. Comparisons (= <> != < <= > >=), ``[not] in (...)``,
            ``[not] between``, ``[not] like`` and ``ilike``, ``is [not] null``, ``and or not``,
            arithmetic, brackets, numbers, 'strings', true, false, ``date '2026-01-31'``,
            ``timestamp '2026-01-31 12:00:00'``, and the functions of ``FUNCTIONS``. A column is
            written as it is called; in double quotes if the name is no plain word. An item for
            which the condition is null is not in the set.

    Raises:
        PredicateError: ``text`` is empty, longer than ``MAX_PREDICATE_LENGTH``, nested deeper
            than ``MAX_PREDICATE_DEPTH``, has more than ``MAX_PREDICATE_OPERATORS`` of and, or, not
            and arithmetic, or holds something that is not listed above.
    """

    text: str

    def __post_init__(self) -> None:
        _tokens(self.text)

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns it names, each once, in order."""
        return tuple(dict.fromkeys(value for kind, value in _tokens(self.text) if kind == "column"))


def evaluate_predicate(predicate: Predicate, table: pl.DataFrame) -> Tensor:
    """Rows of a table for which a predicate holds.

    Args:
        predicate: what to evaluate.
        table: N rows.

    Returns:
        int64 (X,), row indices, sorted.

    Raises:
        PredicateError: an unknown column, types that cannot be compared, a result that is not
            true or false, or something that is no condition.
    """
    quoted = repr(predicate.text)
    columns = predicate.columns
    unknown = [name for name in columns if name not in table.columns]
    if unknown:
        raise PredicateError(
            f"predicate {quoted} names unknown columns {', '.join(map(repr, unknown))}; there are "
            f"{', '.join(map(repr, table.columns)) or 'none'} (strings take single quotes)"
        )
    if not columns:
        raise PredicateError(f"predicate {quoted} names no column; it must depend on the item")
    try:
        expression = pl.sql_expr(" ".join(_emit(_tokens(predicate.text))))
        result = table.select(expression.alias("holds"))["holds"]
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "not a condition"
        raise PredicateError(f"predicate {quoted} cannot be evaluated: {reason}") from error
    if result.dtype != pl.Boolean:
        raise PredicateError(
            f"predicate {quoted} gives values of type {result.dtype}; it must be true or false"
        )
    if len(result) != table.height:
        raise PredicateError(f"predicate {quoted} does not give one answer an item")
    return torch.from_numpy(result.fill_null(value=False).arg_true().to_numpy().astype("int64"))


def _tokens(text: str) -> list[tuple[_Kind, str]]:
    """The kinds and values of all tokens, checked as far as one token's surroundings tell."""
    if not text.strip() or len(text) > MAX_PREDICATE_LENGTH:
        raise PredicateError(
            f"predicate has {len(text)} characters; allowed are 1 to {MAX_PREDICATE_LENGTH}, "
            "not all of them blank"
        )
    found = list(_lex(text))
    _check_functions(found, text)
    _check_is_null(found, text)
    _check_depth(found, text)
    operators = sum(
        value.lower() in ("and", "or", "not", "+", "-", "*", "/", "%")
        for kind, value in found
        if kind in ("word", "symbol")
    )
    if operators > MAX_PREDICATE_OPERATORS:
        raise PredicateError(
            f"predicate {text[:80]!r}... has {operators} operators (and, or, not, arithmetic); at "
            f"most {MAX_PREDICATE_OPERATORS} are allowed; use 'in (...)' for many values"
        )
    return found


def _lex(text: str) -> Iterator[tuple[_Kind, str]]:
    place = 0
    while place < len(text):
        match = _TOKEN.match(text, place)
        if match is None or text.startswith("--", place) or text.startswith("/*", place):
            raise PredicateError(
                f"predicate {text!r} has {text[place : place + 10]!r} at position {place}; allowed "
                "are columns, 'strings', numbers, comparisons, arithmetic, brackets and the words "
                f"{', '.join(sorted(_WORDS))}"
            )
        place = match.end()
        kind, value = match.lastgroup, match.group()
        if kind == "string":
            yield "string", value[1:-1].replace("''", "'")
        elif kind == "quoted":
            yield "column", value[1:-1].replace('""', '"')
        elif kind == "number":
            if not isfinite(float(value)):
                raise PredicateError(f"predicate {text!r} has the number {value}; not finite")
            yield "number", value
        elif kind == "symbol":
            yield "symbol", value
        elif kind == "name":
            yield _kind_of_name(value, text, place), value


def _kind_of_name(name: str, text: str, end: int) -> _Kind:
    if name.lower() in _WORDS:
        return "word"
    return "function" if text[end:].lstrip().startswith("(") else "column"


def _check_functions(tokens: Sequence[tuple[_Kind, str]], text: str) -> None:
    for kind, name in tokens:
        if kind == "function" and name.lower() not in FUNCTIONS:
            raise PredicateError(
                f"predicate {text!r} calls {name!r}; allowed functions are {', '.join(FUNCTIONS)}"
            )


def _check_is_null(tokens: Sequence[tuple[_Kind, str]], text: str) -> None:
    # `is true` and `is not true` mean something else in polars than in SQL where null is met.
    words = [value.lower() if kind == "word" else "" for kind, value in tokens] + ["", ""]
    for place, word in enumerate(words):
        if word == "is":
            after = words[place + 1 : place + 3]
            if after[0] != "null" and after != ["not", "null"]:
                raise PredicateError(
                    f"predicate {text!r} has 'is' without null; allowed are 'is null' and "
                    "'is not null'; write '= true' for a comparison"
                )


def _check_depth(tokens: Sequence[tuple[_Kind, str]], text: str) -> None:
    """Brackets balance; neither they nor runs of ``not`` and signs nest too deep."""
    depth = run = 0
    for kind, value in tokens:
        depth += {"(": 1, ")": -1}.get(value, 0) if kind == "symbol" else 0
        prefix = value.lower() in ("not", "-", "+") and kind in ("word", "symbol")
        run = run + 1 if prefix else 0
        if depth < 0 or max(depth, run) > MAX_PREDICATE_DEPTH:
            raise PredicateError(
                f"predicate {text!r} has a bracket too many or nests deeper than "
                f"{MAX_PREDICATE_DEPTH}"
            )
    if depth:
        raise PredicateError(f"predicate {text!r} leaves {depth} brackets open")


def _emit(tokens: Sequence[tuple[_Kind, str]]) -> Iterator[str]:
    """SQL in which nothing but a keyword of the list can be read as one."""
    for kind, value in tokens:
        if kind == "column":
            yield '"' + value.replace('"', '""') + '"'
        elif kind == "string":
            yield "'" + value.replace("'", "''") + "'"
        elif kind in ("word", "function"):
            yield value.lower()
        else:
            yield value
