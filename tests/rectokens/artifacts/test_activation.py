"""Records of activations: a rollback undoes one step after the other."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rectokens.artifacts.activation import (
    MAX_EARLIER,
    from_line,
    from_lines,
    next_activation,
    next_rollback,
    to_line,
)
from rectokens.artifacts.errors import ArtifactError

VERSIONS = [f"{n:016x}" for n in range(6)]


@given(st.lists(st.sampled_from(VERSIONS) | st.none(), max_size=30))
def test_against_a_stack(steps):
    """``None`` rolls back; a release that comes again leaves its older place."""
    record, stack = None, []
    for number, version in enumerate(steps, start=1):
        if version is None:
            if record is None:
                return
            if len(stack) == 1:
                with pytest.raises(ArtifactError, match="nothing to roll back to"):
                    next_rollback(record, None)
                return
            stack.pop()
            record = next_rollback(record, None)
        else:
            if stack and stack[-1] == version:
                return
            stack = [one for one in stack if one != version] + [version]
            record = next_activation(record, version, "note")
        assert record.sequence == number
        assert [record.release, *record.earlier] == stack[::-1]
        assert record.previous == (stack[-2] if len(stack) > 1 else None)
        assert from_line(to_line(record), "here") == record


def test_the_list_of_earlier_releases_is_bounded():
    record = None
    for number in range(100):
        record = next_activation(record, f"{number:016x}", None)
    assert len(record.earlier) == MAX_EARLIER
    assert record.previous == f"{98:016x}"


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("release", "../../etc", "expected 16 lower-case hexadecimal digits"),
        ("earlier", ["x"], "expected 16 lower-case"),
        ("sequence", 0, "expected an integer from 1"),
        ("action", "delete", "allowed are 'activate' and 'rollback'"),
        ("format", {"name": "rectokens-activation", "version": 2}, "understood are 1"),
        ("surprise", 1, "unknown fields 'surprise'"),
    ],
)
def test_refused_with_the_field(field, value, message):
    content = json.loads(to_line(next_activation(None, VERSIONS[0], None)))
    content[field] = value
    with pytest.raises(ArtifactError, match=message):
        from_line(json.dumps(content).encode(), "active.json")


def test_notes_are_bounded_and_torn_lines_passed_over():
    with pytest.raises(ArtifactError, match="note has 1001 characters; allowed are 1 to 1000"):
        next_activation(None, VERSIONS[0], "x" * 1001)
    first = next_activation(None, VERSIONS[0], "line\nbreak \x85 \u2028")
    second = next_activation(first, VERSIONS[1], None)
    data = to_line(first) + to_line(second)
    assert from_lines(data, "h") == [first, second]
    for cut in range(len(to_line(second))):
        kept = from_lines(data[: len(to_line(first)) + cut], "h")
        assert kept in ([first], [first, second])
        assert len(kept) == 1 or cut == len(to_line(second)) - 1
