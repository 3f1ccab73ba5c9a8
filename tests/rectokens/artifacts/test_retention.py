"""What a policy lets go, and what it never does."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rectokens.artifacts.retention import RetentionPolicy, StoredVersion, plan_removal

NOW = datetime(2026, 6, 1, tzinfo=UTC)


def stored(kind, name, age_h, state="available", parts=None, tokenizer=None) -> StoredVersion:
    created = None if age_h is None else (NOW - timedelta(hours=age_h)).isoformat()
    return StoredVersion(
        kind=kind,
        version=name,
        state=state,
        created=created,
        num_bytes=1,
        parts=parts or {},
        tokenizer=tokenizer,
        numbers={},
    )


@settings(deadline=None)
@given(data=st.data())
def test_nothing_that_is_needed_goes(data):
    number = st.integers(0, 4).map(str)
    models = [stored("model", n, 1000, tokenizer=f"t{n}") for n in map(str, range(5))]
    catalogs = [stored("catalog", n, 1000, tokenizer=f"t{n}") for n in map(str, range(5))]
    tokenizers = [stored("tokenizer", f"k{n}", 1000, tokenizer=f"t{n}") for n in range(6)]
    releases = [
        stored(
            "release",
            f"r{n}",
            data.draw(st.integers(1, 500)),
            state={0: "active", 1: "previous"}.get(n, "available"),
            parts={"model": data.draw(number), "catalog": data.draw(number)},
        )
        for n in range(6)
    ]
    policy = RetentionPolicy(
        keep_last=data.draw(st.integers(0, 3)),
        keep_younger_than_s=data.draw(st.integers(0, 500)) * 3600.0,
    )
    everything = [*models, *catalogs, *tokenizers, *releases]
    gone = plan_removal(everything, {}, policy, NOW)
    names = {(one.kind, one.version) for one in gone}
    left = [one for one in everything if (one.kind, one.version) not in names]
    assert {("release", "r0"), ("release", "r1")}.isdisjoint(names)
    for release in (one for one in left if one.kind == "release"):
        for kind, version in release.parts.items():
            assert (kind, version) not in names
    spoken = {one.tokenizer for one in left if one.kind in ("model", "catalog")}
    assert spoken <= {one.tokenizer for one in left if one.kind == "tokenizer"}
    for kind in ("release", "model", "catalog", "tokenizer"):
        total = sum(one.kind == kind for one in everything)
        assert sum(one.kind == kind for one in left) >= min(policy.keep_last, total)
    for one in gone:
        age = NOW - datetime.fromisoformat(one.created)
        assert age.total_seconds() >= policy.keep_younger_than_s
    order = [one.kind for one in gone]
    ranks = [{"release": 0, "model": 1, "catalog": 1, "tokenizer": 2}[kind] for kind in order]
    assert ranks == sorted(ranks)


def test_what_goes():
    versions = [
        stored("release", "a", 900, "active", {"catalog": "ca", "model": "m"}),
        stored("release", "b", 50, parts={"catalog": "cb", "model": "m"}),
        stored("release", "c", 400, parts={"catalog": "cc", "model": "m"}),
        stored("release", "d", None, "damaged"),
        stored("model", "m", 900),
        *(stored("catalog", name, 900) for name in ("ca", "cb", "cc", "loose")),
    ]
    policy = RetentionPolicy(keep_last=0, keep_younger_than_s=100 * 3600)
    gone = [one.version for one in plan_removal(versions, {}, policy, NOW)]
    assert gone == ["c", "cc", "loose"]
    # Active an hour ago: as good as new.
    lately = {"c": NOW - timedelta(hours=1)}
    assert [one.version for one in plan_removal(versions, lately, policy, NOW)] == ["loose"]


@pytest.mark.parametrize(
    "wrong",
    [{"keep_last": -1}, {"keep_younger_than_s": -1.0}, {"keep_younger_than_s": float("nan")}],
)
def test_policies_that_mean_nothing(wrong):
    with pytest.raises(ValueError, match="must be at least 0"):
        RetentionPolicy(**wrong)
