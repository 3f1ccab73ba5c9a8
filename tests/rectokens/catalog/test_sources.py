"""Embeddings come off the disk in order, in batches, any number of times."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from rectokens.catalog.sources import SourceBatches, open_embeddings, require_width

ROWS = np.random.default_rng(0).normal(size=(103, 6)).astype(np.float32)


def write_npy(path: Path, rows: np.ndarray) -> Path:
    np.save(path, rows)
    return path


def write_parquet(path: Path, rows, kind=None, **options) -> Path:
    kind = kind or pa.list_(pa.float32(), 6)
    column = pa.array([None if row is None else list(row) for row in rows], type=kind)
    pq.write_table(pa.table({"id": range(len(rows)), "x": column}), path, **options)
    return path


KINDS = {
    "f16.npy": lambda p: write_npy(p / "e.npy", ROWS.astype(np.float16)),
    "f32.npy": lambda p: write_npy(p / "e.npy", ROWS),
    "f64.npy": lambda p: write_npy(p / "e.npy", ROWS.astype(np.float64)),
    "big endian.npy": lambda p: write_npy(p / "e.npy", ROWS.astype(">f4")),
    "fortran.npy": lambda p: write_npy(p / "e.npy", np.asfortranarray(ROWS)),
    "fixed.parquet": lambda p: write_parquet(p / "e.parquet", ROWS, row_group_size=10),
    "list.parquet": lambda p: write_parquet(
        p / "e.parquet", ROWS, pa.list_(pa.float64()), row_group_size=10
    ),
    "large list.parquet": lambda p: write_parquet(
        p / "e.parquet", ROWS, pa.large_list(pa.float32())
    ),
    "f16.parquet": lambda p: write_parquet(
        p / "e.parquet", ROWS.astype(np.float16), pa.list_(pa.float16(), 6)
    ),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch_size", [1, 7, 103, 1000])
def test_all_rows_in_order_again_and_again(tmp_path: Path, kind: str, batch_size: int):
    source = open_embeddings(KINDS[kind](tmp_path))
    assert (source.dim, source.num_rows) == (6, 103)
    expected = torch.from_numpy(ROWS.astype(np.float16) if "f16" in kind else ROWS).float()
    for _ in range(2):
        batches = list(source.batches(batch_size))
        assert all(b.dtype == torch.float32 and 1 <= len(b) <= batch_size for b in batches)
        assert torch.equal(torch.cat(batches), expected)


def test_a_folder_of_parts(tmp_path: Path):
    for number, part in enumerate(np.array_split(ROWS, 4)):
        write_parquet(tmp_path / f"part-{number}.parquet", part)
    write_parquet(tmp_path / "part-2a.parquet", [])
    source = open_embeddings(tmp_path)
    assert source.num_rows == 103
    batches = SourceBatches(source, 20)
    for _ in range(2):
        assert torch.equal(torch.cat(list(batches)), torch.from_numpy(ROWS))
    assert len(batches) == 6


def test_batches_do_not_share_memory_with_the_file(tmp_path: Path):
    source = open_embeddings(write_npy(tmp_path / "e.npy", ROWS))
    next(source.batches(4)).zero_()
    assert torch.equal(next(source.batches(4)), torch.from_numpy(ROWS[:4]))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e300, -2e12])
def test_values_whose_distances_are_not_finite_name_their_row(tmp_path: Path, bad: float):
    rows = ROWS.astype(np.float64)
    rows[57, 3] = bad
    source = open_embeddings(write_npy(tmp_path / "e.npy", rows))
    with pytest.raises(ValueError, match=r"e\.npy: row 57 holds (nan|-?inf|-2e\+12); .*finite"):
        list(source.batches(10))
    source = open_embeddings(write_parquet(tmp_path / "e.parquet", rows, pa.list_(pa.float64())))
    with pytest.raises(ValueError, match="row 57 holds"):
        list(source.batches(10))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (None, "row 57 is missing"),
        ([1.0] * 5, "row 57 has 5 values; expected 6"),
        ([1.0] * 5 + [None], "row 57 has a missing value"),
    ],
)
def test_rows_that_do_not_fit_are_named(tmp_path: Path, row, message: str):
    rows = [list(map(float, r)) for r in ROWS]
    rows[57] = row
    source = open_embeddings(write_parquet(tmp_path / "e.parquet", rows, pa.list_(pa.float32())))
    with pytest.raises(ValueError, match=message):
        list(source.batches(10))


def test_files_that_are_no_embeddings(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        open_embeddings(tmp_path / "none.npy")
    with pytest.raises(ValueError, match=r"folder without \.parquet files"):
        open_embeddings(tmp_path)
    with pytest.raises(ValueError, match="expected a matrix"):
        open_embeddings(write_npy(tmp_path / "i.npy", np.zeros((3, 2), dtype=np.int64)))
    with pytest.raises(ValueError, match="expected a matrix"):
        open_embeddings(write_npy(tmp_path / "v.npy", np.zeros(3)))
    with pytest.raises(ValueError, match="must not be empty"):
        open_embeddings(write_npy(tmp_path / "z.npy", np.zeros((0, 3))))
    np.save(tmp_path / "o.npy", np.array([[object()]]), allow_pickle=True)
    with pytest.raises(ValueError, match=r"not a readable \.npy file"):
        open_embeddings(tmp_path / "o.npy")
    cut = write_npy(tmp_path / "cut.npy", ROWS)
    cut.write_bytes(cut.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"not a readable \.npy file"):
        open_embeddings(cut)
    (tmp_path / "e.csv").write_text("1,2")
    with pytest.raises(ValueError, match=r"ends in '\.csv'"):
        open_embeddings(tmp_path / "e.csv")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1" + b"x" * 100)
    with pytest.raises(ValueError, match="not a readable Parquet file"):
        open_embeddings(tmp_path / "bad.parquet")
    with pytest.raises(ValueError, match="has no rows"):
        open_embeddings(write_parquet(tmp_path / "empty.parquet", []))


def test_choosing_a_column(tmp_path: Path):
    path = tmp_path / "two.parquet"
    kind = pa.list_(pa.float32(), 6)
    columns = {
        "x": pa.array(list(ROWS), kind),
        "y": pa.array(list(ROWS * 2), kind),
        "id": range(103),
    }
    pq.write_table(pa.table(columns), path)
    with pytest.raises(ValueError, match=r"has 2 columns of float lists \(x, y\)"):
        open_embeddings(path)
    with pytest.raises(ValueError, match="no column 'z'; it has x, y, id"):
        open_embeddings(path, "z")
    with pytest.raises(ValueError, match="'id' has type int64"):
        open_embeddings(path, "id")
    assert torch.equal(next(open_embeddings(path, "y").batches(200)), torch.from_numpy(ROWS * 2))


def test_sizes_are_checked(tmp_path: Path):
    source = open_embeddings(write_npy(tmp_path / "e.npy", ROWS))
    with pytest.raises(ValueError, match="batch_size is 0"):
        next(source.batches(0))
    with pytest.raises(ValueError, match="width 6; the tokenizer takes 8"):
        require_width(source, 8, tmp_path / "e.npy")
