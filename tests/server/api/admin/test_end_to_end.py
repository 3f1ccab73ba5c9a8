"""An operator's day over HTTP: one service, its worker, a job process each time, and traffic."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.waiting import LIMIT_S, ended, wait_until

KEY = "a-key-of-the-tests"
ITEMS = 60


class Operator:
    """A client of a service in a process of its own."""

    def __init__(self, base: str, log: Path) -> None:
        self.client = httpx.Client(
            base_url=base, headers={"Authorization": f"Bearer {KEY}"}, timeout=LIMIT_S
        )
        self.log = log

    def job(self, method: str, path: str, body: Any = None, state: str = "succeeded") -> Any:
        """The job of a change, once it has ended as expected; watched by its events."""
        accepted = self.client.request(method, f"/admin{path}", json=body)
        assert accepted.status_code == 202, accepted.text
        last: Any = None
        url = accepted.headers["Location"] + "/events"
        with self.client.stream("GET", url, timeout=LIMIT_S) as events:
            for line in events.iter_lines():
                if line.startswith("data: "):
                    last = json.loads(line.removeprefix("data: "))
        assert last["state"] == state, (last, self.log.read_text())
        return last

    def all_items(self, **body: Any) -> tuple[set[str], Any]:
        """Every item that can be recommended, and the answer."""
        body = {"history": [], "top_k": 300, "beam_width": 512, "exclude_history": False, **body}
        answer = self.client.post("/v1/recommend", json=body)
        assert answer.status_code == 200, answer.text
        return {item["item_id"] for item in answer.json()["items"]}, answer.json()


@pytest.fixture
def operator(small_store: Any, tmp_path: Path) -> Iterator[Operator]:
    lake = tmp_path / "lake"
    lake.mkdir()
    (lake / "way-out").symlink_to(small_store.root)
    write_source(lake / "items.parquet")
    flags = {
        "store.path": small_store.root,
        "store.poll-s": "0.2",
        "admin.sources": f"lake={lake}",
        "admin.max-upload-bytes": "20000",
        "gate.sample-requests": "16",
        "jobs.threads": "1",
        "cpu-threads": "1",
        "port": "0",
    }
    command = [sys.executable, "-m", "server", "serve"]
    for name, value in flags.items():
        command += [f"--{name}", str(value)]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RECTOKENS_")}
    log = tmp_path / "log"
    with log.open("wb") as errors:
        service = subprocess.Popen(
            command, stderr=errors, env={**environment, "RECTOKENS_ADMIN__KEYS": KEY}
        )
    try:
        yield Operator(base_url(log, service), log)
    finally:
        service.terminate()
        code = ended(service, log.read_text)
    assert code == 0, log.read_text()


def base_url(log: Path, service: subprocess.Popen[bytes]) -> str:
    def ready() -> str | None:
        assert service.poll() is None, log.read_text()
        if not (found := re.search(r'"port":(\d+)', log.read_text())):
            return None
        base = f"http://127.0.0.1:{found[1]}"
        return base if httpx.get(f"{base}/ready", timeout=LIMIT_S).status_code == 200 else None

    return str(wait_until(ready, log.read_text))


def write_source(path: Path, prefix: str = "lake", items: int = ITEMS) -> bytes:
    rows = np.random.default_rng(7).normal(size=(items, 6)).astype(np.float32)
    table = {
        "item_id": [f"{prefix}-{row}" for row in range(items)],
        "embedding": pa.array(list(rows), pa.list_(pa.float32())),
        "stock": pa.array([row % 3 for row in range(items)], pa.int64()),
        "region": ["EU" if row % 2 else "US" for row in range(items)],
    }
    pq.write_table(pa.table(table), path)
    return path.read_bytes()


def lake_items(wanted: Any = lambda row: True) -> set[str]:
    return {f"lake-{row}" for row in range(ITEMS) if wanted(row)}


def test_an_operators_day(operator: Operator, small_store: Any, tmp_path: Path) -> None:
    before, answer = operator.all_items()
    assert answer["catalog_version"] == small_store.catalogs[1]

    # A whole new catalog from a source; its new items are what is recommended from then on.
    source = {"root": "lake", "path": "items.parquet", "metadata_columns": ["*"]}
    job = operator.job("POST", "/reindex", {"source": source, "activate": True})
    assert [one["state"] for one in job["result"]["servers"]] == ["serving"]
    assert job["result"]["gate"]["state"] == "passed"
    found, answer = operator.all_items()
    assert answer["catalog_version"] == job["result"]["catalog"]
    assert found == lake_items()
    assert not found & before

    # A condition over its metadata; an item without history that meets it is in it at once.
    predicate = "stock > 0 and region = 'EU'"
    operator.job("PUT", "/constraint-sets/buyable", {"predicate": predicate})
    buyable = lake_items(lambda row: row % 3 and row % 2)
    assert operator.all_items(constraint_set="buyable")[0] == buyable
    cold = {
        "item_id": "cold",
        "embedding": [0.1] * 6,
        "metadata": {"stock": 9, "region": "EU"},
    }
    sold_out = {"item_id": "lake-1", "metadata": {"stock": 0}}
    gate = {"requests": [{"history": ["lake-3"], "top_k": 5}], "min_overlap": 0.2}
    patch = {"upserts": [cold, sold_out], "deletes": ["lake-2"], "gate": gate}
    patched = operator.job("PATCH", "/items", patch)
    assert patched["result"]["gate"]["replay"]["compared"] == 1
    assert operator.all_items(constraint_set="buyable")[0] == buyable - {"lake-1"} | {"cold"}
    assert operator.all_items()[0] == lake_items() - {"lake-2"} | {"cold"}
    assert operator.client.get("/admin/constraint-sets/buyable").json()["num_items"] == len(buyable)

    # The gate blocks what it was told to block, and the job says by which figure.
    blocked = operator.job(
        "PATCH", "/items", {"deletes": ["cold"], "gate": {"min_requests": 99}}, state="failed"
    )
    assert blocked["error"]["type"] == "gate"
    assert "at least 99" in blocked["error"]["message"]
    assert "cold" in operator.all_items()[0]

    back = operator.job("POST", "/catalogs/rollback")
    assert operator.all_items()[0] == lake_items()
    assert operator.client.get("/ready").json()["catalog_version"] == back["result"]["catalog"]

    # A tokenizer of other sizes is trained and looked at; a catalog of it is not activated.
    uploaded = operator.client.post(
        "/admin/uploads?format=parquet",
        content=write_source(tmp_path / "sent.parquet", "sent", items=30),
    ).json()
    sent = {"root": uploaded["root"], "path": uploaded["path"]}
    trained = operator.job(
        "POST", "/tokenizers", {"source": sent, "num_levels": 2, "codebook_size": 4}
    )
    version = trained["result"]["tokenizer"]
    detail = operator.client.get(f"/admin/tokenizers/{version}").json()
    assert detail["fits_model"] is False
    assert trained["result"]["fits_active_model"] is False
    report = detail["report"]
    for figure in ("reconstruction_error", "entropy_bits", "collision_rate", "p_unique"):
        assert figure in report
    refused = operator.job(
        "POST",
        "/reindex",
        {"source": sent, "tokenizer": version, "activate": True, "constraint_sets": "drop"},
        state="failed",
    )
    assert "tokenizer" in refused["error"]["message"]
    assert operator.all_items()[0] == lake_items()

    # Nothing outside the registered folders is read, whatever it is called.
    for path in ("../log", "way-out/active.json"):
        bad = operator.job(
            "POST", "/reindex", {"source": {"root": "lake", "path": path}}, state="failed"
        )
        assert bad["error"]["type"] == "invalid_source", path
        assert str(tmp_path) not in bad["error"]["message"]
    too_long = operator.client.post("/admin/uploads?format=npy", content=b"x" * 20_001)
    assert too_long.status_code == 413
    assert len(operator.client.get("/admin/uploads").json()["uploads"]) == 1
