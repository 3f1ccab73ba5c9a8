"""``python -m server batch`` as an operator meets it: killed, given bad files, continued.

``CHAOS_ROUNDS`` sets how many times a run is killed before one is let finish.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from server.offline.run import recommend_offline
from server.offline.users import UsersFile
from server.release import load_release
from server.settings import load_settings
from tests.waiting import LIMIT_S

ROOT = Path(__file__).parents[3]
ROUNDS = int(os.environ.get("CHAOS_ROUNDS", "1"))
SHARDS, SHARD_ROWS = 20 + 20 * ROUNDS, 2


@pytest.fixture
def users(tmp_path: Path) -> Path:
    rng = random.Random(0)
    rows = SHARDS * SHARD_ROWS
    histories = [[f"1-{rng.randrange(40)}" for _ in range(rng.randrange(9))] for _ in range(rows)]
    path = tmp_path / "users.parquet"
    pq.write_table(pa.table({"user_id": list(range(rows)), "history": histories}), path)
    return path


def start(*arguments: str | Path) -> subprocess.Popen[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RECTOKENS_")}
    return subprocess.Popen(
        [sys.executable, "-m", "server", "batch", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**environment, "OMP_NUM_THREADS": "1"},
    )


def shards_in(out: Path) -> dict[str, bytes]:
    return {shard.name: shard.read_bytes() for shard in out.glob("part-*.parquet")}


def test_killed_at_any_time_and_continued_it_is_as_if_nothing_had_happened(
    tmp_path: Path, users: Path, small_store: Any
) -> None:
    release = small_store.root / "releases" / small_store.releases[1]
    out = tmp_path / "out"
    command = ["--in", users, "--out", out, "--release", release, "--shard-rows", SHARD_ROWS]
    command += ["--defaults.temperature", "0.8", "--device", "cpu", "--cpu-threads", "1"]
    rng = random.Random(1)
    for number in range(ROUNDS):
        process = start(*command)
        enough = min(1 + rng.randrange(9) + len(shards_in(out)), SHARDS - 1)
        ends = time.monotonic() + LIMIT_S
        while len(list(out.glob("part-*.parquet"))) < enough and time.monotonic() < ends:
            assert process.poll() is None, process.communicate()
            time.sleep(0.001)
        process.kill()
        _, stderr = process.communicate(timeout=LIMIT_S)
        if number == 0:
            assert 0 < len(shards_in(out)) < SHARDS, stderr
            assert not (out / "summary.json").exists()
    survivors = shards_in(out)

    process = start(*command)
    # The more rounds, the more shards are left, and others may want the cores.
    stdout, stderr = process.communicate(timeout=LIMIT_S + 10 * ROUNDS)
    assert process.returncode == 0, stderr
    assert stdout == ""
    users_there = f"{SHARDS * SHARD_ROWS:,}"
    assert f"{users_there} users in {out}: {users_there} answered" in stderr
    assert json.loads((out / "summary.json").read_text())["last_run"]["users"] == SHARD_ROWS * (
        SHARDS - len(survivors)
    )

    settings = load_settings(
        {
            "release": str(release),
            "defaults.temperature": "0.8",
            "device": "cpu",
            "engine.prefix_cache": "false",
        }
    )
    whole = tmp_path / "whole"
    loaded = load_release(settings)
    recommend_offline(UsersFile(users), whole, loaded, settings, shard_rows=SHARD_ROWS, seed=0)
    assert shards_in(out) == shards_in(whole)
    assert survivors.items() <= shards_in(out).items()
    assert {file.name for file in out.iterdir()} - set(shards_in(out)) == {
        "run.json",
        "summary.json",
        ".lock",
    }


def test_what_cannot_be_used_is_one_message(tmp_path: Path, users: Path) -> None:
    bad = tmp_path / "bad.parquet"
    bad.write_text("user_id,history\n")
    cases = [
        (["--in", users, "--out", tmp_path / "out"], 2, "nothing to search; give --release"),
        (["--in", bad, "--out", tmp_path / "out", "--release", "r"], 1, "bad.parquet cannot be"),
    ]
    processes = [start(*arguments) for arguments, _, _ in cases]
    for process, (_, code, message) in zip(processes, cases, strict=True):
        stdout, stderr = process.communicate(timeout=LIMIT_S)
        assert process.returncode == code, stderr
        (line,) = [line for line in stderr.splitlines() if line.startswith("error: ")]
        assert message in line
        assert "Traceback" not in stderr
        assert stdout == ""
    assert not (tmp_path / "out").exists()
