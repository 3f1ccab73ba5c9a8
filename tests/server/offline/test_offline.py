"""All users of a file: each gets what the service would answer, however the run was cut up."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from filelock import FileLock

from server.engine.types import EngineBrokenError
from server.offline.errors import OfflineError
from server.offline.output import LOCK_FILE, SCHEMA
from server.offline.run import recommend_offline
from server.offline.users import UsersFile
from server.settings import Settings, load_settings
from tests.server.beginning_engine import BeginningEngine

USERS = 43
Rows = dict[str, list[Any]]


@pytest.fixture
def settings() -> Settings:
    flags = {"defaults.top_k": 4, "defaults.beam_width": 6, "batching.max_requests": 5}
    return load_settings(flags)


def rows_of(users: int = USERS) -> Rows:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(0, 16, (users,), generator=generator).tolist()
    histories = [
        [f"item-{i}" for i in torch.randint(0, 400, (length,), generator=generator).tolist()]
        for length in lengths
    ]
    return {"user_id": [f"user-{i}" for i in range(users)], "history": histories}


def write(path: Path, rows: Rows, types: dict[str, pa.DataType] | None = None) -> UsersFile:
    columns = {
        name: pa.array(values, type=(types or {}).get(name)) for name, values in rows.items()
    }
    pq.write_table(pa.table(columns), path, row_group_size=8)
    return UsersFile(path)


def run(users: UsersFile, out: Path, release: Any, settings: Settings, **kwargs: Any) -> Any:
    options = {"shard_rows": 10, "seed": 7, **kwargs}
    return recommend_offline(users, out, release, settings, **options)


def found_in(out: Path) -> list[dict[str, Any]]:
    shards = sorted(out.glob("part-*.parquet"))
    return [row for shard in shards for row in pq.read_table(shard).to_pylist()]


def contents(out: Path) -> dict[str, bytes]:
    return {shard.name: shard.read_bytes() for shard in out.glob("part-*.parquet")}


async def test_everybody_gets_what_the_service_answers(
    tmp_path: Path, real: Any, settings: Settings, start_app: Any
) -> None:
    rows = rows_of()
    rows["exclude_items"] = [[f"item-{i}"] if i % 3 else None for i in range(USERS)]
    rows["constraint_sets"] = [["even"] if i % 4 == 0 else [] for i in range(USERS)]
    rows["allow_items"] = [
        [f"item-{i}" for i in range(3)] if i % 5 == 0 else None for i in range(USERS)
    ]
    users = write(tmp_path / "users.parquet", rows)
    summary = run(users, tmp_path / "out", real, settings)
    found = found_in(tmp_path / "out")
    assert pq.read_schema(tmp_path / "out" / "part-00000.parquet").equals(SCHEMA)
    assert len(list((tmp_path / "out").glob("part-*.parquet"))) == 5
    assert [row["user_id"] for row in found] == rows["user_id"]

    running = await start_app(real)
    for i, row in enumerate(found):
        body = {"history": rows["history"][i], "top_k": 4, "beam_width": 6}
        body |= {"exclude_items": rows["exclude_items"][i] or []}
        if rows["constraint_sets"][i]:
            body["constraint_set"] = rows["constraint_sets"][i]
        if rows["allow_items"][i] is not None:
            body["allow_items"] = rows["allow_items"][i]
        answer = (await running.post(body)).json()
        assert row["item_ids"] == [item["item_id"] for item in answer["items"]]
        assert row["scores"] == pytest.approx([i["score"] for i in answer["items"]], abs=1e-5)
        assert row["shortfall"] == (answer["shortfall"] or {}).get("reason")
        assert row["truncated_items"] == answer["usage"]["truncated_items"]
        assert row["error"] is row["error_message"] is None
    assert summary["users"] == summary["answered"] == USERS
    assert sum(row["truncated_items"] > 0 for row in found) > 3
    assert summary["items"] == sum(len(row["item_ids"]) for row in found)
    assert summary["shortfalls"]["filters"] == sum(row["shortfall"] is not None for row in found)
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == summary
    asked = json.loads((tmp_path / "out" / "run.json").read_text())
    assert (asked["device"], asked["dtype"]) == ("cpu", "float32")


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_interrupted_run_goes_on_and_ends_as_one_that_was_not(
    tmp_path: Path, real: Any, temperature: float
) -> None:
    settings = load_settings({"defaults.temperature": temperature, "batching.max_requests": 5})
    users = write(tmp_path / "users.parquet", rows_of())
    run(users, tmp_path / "whole", real, settings)

    class StoppedError(Exception):
        pass

    def stop(done: int, now: int) -> None:
        if now == 20:
            raise StoppedError

    out = tmp_path / "out"
    with pytest.raises(StoppedError):
        run(users, out, real, settings, progress=stop)
    before = contents(out)
    assert len(before) == 2
    assert not (out / "summary.json").exists()
    # What a writer leaves that was killed in the middle of a shard.
    (out / ".partial-1-abc.parquet").write_bytes(b"half")
    seen: list[tuple[int, int]] = []
    summary = run(users, out, real, settings, progress=lambda *done: seen.append(done))
    assert seen == [(10, 0), (20, 0), (30, 10), (40, 20), (43, 23)]
    assert contents(out) == contents(tmp_path / "whole")
    assert before.items() <= contents(out).items()
    assert not list(out.glob(".partial-*"))
    assert summary["users"] == USERS
    assert summary["last_run"]["users"] == 23


def test_samples_depend_on_the_seed_and_the_row_alone(tmp_path: Path, real: Any) -> None:
    settings = load_settings({"defaults.temperature": 1.5})
    rows: Rows = {"user_id": list(range(6)), "history": [["item-3"]] * 6}
    users = write(tmp_path / "users.parquet", rows)
    first, again, other = (tmp_path / name for name in ("first", "again", "other"))
    run(users, first, real, settings, seed=1)
    run(users, again, real, settings, seed=1, shard_rows=2)
    run(users, other, real, settings, seed=2)
    drawn = [tuple(row["item_ids"]) for row in found_in(first)]
    assert drawn == [tuple(row["item_ids"]) for row in found_in(again)]
    assert drawn != [tuple(row["item_ids"]) for row in found_in(other)]
    assert len(set(drawn)) > 1
    assert [row["user_id"] for row in found_in(first)] == list("012345")

    rows["seed"] = [9, 9, None, 9, 9, None]
    given = write(tmp_path / "seeds.parquet", rows)
    run(given, tmp_path / "given", real, settings, seed=1)
    found = [tuple(row["item_ids"]) for row in found_in(tmp_path / "given")]
    assert found[0] == found[1] == found[3] == found[4]
    assert (found[2], found[5]) == (drawn[2], drawn[5])


def test_a_user_that_cannot_be_served_has_an_error_and_the_others_their_items(
    tmp_path: Path, real: Any, settings: Settings
) -> None:
    users = write(
        tmp_path / "users.parquet",
        {
            "user_id": ["ok", "unknown", None, "null inside", "no such set", "minus", "empty"],
            "history": [["item-1", "x"], ["x"], ["item-2"], ["item-1", None], [], [], None],
            "constraint_sets": [None, None, None, None, ["odd"], None, None],
            "seed": [None, None, None, None, None, -1, None],
        },
    )
    summary = run(users, tmp_path / "out", real, settings)
    found = found_in(tmp_path / "out")
    errors = {row["user_id"]: row["error"] for row in found}
    assert errors == {
        "ok": None,
        "unknown": "no_known_items",
        None: "invalid_value",
        "null inside": "invalid_value",
        "no such set": "invalid_value",
        "minus": "invalid_value",
        "empty": None,
    }
    messages = {row["user_id"]: row["error_message"] for row in found}
    assert "first of them 'x'" in messages["unknown"]
    assert messages[None] == "user_id is null"
    assert messages["null inside"] == "history has a null in it"
    assert "'odd' is not in catalog" in messages["no such set"]
    assert messages["minus"].startswith("seed is -1; allowed are 0 to ")
    for row in found:
        assert len(row["item_ids"]) == len(row["scores"]) == (0 if row["error"] else 4)
    assert found[0]["unknown_items"] == 1
    assert summary["errors"] == {"invalid_value": 4, "no_known_items": 1}
    assert summary["answered"] == 2


def dummy_users(tmp_path: Path, count: int = 12) -> UsersFile:
    rows = {"user_id": list(range(count)), "history": [[f"B{i:03d}"] for i in range(count)]}
    return write(tmp_path / "users.parquet", rows)


def beginning_engine() -> Any:
    engine = BeginningEngine()
    engine.prompts.set()
    engine.gate.set()
    return engine


def test_batches_are_begun_before_others_are_finished(
    tmp_path: Path, dummy: Any, settings: Settings
) -> None:
    engine = beginning_engine()
    run(dummy_users(tmp_path), tmp_path / "begun", dummy.make_release(engine), settings)
    events = [(what, number) for number in (0, 1) for what in ("begun", "finished")]
    assert engine.log[:4] == [events[0], events[2], events[1], events[3]]
    run(dummy_users(tmp_path), tmp_path / "whole", dummy.make_release(), settings)
    assert found_in(tmp_path / "begun") == found_in(tmp_path / "whole")


def test_what_cannot_be_begun_is_run_by_itself(
    tmp_path: Path, dummy: Any, settings: Settings
) -> None:
    engine = beginning_engine()

    def no_room(requests: Any) -> None:
        raise MemoryError("with another batch there")

    engine.on_begin = no_room
    summary = run(dummy_users(tmp_path), tmp_path / "out", dummy.make_release(engine), settings)
    assert summary["answered"] == 12
    assert engine.begun == []


@pytest.mark.parametrize("begins", [False, True])
def test_what_breaks_a_batch_fails_alone(
    begins: bool, tmp_path: Path, dummy: Any, settings: Settings
) -> None:
    engine = beginning_engine() if begins else dummy.DummyEngine()

    def explode(requests: Any) -> None:
        if len(requests) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        if any(3 in request.excluded_items.tolist() for request in requests):
            raise RuntimeError("poisoned")

    engine.on_search = explode
    summary = run(dummy_users(tmp_path), tmp_path / "out", dummy.make_release(engine), settings)
    found = found_in(tmp_path / "out")
    assert [row["user_id"] for row in found if row["error"]] == ["3"]
    assert found[3]["error"] == "engine_fault"
    assert found[3]["error_message"] == "RuntimeError: poisoned"
    assert all(len(row["item_ids"]) == 4 for row in found if not row["error"])
    assert summary["errors"] == {"engine_fault": 1}


def test_a_broken_device_ends_the_run_and_another_goes_on(
    tmp_path: Path, dummy: Any, settings: Settings
) -> None:
    engine = dummy.DummyEngine()

    def fail(requests: Any) -> None:
        if any(10 in request.excluded_items.tolist() for request in requests):
            raise EngineBrokenError("the device is gone")

    engine.on_search = fail
    users, out = dummy_users(tmp_path), tmp_path / "out"
    with pytest.raises(EngineBrokenError):
        run(users, out, dummy.make_release(engine), settings)
    assert [row["user_id"] for row in found_in(out)] == list(map(str, range(10)))
    done = len(engine.batches)
    engine.on_search = lambda requests: None
    assert run(users, out, dummy.make_release(engine), settings)["answered"] == 12
    assert sum(map(len, engine.batches[done:])) == 2


def test_a_fault_of_the_engine_that_has_passed_is_not_kept(
    tmp_path: Path, dummy: Any, settings: Settings
) -> None:
    engine = dummy.DummyEngine()

    def fail(requests: Any) -> None:
        if any(10 in request.excluded_items.tolist() for request in requests):
            raise torch.OutOfMemoryError("CUDA out of memory")

    engine.on_search = fail
    users, out = dummy_users(tmp_path), tmp_path / "out"
    assert run(users, out, dummy.make_release(engine), settings)["errors"] == {"engine_fault": 1}
    done = len(engine.batches)
    engine.on_search = lambda requests: None
    summary = run(users, out, dummy.make_release(engine), settings)
    assert (summary["answered"], summary["errors"]) == (12, {})
    assert sum(map(len, engine.batches[done:])) == 2  # of the one shard
    whole = tmp_path / "whole"
    run(users, whole, dummy.make_release(), settings)
    assert found_in(out) == found_in(whole)


def test_batches_are_full_and_prepared_while_others_run(
    tmp_path: Path, dummy: Any, settings: Settings
) -> None:
    engine = dummy.DummyEngine()
    users = dummy_users(tmp_path, 30)
    before = set(threading.enumerate())
    run(users, tmp_path / "out", dummy.make_release(engine), settings, shard_rows=15)
    assert [len(batch) for batch in engine.batches] == [5] * 6
    assert engine.run_ahead == engine.batches
    assert set(threading.enumerate()) <= before


def test_another_run_s_folder_is_left_alone(tmp_path: Path, dummy: Any, settings: Settings) -> None:
    users, out, release = dummy_users(tmp_path), tmp_path / "out", dummy.make_release()
    run(users, out, release, settings)
    before = contents(out)
    other = load_settings({"defaults.top_k": 3})
    rounded = settings.model_copy(
        update={"engine": settings.engine.model_copy(update={"fp8": True})}
    )
    halved = dummy.DummyEngine()
    halved.dtype = torch.bfloat16
    for change, message in [
        (lambda: run(users, out, release, settings, seed=8), "seed was 7 and is 8"),
        (lambda: run(users, out, release, settings, shard_rows=3), "shard_rows was 10 and is 3"),
        (lambda: run(users, out, release, other), "defaults was"),
        (lambda: run(users, out, release, rounded), "dtype was 'float32' and is 'fp8'"),
        (
            lambda: run(users, out, dummy.make_release(halved), settings),
            "dtype was 'float32' and is 'bfloat16'",
        ),
        (
            lambda: run(users, out, dummy.make_release(model_version="b"), settings),
            "model_version was 'model0000000000a' and is 'b'",
        ),
        (
            lambda: run(write(tmp_path / "more", rows_of(13)), out, release, settings),
            "input_rows was 12 and is 13; input_sha256 was",
        ),
    ]:
        with pytest.raises(OfflineError, match=message):
            change()
    assert contents(out) == before

    asked = json.loads((out / "run.json").read_text())
    for text, message in [
        ("{", r"run\.json cannot be read"),
        ("[1]", r"run\.json cannot be read: it holds no JSON object"),
        (json.dumps({**asked, "format": 1, "device": "auto"}), "of another version .* format 1"),
    ]:
        (out / "run.json").write_text(text)
        with pytest.raises(OfflineError, match=message):
            run(users, out, release, settings)
    assert contents(out) == before
    (out / "run.json").unlink()
    with pytest.raises(OfflineError, match=r"holds shards but no run\.json"):
        run(users, out, release, settings)


def test_two_runs_do_not_write_to_one_folder(
    tmp_path: Path, dummy: Any, settings: Settings
) -> None:
    users, out = dummy_users(tmp_path), tmp_path / "out"
    out.mkdir()
    with FileLock(out / LOCK_FILE), pytest.raises(OfflineError, match="written to by another run"):
        run(users, out, dummy.make_release(), settings)
    assert run(users, out, dummy.make_release(), settings)["answered"] == 12


def test_a_damaged_shard_is_named(tmp_path: Path, dummy: Any, settings: Settings) -> None:
    users, out, release = dummy_users(tmp_path), tmp_path / "out", dummy.make_release()
    run(users, out, release, settings)
    before = contents(out)
    (out / "part-00001.parquet").write_bytes(b"PAR1 nothing PAR1")
    with pytest.raises(OfflineError, match=r"part-00001\.parquet is damaged.*remove it"):
        run(users, out, release, settings)
    (out / "part-00001.parquet").unlink()
    run(users, out, release, settings)
    assert contents(out) == before


def test_a_file_of_nobody(tmp_path: Path, dummy: Any, settings: Settings) -> None:
    types = {"user_id": pa.string(), "history": pa.list_(pa.string())}
    users = write(tmp_path / "users.parquet", {"user_id": [], "history": []}, types)
    summary = run(users, tmp_path / "out", dummy.make_release(), settings)
    assert (summary["users"], summary["shards"], summary["items"]) == (0, 0, 0)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"user": [1], "history": [["a"]]}, "no column 'user_id'; it has user, history"),
        ({"user_id": [1]}, "no column 'history'; it has user_id"),
        ({"user_id": [1.5], "history": [["a"]]}, "column 'user_id' .* is double; expected text or"),
        ({"user_id": [1], "history": ["a"]}, "column 'history' .* is string; expected a list"),
        ({"user_id": [1], "history": [[0.5]]}, "column 'history' .* is list<.*double>"),
        (
            {"user_id": [1], "history": [["a"]], "seed": ["x"]},
            "column 'seed' .* is string; expected an integer",
        ),
    ],
)
def test_a_file_of_another_shape_is_refused(tmp_path: Path, rows: Rows, message: str) -> None:
    with pytest.raises(OfflineError, match=message):
        write(tmp_path / "users.parquet", rows)


def test_a_file_that_is_missing_or_no_parquet_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OfflineError, match=r"nowhere\.parquet cannot be read as Parquet"):
        UsersFile(tmp_path / "nowhere.parquet")
    path = tmp_path / "users.parquet"
    path.write_text("user_id,history\n1,a\n")
    with pytest.raises(OfflineError, match=r"users\.parquet cannot be read as Parquet"):
        UsersFile(path)


def test_a_file_damaged_within_stops_the_run_and_keeps_what_is_done(
    tmp_path: Path, dummy: Any, settings: Settings
) -> None:
    path = tmp_path / "users.parquet"
    write(path, rows_of(400))
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 400] = bytes(400)
    path.write_bytes(content)
    with pytest.raises(OfflineError, match=r"users\.parquet is damaged"):
        run(UsersFile(path), tmp_path / "out", dummy.make_release(), settings)
    assert contents(tmp_path / "out")


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view(), pa.int64()])
def test_ids_of_any_type_and_columns_nobody_reads(
    tmp_path: Path, dummy: Any, settings: Settings, kind: pa.DataType
) -> None:
    values: Callable[[str], Any] = int if kind == pa.int64() else str
    rows: Rows = {
        "user_id": [values("5")],
        "history": [[]],
        "exclude_items": [None],
        "country": ["x"],
    }
    users = write(tmp_path / "users.parquet", rows, {"user_id": kind, "history": pa.list_(kind)})
    assert users.ignored == ["country"]
    run(users, tmp_path / "out", dummy.make_release(), settings)
    (row,) = found_in(tmp_path / "out")
    assert (row["user_id"], row["item_ids"]) == ("5", ["B000", "B001", "B002", "B003"])
