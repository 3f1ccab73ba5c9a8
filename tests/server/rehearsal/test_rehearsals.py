"""A service tries what a job wants to activate, through the board they share."""

from __future__ import annotations

import asyncio
import weakref
from typing import Any

import pytest

from server.rehearsal.activation import ActivationRefusedError, ActivationSteps
from server.rehearsal.types import GateOptions
from tests.waiting import LIMIT_S, until

FAST = {"store__poll_s": "0.02", "jobs__start_worker": False, "engine__kv_memory_mib": "4"}


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.rehearsal.rehearsals._LOOK_S", 0.02)
    monkeypatch.setattr("server.rehearsal.rehearsals._BEAT_S", 0.05)
    monkeypatch.setattr("server.rehearsal.activation._LOOK_S", 0.02)


class Place:
    """A service on a store, and a job's way to it."""

    def __init__(self, running: Any, small_store: Any) -> None:
        self.running = running
        self.service = running.service
        self.link = running.app.state.link
        self.board = self.link._board
        self.small_store = small_store
        self._count = 0

    async def rehearse(self, number: int, **options: Any) -> Any:
        """What comes of a job's request to try a release."""
        self._count += 1
        steps = ActivationSteps(self.board)
        given = GateOptions(**options) if options else None
        release = self.small_store.releases[number]
        async with asyncio.timeout(LIMIT_S):
            return await asyncio.to_thread(steps.rehearse, str(self._count), release, given)

    async def alive(self) -> None:
        await until(lambda: asyncio.to_thread(self.board.servers))

    async def served(self, number: int) -> None:
        wanted = self.small_store.releases[number]
        await until(lambda: self.service.release and self.service.release.version == wanted)


@pytest.fixture
async def start(start_app: Any, small_store: Any) -> Any:
    async def begin(**flags: Any) -> Place:
        running = await start_app(store__path=str(small_store.root), **FAST, **flags)
        place = Place(running, small_store)
        await place.alive()
        return place

    return begin


async def test_nobody_waits_for_the_next_look_or_the_next_sign_of_life(
    start_app, small_store, monkeypatch
):
    """What is held ready is served as soon as the pointer moves, and a job is told at once."""
    hour = "3600"
    monkeypatch.setattr("server.rehearsal.rehearsals._BEAT_S", 3_600.0)
    running = await start_app(store__path=str(small_store.root), **{**FAST, "store__poll_s": hour})
    place = Place(running, small_store)
    small_store.add(2)
    await place.alive()
    assert (await place.rehearse(2)).state == "passed"
    small_store.activate(2)
    await place.served(2)
    steps = ActivationSteps(place.board)
    told = await asyncio.to_thread(steps.wait_until_served, small_store.releases[2], LIMIT_S)
    assert [one["state"] for one in told] == ["serving"]


async def test_what_passed_is_held_ready_and_not_loaded_again(start, small_store):
    place = await start(gate__sample_requests=8)
    await place.running.post({"history": ["1-3"], "top_k": 5})
    small_store.add(2)
    source = place.link._source
    loads, load = [], source.load
    source.load = lambda version, beside: (loads.append(version), load(version, beside))[1]

    report = await place.rehearse(2)
    assert report.state == "passed"
    # Kept of the request above: the item ids of its history, which the new catalog has none of.
    assert (report.replay.requests, report.replay.failed) == (1, 1)
    assert place.service.release.version == small_store.releases[1]
    assert place.link.follower.ready_release == small_store.releases[2]
    small_store.activate(2)
    await place.served(2)
    assert loads == [small_store.releases[2]]
    answered = await place.running.metric("rectokens_items_returned_total")
    assert answered == 5  # a replay is no answer to anybody


async def test_the_gate_blocks_and_what_was_loaded_is_let_go(start, small_store):
    place = await start(gate__min_overlap=0.5)
    small_store.add(2)
    requests = [{"history": [], "top_k": 5}]
    with pytest.raises(ActivationRefusedError, match=r"mean overlap is 0; allowed .* 0\.5") as no:
        await place.rehearse(2, requests=requests)
    assert no.value.blocked
    assert no.value.report.replay.compared == 1
    await until(lambda: place.service.retired.gone)
    assert place.service.release.version == small_store.releases[1]
    line = 'rectokens_activations_refused_total{state="blocked"}'
    assert await place.running.metric(line) == 1
    # The body goes before the settings, and nothing is replayed if it says so.
    assert (await place.rehearse(2, requests=requests, min_overlap=0.0)).state == "passed"
    assert (await place.rehearse(2, skip=True)).replay.requests == 0


