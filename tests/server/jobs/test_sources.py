"""Sources that nobody should be made to read, and sources that are not what they should be."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rectokens.catalog.source_limits import SourceLimits
from server.jobs.context import JobReporter
from server.jobs.kinds import FUNCTIONS
from server.jobs.params import ItemSourceParams, checked_params
from server.jobs.sources import open_source
from server.jobs.types import JobErrorKind, JobFailure, JobKind

LIMITS = SourceLimits(max_rows=1_000, max_bytes=1_000_000, max_dim=64)
ROWS = np.random.default_rng(0).normal(size=(20, 6)).astype(np.float32)


@pytest.fixture
def lake(tmp_path: Path) -> Path:
    folder = tmp_path / "lake"
    folder.mkdir()
    return folder


def write(path: Path, rows: Any = ROWS, ids: Any = None, **columns: Any) -> Path:
    ids = [f"W{i}" for i in range(len(rows))] if ids is None else ids
    lists = pa.array([None if row is None else list(row) for row in rows], pa.list_(pa.float32()))
    pq.write_table(pa.table({"item_id": ids, "embedding": lists, **columns}), path)
    return path


def read(lake: Path, **params: Any) -> int:
    """Read a source to its end; the number of rows."""
    source = ItemSourceParams(**{"root": "lake", "path": "items.parquet", **params})
    with open_source(source, {"lake": lake}, LIMITS) as opened:
        assert opened.items is not None
        return sum(len(batch) for batch in opened.embeddings.batches(7))


def refused(lake: Path, message: str, **params: Any) -> None:
    with pytest.raises(JobFailure, match=message) as error:
        read(lake, **params)
    assert error.value.kind is JobErrorKind.INVALID_SOURCE
    assert str(lake) not in error.value.message


def test_a_good_source(lake: Path):
    write(lake / "items.parquet", price=[1.0] * 20)
    assert read(lake, metadata_columns=["price"]) == 20
    (lake / "below").mkdir()
    write(lake / "below" / "x.parquet")
    assert read(lake, path="below/x.parquet") == 20
    assert read(lake, path="below") == 20
    # A link is fine as long as it stays inside.
    (lake / "latest.parquet").symlink_to(lake / "below" / "x.parquet")
    assert read(lake, path="latest.parquet") == 20


@pytest.mark.parametrize(
    "path",
    [
        "../secret.parquet",
        "below/../../secret.parquet",
        "/etc/passwd",
        "..",
        ".",
        "./items.parquet",
        ".hidden/x.parquet",
        "a//b.parquet",
        "a\\..\\b.parquet",
        "items\n.parquet",
        "items\0.parquet",
    ],
)
def test_names_that_are_no_plain_names(lake: Path, path: str):
    write(lake.parent / "secret.parquet")
    refused(lake, "not allowed; it must be a relative path", path=path)


def test_links_and_other_files_that_lead_out(lake: Path):
    outside = lake.parent / "outside"
    outside.mkdir()
    write(outside / "secret.parquet")
    (lake / "link.parquet").symlink_to(outside / "secret.parquet")
    refused(lake, "a link that leads out of root 'lake'", path="link.parquet")
    (lake / "folder").symlink_to(outside)
    refused(lake, "a link that leads out of root 'lake'", path="folder/secret.parquet")
    refused(lake, "a link that leads out of root 'lake'", path="folder")
    (lake / "parts").mkdir()
    (lake / "parts" / "a.parquet").symlink_to(outside / "secret.parquet")
    refused(lake, "not a regular file", path="parts")
    os.mkfifo(lake / "pipe.parquet")
    refused(lake, "not a regular file", path="pipe.parquet")
    (lake / "loop.parquet").symlink_to(lake / "loop.parquet")
    refused(lake, "a link that leads nowhere", path="loop.parquet")


def test_what_is_not_there_or_is_of_no_use(lake: Path):
    refused(lake, "lake/items.parquet: No such file")
    refused(lake, "lake/no.*: No such file", path="no/items.parquet")
    (lake / "items.csv").write_text("item_id\nx\n")
    refused(lake, r"ends in '.csv'; allowed are .parquet, .npy", path="items.csv")
    (lake / "items.parquet").write_bytes(b"PAR1 nothing PAR1")
    refused(lake, "not a readable Parquet file")
    (lake / "empty").mkdir()
    refused(lake, "folder without .parquet files", path="empty")
    refused(lake, "source root is 'pond'; registered are 'lake'", root="pond")


def test_a_table_of_ids(lake: Path):
    np.save(lake / "e.npy", ROWS)
    refused(lake, "holds no item ids; name the file", path="e.npy")
    (lake / "ids.txt").write_text("a\nb\n")
    refused(lake, "20 embeddings, but there are 2 item ids", path="e.npy", ids="ids.txt")
    refused(lake, "must be a relative path", path="e.npy", ids="../ids.txt")
    (lake / "ids.txt.gz").write_bytes(b"")
    refused(lake, r"ends in '.gz'", path="e.npy", ids="ids.txt.gz")
    (lake / "long.txt").write_text("x" * 1_000_001)
    refused(lake, "1,000,001 bytes .*at most 1,000,000", path="e.npy", ids="long.txt")
    write(lake / "items.parquet")
    refused(lake, "no column 'name'", id_column="name")
    refused(lake, "no column 'price'", metadata_columns=["price"])
    refused(lake, "no column 'rank'", prior_column="rank")
    write(lake / "items.parquet", ids=pa.array([1.5] * 20))
    refused(lake, "type Float64; expected strings")


def test_absurd_sizes(lake: Path):
    np.save(lake / "e.npy", np.zeros((1_001, 2), np.float32))
    (lake / "ids.txt").write_text("a\n")
    refused(lake, "1,001 rows; at most 1,000", path="e.npy", ids="ids.txt")
    header = np.lib.format.header_data_from_array_1_0(ROWS)
    header["shape"] = (10**12, 6)
    with open(lake / "lies.npy", "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
    refused(lake, "not a readable .npy file", path="lies.npy", ids="ids.txt")
    np.save(lake / "wide.npy", np.zeros((2, 65), np.float32))
    refused(lake, "rows of 65 values; at most 64", path="wide.npy")
    np.save(lake / "flat.npy", np.zeros(10, np.float32))
    refused(lake, r"shape \(10,\); expected a matrix", path="flat.npy")
    write(lake / "items.parquet", np.zeros((1_001, 2)))
    refused(lake, "1,001 rows; at most 1,000")
    (lake / "parts").mkdir()
    for name in "abc":
        write(lake / "parts" / f"{name}.parquet", np.zeros((400, 2)))
    refused(lake, "1,200 rows; at most 1,000", path="parts")


def test_a_parquet_bomb(lake: Path):
    """A few kilobytes that stand for hundreds of megabytes."""
    lists = pa.array([np.zeros(500_000, np.float32)] * 20, pa.list_(pa.float32()))
    table = pa.table({"item_id": [f"W{i}" for i in range(20)], "embedding": lists})
    pq.write_table(table, lake / "items.parquet", compression="zstd")
    assert (lake / "items.parquet").stat().st_size < 100_000
    refused(lake, "rows of 500,000 values; at most 64")
    text = pa.array(["x" * 2_000_000] * 20)
    write(lake / "items.parquet", text=pa.DictionaryArray.from_arrays([0] * 20, text.slice(0, 1)))
    refused(lake, "bytes uncompressed; at most 1,000,000", metadata_columns=["text"])


def test_rows_that_cannot_be_encoded(lake: Path):
    for value in (np.nan, np.inf, -np.inf):
        rows = ROWS.copy()
        rows[13, 2] = value
        write(lake / "items.parquet", rows)
        refused(lake, f"lake/items.parquet: row 13 holds {value}; embeddings must be finite")
    write(lake / "items.parquet", [*ROWS[:5], None, *ROWS[6:]])
    refused(lake, "do not make rows of")
    write(lake / "items.parquet", [*ROWS[:5], ROWS[5, :4], *ROWS[6:]])
    refused(lake, "do not make rows of")
    # Equal in sum, so only reading finds it.
    write(lake / "items.parquet", [*ROWS[:5], ROWS[5, :5], [*ROWS[6], 1.0], *ROWS[7:]])
    refused(lake, "row 5 has 5 values; expected 6")


def test_a_source_that_changes_while_it_is_read(lake: Path):
    path = write(lake / "items.parquet")
    other = write(lake / "other.parquet", ROWS[:10])
    np.save(lake / "e.npy", ROWS)
    (lake / "ids.txt").write_text("\n".join("abcdefghijklmnopqrst"))

    def grow() -> None:
        with open(path, "ab") as file:
            file.write(b"more")

    def replace() -> None:
        os.replace(other, path)

    def touch_in_place() -> None:
        state = path.stat()
        with open(path, "r+b") as file:
            file.seek(100)
            file.write(b"x")
        os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))

    def cut_short() -> None:
        os.truncate(lake / "e.npy", 300)

    npy = {"path": "e.npy", "ids": "ids.txt"}
    for change, message, params in (
        (grow, "now has", {}),
        (touch_in_place, "it was written to", {}),
        (replace, "changed while it was read", {}),
        (path.unlink, "changed while it was read: No such file", {}),
        (cut_short, "e.npy changed while it was read: it had .* now has 300", npy),
        (lambda: (lake / "ids.txt").write_text("?"), "ids.txt changed", npy),
    ):
        with pytest.raises(JobFailure, match=message) as error:
            read_and(change, lake, **params)
        assert error.value.kind is JobErrorKind.INVALID_SOURCE
        path.unlink(missing_ok=True)
        write(path)
        np.save(lake / "e.npy", ROWS)


def read_and(change: Callable[[], object], lake: Path, **params: Any) -> None:
    """Read a source that something happens to after the first batch."""
    source = ItemSourceParams(root="lake", **{"path": "items.parquet", **params})
    with open_source(source, {"lake": lake}, LIMITS) as opened:
        batches = opened.embeddings.batches(7)
        next(batches)
        change()
        for _ in batches:
            pass


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"ids": ["same"] * 20}, "'same'; every item id must be unique"),
        ({"ids": ["", *"abcdefghijklmnopqrs"]}, "item id of row 0 is empty"),
        ({"ids": [None, *"abcdefghijklmnopqrs"]}, "item id of row 0 is missing"),
        ({"rows": ROWS[:, :4]}, "width 4; tokenizer .* takes 6"),
        ({"rank": [float("nan")] * 20}, "prior of row 0 is nan"),
        ({"raw": [b"x"] * 20}, "'raw' has type Binary"),
        ({"semantic_id": ["x"] * 20}, "called 'semantic_id'"),
        ({"other": ["x"] * 20}, "names unknown columns 'stock'"),
    ],
)
def test_what_a_reindex_refuses_leaves_nothing(workplace, columns, message: str):
    rank = {"prior_column": "rank"} if "rank" in columns else {}
    write(workplace.lake / "items.parquet", **columns)
    source = {"root": "lake", "path": "items.parquet", "metadata_columns": ["*"], **rank}
    params = checked_params(JobKind.REINDEX, {"source": source, "activate": True})
    store = workplace.store
    before = store.active()
    with pytest.raises(JobFailure, match=message) as error:
        FUNCTIONS[JobKind.REINDEX](params, workplace.environment(), JobReporter())
    assert error.value.kind is JobErrorKind.INVALID_SOURCE
    assert store.active() == before
    assert len(store.versions("catalog")) == len(store.versions("release")) == 1
    assert list(workplace.root.rglob(".partial-*")) == []
