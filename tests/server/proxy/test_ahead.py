"""Rows are encoded before prompts ask for them, and nothing goes on after the end."""

from __future__ import annotations

import threading

import pytest
import torch

from rectokens.turboquant import encode_embeddings
from server.proxy import ahead
from server.proxy.ahead import AheadEncoder
from server.proxy.embedding_table import EmbeddingTable
from server.proxy.encoded_table import EncodedTable
from server.proxy.encoder import EmbedsEncoder
from tests.waiting import wait_until

WEIGHT = torch.randn(100, 64, generator=torch.Generator().manual_seed(0)).bfloat16()


def table(weight=WEIGHT):
    return EncodedTable(EmbeddingTable(weight), 4, "tq1/hd2/lsb/seed42", 1 << 20)


def threads():
    return [t for t in threading.enumerate() if t.name == "encode-ahead"]


@pytest.fixture
def encoder():
    """Makes encoders that end with the test."""
    made = []

    def make(busy=lambda: False):
        made.append(AheadEncoder(busy))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.mark.parametrize("busy", [False, True])
def test_every_row_is_encoded_in_groups(encoder, encoded_rows, busy):
    rows = table()
    encoder(lambda: busy).begin(rows)
    wait_until(lambda: not threads())
    assert encoded_rows == [32, 32, 32, 4]
    packed, _ = rows.encode(range(100))
    assert len(encoded_rows) == 4
    assert torch.equal(packed, encode_embeddings(WEIGHT, 4)[0])


def test_a_group_that_fails_does_not_end_the_others(encoder, encoded_rows, monkeypatch):
    encode_ahead, failures = EncodedTable.encode_ahead, [RuntimeError("not enough memory")]

    def unsteady(self, first, end):
        if first == 32 and failures:
            raise failures.pop()
        encode_ahead(self, first, end)

    monkeypatch.setattr(EncodedTable, "encode_ahead", unsteady)
    rows = table()
    encoder().begin(rows)
    wait_until(lambda: not threads())
    assert encoded_rows == [32, 32, 4]
    packed, _ = rows.encode(range(100))
    assert encoded_rows[3:] == [32]
    assert torch.equal(packed, encode_embeddings(WEIGHT, 4)[0])


def test_a_new_table_takes_the_place_of_the_old(encoder, encoded_rows, monkeypatch):
    monkeypatch.setattr(ahead, "_BUSY_PAUSE_S", 600)
    one = encoder(lambda: True)
    one.begin(table())
    wait_until(lambda: encoded_rows)
    (first,) = threads()
    one.begin(table(WEIGHT[:20]))
    wait_until(lambda: encoded_rows == [32, 20])
    assert not first.is_alive()


def test_closing_ends_the_work_for_good(encoder, encoded_rows, monkeypatch):
    monkeypatch.setattr(ahead, "_BUSY_PAUSE_S", 600)
    one = encoder(lambda: True)
    one.begin(table())
    wait_until(lambda: encoded_rows)
    one.close()
    assert not threads()
    one.begin(table())
    assert not threads()


def test_a_table_that_keeps_no_rows_needs_no_thread(encoder):
    encoder().begin(EncodedTable(EmbeddingTable(WEIGHT), 4, "tq1/hd2/lsb/seed42", 0))
    assert not threads()


@pytest.mark.parametrize("compression", ["none", "turboquant"])
def test_warming_up_gets_over_rows_that_cannot_be_encoded(compression):
    weight = WEIGHT.clone()
    weight[5, 0] = float("nan")
    made = EmbedsEncoder(EmbeddingTable(weight), compression, 4, 1 << 20)
    made.warm_up()
    assert made.encode([4]).tokens == 1


async def test_a_running_proxy_encodes_ahead(start_proxy, encoded_rows, parts):
    running = await start_proxy()
    wait_until(lambda: not threads())
    assert sum(encoded_rows) == parts[0].vocab_size
    response = await running.client.post("/v1/completions", json={"prompt": [1, 2, 3]})
    assert response.status_code == 200
    assert sum(encoded_rows) == parts[0].vocab_size


async def test_a_running_proxy_may_leave_rows_to_prompts(start_proxy, encoded_rows):
    running = await start_proxy(encode_ahead=False)
    assert not threads()
    assert not encoded_rows
    await running.client.post("/v1/completions", json={"prompt": [1, 2, 3]})
    assert encoded_rows == [3]
