"""Strict reading and writing of the JSON files inside an artifact."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Any, NoReturn

from rectokens.artifacts.errors import ArtifactError, UnreadableError

# Far above any honest file of ours, far below what would hurt to read.
MAX_JSON_BYTES = 16 * 1024 * 1024


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write an object as readable UTF-8 JSON, flushed to the disk; equal objects give equal bytes.

    Raises:
        ArtifactError: ``value`` holds NaN, an infinity or something JSON does not have.
    """
    try:
        text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
        data = (text + "\n").encode()
    except (TypeError, ValueError) as error:
        raise ArtifactError(f"{path.name} cannot be written as JSON: {error}") from error
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def read_json(path: Path, *, finite: bool = True) -> JsonObject:
    """Read a JSON object that repeats no key.

    Args:
        path: the file.
        finite: refuse NaN and infinities, which are not JSON though other writers emit them.

    Raises:
        ArtifactError: missing, too large, not UTF-8, not JSON, or not an object.
        UnreadableError: there, but the disk does not give it.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_JSON_BYTES + 1)
    except OSError as error:
        kind = ArtifactError if isinstance(error, FileNotFoundError) else UnreadableError
        raise kind(f"{path} cannot be read: {error.strerror or error}") from error
    if len(data) > MAX_JSON_BYTES:
        raise ArtifactError(f"{path} is larger than the {MAX_JSON_BYTES} bytes allowed")
    return parse_json(data, str(path), finite=finite)


def parse_json(data: bytes, where: str, *, finite: bool = True) -> JsonObject:
    """Parse the bytes of a JSON object that repeats no key.

    Args:
        data: the bytes.
        where: what they are, for messages.
        finite: refuse NaN and infinities, which are not JSON though other writers emit them.

    Raises:
        ArtifactError: not UTF-8, not JSON, or not an object.
    """
    constant = _refuse_constant if finite else float
    try:
        value = json.loads(data.decode(), object_pairs_hook=_unique_keys, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{where} is not valid JSON: {error}") from error
    return JsonObject(value, where)


def _unique_keys(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"key {key!r} occurs twice")
        found[key] = value
    return found


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a number JSON has")


class JsonObject:
    """One JSON object, read field by field; every complaint names the file and the field.

    Take each known field with the method of its type, then call :meth:`done`, which refuses
    whatever was not taken. A bool is never taken for a number.
    """

    def __init__(self, value: object, where: str) -> None:
        if not isinstance(value, dict):
            raise ArtifactError(f"{where} holds {_kind_of(value)}; expected an object")
        self.where = where
        self._fields: dict[str, Any] = value
        self._taken: set[str] = set()

    def string(self, key: str) -> str:
        """A non-empty string."""
        value = self._take(key)
        if not isinstance(value, str) or not value:
            self._refuse(key, value, "a non-empty string")
        return value

    def optional_string(self, key: str) -> str | None:
        """A non-empty string, or null."""
        return None if self._peek(key) is None else self.string(key)

    def integer(self, key: str, minimum: int = 0, maximum: int = 2**63 - 1) -> int:
        """An integer of the given range, both ends included."""
        value = self._take(key)
        if type(value) is not int or not minimum <= value <= maximum:
            self._refuse(key, value, f"an integer from {minimum} to {maximum}")
        return value

    def optional_integer(self, key: str, minimum: int = 0, maximum: int = 2**63 - 1) -> int | None:
        """An integer of the given range, or null."""
        return None if self._peek(key) is None else self.integer(key, minimum, maximum)

    def number(self, key: str) -> float:
        """A finite number."""
        value = self._take(key)
        # A literal such as 1e999 is valid JSON and becomes an infinity.
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not isfinite(value):
            self._refuse(key, value, "a finite number")
        return float(value)

    def boolean(self, key: str) -> bool:
        """True or false."""
        value = self._take(key)
        if not isinstance(value, bool):
            self._refuse(key, value, "true or false")
        return value

    def integers(self, key: str, minimum: int = 0, maximum: int = 2**63 - 1) -> tuple[int, ...]:
        """A list of integers of the given range."""
        values = self._take(key)
        if not isinstance(values, list):
            self._refuse(key, values, "a list of integers")
        for value in values:
            if type(value) is not int or not minimum <= value <= maximum:
                self._refuse(key, value, f"integers from {minimum} to {maximum} only")
        return tuple(values)

    def strings(self, key: str) -> tuple[str, ...]:
        """A list of non-empty strings."""
        values = self._take(key)
        if not isinstance(values, list):
            self._refuse(key, values, "a list of strings")
        for value in values:
            if not isinstance(value, str) or not value:
                self._refuse(key, value, "non-empty strings only")
        return tuple(values)

    def child(self, key: str) -> JsonObject:
        """A nested object, to be read strictly in turn."""
        return JsonObject(self._take(key), f"{self.where}: {key}")

    def mapping(self, key: str) -> dict[str, Any]:
        """A nested object whose content is somebody else's business."""
        value = self._take(key)
        if not isinstance(value, dict):
            self._refuse(key, value, "an object")
        return value

    def scalars(self, key: str) -> dict[str, float | int | str]:
        """A nested object of numbers and strings."""
        values = self.mapping(key)
        for name, value in values.items():
            if isinstance(value, bool) or not isinstance(value, (int, float, str)):
                self._refuse(f"{key}.{name}", value, "a number or a string")
        require_finite(values, f"{self.where}: {key}")
        return values

    def names(self) -> tuple[str, ...]:
        """Names of all fields, for objects whose keys are data."""
        return tuple(self._fields)

    def content(self) -> dict[str, Any]:
        """All fields, unchecked, for objects that only people read."""
        return dict(self._fields)

    def done(self) -> None:
        """Refuse fields that nobody took.

        Raises:
            ArtifactError: naming the unknown fields and those that are known.
        """
        unknown = sorted(set(self._fields) - self._taken)
        if unknown:
            raise ArtifactError(
                f"{self.where} has unknown fields {', '.join(map(repr, unknown[:5]))}; "
                f"known are {', '.join(sorted(self._taken))}"
            )

    def format_version(self, name: str, understood: int) -> None:
        """Check the field ``format``, an object of ``name`` and ``version``.

        Raises:
            ArtifactError: another name, or a version that is not understood.
        """
        form = self.child("format")
        found_name, found = form.string("name"), form.integer("version")
        if found_name != name:
            raise ArtifactError(f"{self.where}: format is {found_name!r}; expected {name!r}")
        if found != understood:
            raise ArtifactError(
                f"{self.where}: format version is {found}; understood are {understood}"
            )
        form.done()

    def _peek(self, key: str) -> Any:
        self._taken.add(key)
        if key not in self._fields:
            raise ArtifactError(f"{self.where} lacks the field {key!r}")
        return self._fields[key]

    def _take(self, key: str) -> Any:
        return self._peek(key)

    def _refuse(self, key: str, value: object, expected: str) -> NoReturn:
        shown = repr(value)
        shown = shown if len(shown) <= 80 else shown[:77] + "..."
        raise ArtifactError(f"{self.where}: {key} is {shown}; expected {expected}")


def require_finite(values: Mapping[str, object], where: str) -> None:
    """Refuse NaN and infinities among ``values``, which JSON could not hold.

    Raises:
        ArtifactError: naming the first such field.
    """
    for name, value in values.items():
        if isinstance(value, float) and not isfinite(value):
            raise ArtifactError(f"{where}: {name} is {value}; it must be finite")


def null_where_not_finite(value: Any) -> Any:
    """A copy of JSON values in which NaN and infinities, at any depth, are None."""
    if isinstance(value, float) and not isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {name: null_where_not_finite(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [null_where_not_finite(one) for one in value]
    return value


def _kind_of(value: object) -> str:
    names = {list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)
