"""How answers of engines are compared."""

import pytest

from rectokens.schemas.search import SearchResult
from server.engine.types import EngineFault


def assert_same(found: SearchResult | EngineFault, expected: SearchResult, atol: float) -> None:
    assert isinstance(found, SearchResult)
    assert [hit.item_index for hit in found.hits] == [hit.item_index for hit in expected.hits]
    assert found.shortfall == expected.shortfall
    for mine, theirs in zip(found.hits, expected.hits, strict=True):
        assert mine.semantic_id == theirs.semantic_id
        assert mine.score == pytest.approx(theirs.score, abs=atol)
        assert mine.level_scores == pytest.approx(theirs.level_scores, abs=atol)