async def test_a_damaged_release_is_refused_by_the_name_of_its_file(start, small_store):
    place = await start()
    small_store.add(2)
    victim = small_store.root / "catalogs" / small_store.catalogs[2] / "items.parquet"
    victim.write_bytes(victim.read_bytes()[:-1])
    with pytest.raises(ActivationRefusedError, match=r"items\.parquet") as refused:
        await place.rehearse(2)
    assert not refused.value.blocked
    assert (await place.running.post({"history": []})).status_code == 200


async def test_a_model_without_room_is_refused_with_the_bytes_unless_drained(
    start, small_store, tiny_lm
):
    place = await start()
    old = weakref.ref(place.service.release.engine)
    place.link._source._available = lambda device: 1 << 40 if old() is None else 20_000
    small_store.add(2, model=small_store.add_model(tiny_lm("llama", seed=3)))
    with pytest.raises(ActivationRefusedError, match=r"\d+ bytes are missing"):
        await place.rehearse(2)
    assert place.service.release.version == small_store.releases[1]
    assert (await place.running.post({"history": []})).status_code == 200

    assert await place.service.hold(5)
    assert (await place.rehearse(2)).state == "passed"
    small_store.activate(2)
    await place.served(2)
    place.service.resume()
    answer = (await place.running.post({"history": []})).json()
    assert answer["catalog_version"] == small_store.catalogs[2]


async def test_what_does_not_become_active_is_let_go(start, small_store, monkeypatch):
    monkeypatch.setattr("server.catalogs._CANDIDATE_S", 0.2)
    place = await start()
    small_store.add(2)
    assert (await place.rehearse(2)).state == "passed"
    follower, retired = place.link.follower, place.service.retired
    await until(lambda: retired.gone and not follower.ready_release)
    assert place.service.release.version == small_store.releases[1]
    assert (await place.rehearse(2)).state == "passed"  # and it may be tried again


async def test_a_second_try_takes_what_is_held_and_another_release_takes_its_place(
    start, small_store
):
    place = await start()
    small_store.add(2)
    small_store.add(3)
    assert (await place.rehearse(2)).state == "passed"
    source = place.link._source
    loads, load = [], source.load
    source.load = lambda version, beside: (loads.append(version), load(version, beside))[1]
    assert (await place.rehearse(2)).state == "passed"
    assert loads == []
    assert (await place.rehearse(3)).state == "passed"
    assert loads == [small_store.releases[3]]
    assert place.link.follower.ready_release == small_store.releases[3]


async def test_a_report_that_cannot_be_written_is_written_later(start, small_store):
    """The server gives signs of life, so that the job would wait for it for ever."""
    place = await start()
    small_store.add(2)
    source, board = place.link._source, place.board
    loads, load = [], source.load
    source.load = lambda version, beside: (loads.append(version), load(version, beside))[1]
    failing, report = [1, 2, 3], board.report

    def away(*arguments: Any) -> None:
        if failing:
            failing.pop()
            raise OSError("the database is away")
        report(*arguments)

    board.report = away
    assert (await place.rehearse(2)).state == "passed"
    assert failing == []
    assert loads == [small_store.releases[2]]


async def test_a_request_that_was_taken_without_its_being_known_is_tried_all_the_same(
    start, small_store
):
    place = await start()
    small_store.add(2)
    board = place.board
    failing, claim = [1], board.claim

    def lost(*arguments: Any) -> bool:
        taken = claim(*arguments)
        if failing:
            failing.pop()
            raise OSError("the connection was lost after the write")
        return taken

    board.claim = lost
    assert (await place.rehearse(2)).state == "passed"
    assert failing == []


async def test_one_of_two_servers_tries_and_both_follow(start, small_store):
    first, second = await start(), await start()

    async def both() -> bool:
        return len(await asyncio.to_thread(first.board.servers)) == 2

    await until(both)
    small_store.add(2)
    report = await first.rehearse(2)
    assert report.state == "passed"
    held = [place.link.follower.ready_release for place in (first, second)]
    assert sorted(held, key=str) == sorted([None, small_store.releases[2]], key=str)
    small_store.activate(2)
    steps = ActivationSteps(first.board)
    states = await asyncio.to_thread(steps.wait_until_served, small_store.releases[2], LIMIT_S)
    assert [one["state"] for one in states] == ["serving", "serving"]
