"""Encoded rows are kept, and are what encoding them again would give."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rectokens.turboquant import encode_embeddings
from server.proxy.embedding_table import EmbeddingTable
from server.proxy.encoded_table import EncodedTable

WEIGHT = torch.randn(40, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
CODEC = "tq1/hd2/lsb/seed42"
ROW_BYTES = 64 * 4 // 8 + 4


@settings(max_examples=30, deadline=None)
@given(prompts=st.lists(st.lists(st.integers(0, 39), min_size=1, max_size=12), max_size=6))
@pytest.mark.parametrize("max_bytes", [0, 40 * ROW_BYTES])
def test_rows_are_those_of_the_prompt_alone(max_bytes, prompts):
    rows = EncodedTable(EmbeddingTable(WEIGHT, scale=2.0), 4, CODEC, max_bytes)
    for ids in prompts:
        packed, norms = rows.encode(ids)
        expected = encode_embeddings(WEIGHT[ids] * 2, 4)
        assert torch.equal(packed, expected[0])
        torch.testing.assert_close(norms, expected[1], rtol=1e-6, atol=0)


def test_a_row_is_encoded_once(encoded_rows):
    rows = EncodedTable(EmbeddingTable(WEIGHT), 4, CODEC, 40 * ROW_BYTES)
    for ids in ([1, 2, 2, 3], [3, 2, 1], [4, 1, 4]):
        rows.encode(ids)
    assert encoded_rows == [3, 1]


def test_a_table_over_the_limit_keeps_none(encoded_rows):
    rows = EncodedTable(EmbeddingTable(WEIGHT), 4, CODEC, 40 * ROW_BYTES - 1)
    rows.encode([1, 2, 2])
    rows.encode([1, 2, 2])
    assert encoded_rows == [3, 3]


@pytest.mark.parametrize("ids", [[], [40], [-1], [0, 41]])
def test_ids_that_are_no_rows_are_refused(ids):
    rows = EncodedTable(EmbeddingTable(WEIGHT), 4, CODEC, 1 << 20)
    with pytest.raises(ValueError, match=r"no tokens|is not one of"):
        rows.encode(ids)


def test_a_row_that_cannot_be_encoded_is_refused_every_time():
    weight = WEIGHT.clone()
    weight[5, 0] = float("nan")
    rows = EncodedTable(EmbeddingTable(weight), 4, CODEC, 1 << 20)
    for _ in range(2):
        with pytest.raises(ValueError, match="NaN"):
            rows.encode([4, 5])
    assert torch.equal(rows.encode([4])[0], encode_embeddings(weight[[4]], 4)[0])


def test_threads_share_a_table():
    rows = EncodedTable(EmbeddingTable(WEIGHT), 4, CODEC, 1 << 20)
    prompts = [[(i * j) % 40 for j in range(1, 30)] for i in range(200)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(rows.encode, prompts))
    for ids, (packed, _) in zip(prompts, found, strict=True):
        assert torch.equal(packed, encode_embeddings(WEIGHT[ids], 4)[0])


def test_rows_encoded_ahead_are_those_of_the_prompt(encoded_rows):
    rows = EncodedTable(EmbeddingTable(WEIGHT, scale=2.0), 4, CODEC, 40 * ROW_BYTES)
    rows.encode([3, 5])
    rows.encode_ahead(0, 32)
    rows.encode_ahead(32, 40)
    rows.encode_ahead(0, 40)
    assert encoded_rows == [2, 30, 8]
    ids = [39, 0, 3, 31, 32]
    packed, norms = rows.encode(ids)
    assert encoded_rows == [2, 30, 8]
    expected = encode_embeddings(WEIGHT[ids] * 2, 4)
    assert torch.equal(packed, expected[0])
    torch.testing.assert_close(norms, expected[1], rtol=1e-6, atol=0)


def test_rows_that_cannot_be_encoded_ahead_are_left_to_prompts():
    weight = WEIGHT.clone()
    weight[5, 0] = float("inf")
    rows = EncodedTable(EmbeddingTable(weight), 4, CODEC, 1 << 20)
    rows.encode_ahead(0, 40)
    assert torch.equal(rows.encode([4])[0], encode_embeddings(weight[[4]], 4)[0])
    with pytest.raises(ValueError, match="infinity"):
        rows.encode([4, 5])
