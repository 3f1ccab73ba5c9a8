"""Random catalogs, and the obvious way to order one."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import pytest
from hypothesis import strategies as st


@st.composite
def catalogs(draw):
    """Item ids, codes (many equal), codebook size, and a prior or None."""
    codebook_size = draw(st.integers(1, 5))
    num_levels = draw(st.integers(1, 4))
    ids = draw(st.lists(st.text(min_size=1, max_size=5), min_size=1, max_size=40, unique=True))
    code = st.integers(0, codebook_size - 1)
    codes = draw(
        st.lists(
            st.lists(code, min_size=num_levels, max_size=num_levels),
            min_size=len(ids),
            max_size=len(ids),
        )
    )
    prior = draw(
        st.none()
        | st.lists(
            st.integers(0, 3).map(float),  # few values, so that many are equal
            min_size=len(ids),
            max_size=len(ids),
        )
    )
    return ids, codes, codebook_size, prior


def _obvious_order(ids, codes, prior):
    """Rows by (semantic ID, prior descending, hash of the id), one Python sort."""

    def key(row: int):
        digest = hashlib.blake2b(ids[row].encode(), digest_size=16, person=b"rectokens-rank")
        return (tuple(codes[row]), -prior[row] if prior else 0.0, digest.digest())

    return sorted(range(len(ids)), key=key)


@pytest.fixture(scope="session")
def catalog_inputs():
    """Strategy of (item ids, codes, codebook_size, prior)."""
    return catalogs()


@pytest.fixture(scope="session")
def obvious_order() -> Callable[..., list[int]]:
    """``obvious_order(ids, codes, prior)``: input row of each item."""
    return _obvious_order
