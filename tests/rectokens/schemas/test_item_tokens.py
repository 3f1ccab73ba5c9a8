"""The map between codes and token ids, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest

from rectokens.schemas.item_tokens import ItemTokens
from rectokens.schemas.search import SearchRequest

TOKENS = ItemTokens(offset=100, level_stride=10, num_levels=3, codebook_size=8, start_token_id=1)


def test_round_trip_of_every_code() -> None:
    for level in range(3):
        ids = range(*TOKENS.level_slice(level).indices(10_000))
        assert [TOKENS.token_id(level, code) for code in range(8)] == list(ids)
    assert TOKENS.decode(TOKENS.encode((7, 0, 3))) == (7, 0, 3)
    assert TOKENS.decode(TOKENS.encode((7, 0, 3))[:2]) == (7, 0)
    assert TOKENS.end == 128


def test_rows_are_encoded_as_each_alone() -> None:
    rows = np.array([(7, 0, 3), (0, 0, 0), (1, 7, 7)], dtype=np.int16)
    assert TOKENS.encode_rows(rows).tolist() == [TOKENS.encode(row) for row in rows.tolist()]
    assert TOKENS.encode_rows(rows[:0]).shape == (0, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: TOKENS.token_id(3, 0), "level is 3; allowed are 0 to 2"),
        (lambda: TOKENS.token_id(0, 8), "code is 8; allowed are 0 to 7"),
        (lambda: TOKENS.encode((1, 2)), "2 codes; expected 3"),
        (lambda: TOKENS.encode_rows(np.zeros((4, 2), int)), r"shape \(4, 2\); expected \(n, 3\)"),
        (lambda: TOKENS.encode_rows(np.array([[0, 8, 0]])), "code is 8; allowed are 0 to 7"),
        (lambda: TOKENS.encode_rows(np.array([[0, 9, -1]])), "code is -1; allowed are 0 to 7"),
        (lambda: TOKENS.decode([109]), "token id 109 is no code of level 0"),
        (lambda: TOKENS.decode([100, 110, 120, 130]), "130 is no code of level 3"),
        (lambda: ItemTokens(0, 7, 3, 8, 1), "level_stride is 7"),
        (lambda: ItemTokens(-1, 8, 3, 8, 1), "offset is -1"),
        (lambda: ItemTokens(0, 8, 0, 8, 1), "num_levels is 0"),
        (lambda: SearchRequest((), 1, 1), "prompt is empty"),
        (lambda: SearchRequest((1,), 0, 1), "beam_width is 0"),
        (lambda: SearchRequest((1,), 2, 3), "top_k is 3; allowed are 1 to beam_width 2"),
        (lambda: SearchRequest((1,), 2, 0), "top_k is 0"),
        (lambda: SearchRequest((1,), 1, 1, temperature=float("nan")), "temperature is nan"),
        (lambda: SearchRequest((1,), 1, 1, temperature=-1.0), "temperature is -1"),
        (lambda: SearchRequest((1,), 1, 1, normalization="softmax"), "allowed are vocab, level"),
    ],
)
def test_bad_values_are_named(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]
