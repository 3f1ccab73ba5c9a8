"""Checks on the parameters of a prompt recipe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def reject_unknown(owner: str, params: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    """Refuse parameters that ``owner`` does not have.

    Raises:
        ValueError: names the unknown parameters and the known ones.
    """
    unknown = sorted(set(params) - set(known))
    if unknown:
        raise ValueError(
            f"prompt builder {owner} has no parameter {', '.join(map(repr, unknown))}; "
            f"known are {', '.join(sorted(known))}"
        )


def integer(params: Mapping[str, Any], name: str, low: int, high: int) -> int:
    """The integer parameter ``name``.

    Raises:
        ValueError: not an integer, or outside [low, high].
    """
    value = params[name]
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} is {value!r}; it must be an integer")
    if not low <= value <= high:
        raise ValueError(f"{name} is {value}; allowed are {low} to {high}")
    return value


def optional_integer(params: Mapping[str, Any], name: str, low: int, high: int) -> int | None:
    """As :func:`integer`, or None where the parameter is None."""
    return None if params[name] is None else integer(params, name, low, high)


def boolean(params: Mapping[str, Any], name: str) -> bool:
    """The boolean parameter ``name``.

    Raises:
        ValueError: not a boolean.
    """
    value = params[name]
    if not isinstance(value, bool):
        raise ValueError(f"{name} is {value!r}; it must be true or false")
    return value


def token_ids(params: Mapping[str, Any], name: str) -> list[int]:
    """The parameter ``name``, a list of token ids.

    Raises:
        ValueError: not a list of integers from 0 to 2**31 - 1.
    """
    value = params[name]
    if not isinstance(value, list) or not all(
        isinstance(token, int) and not isinstance(token, bool) and 0 <= token < 2**31
        for token in value
    ):
        raise ValueError(f"{name} is {value!r}; it must be a list of token ids")
    return list(value)
