"""Tables of items and files of codes."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from rectokens.catalog.tables import read_codes, read_table, write_codes


def test_one_id_a_line_whatever_the_line_holds(tmp_path: Path):
    path = tmp_path / "ids.txt"
    path.write_bytes('00123\nB,"x\r\n with space\n\nü\n'.encode())
    ids, beside = read_table(path)
    assert ids.to_list() == ["00123", 'B,"x', " with space", "", "ü"]
    assert beside.width == 0


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("suffix", "text"),
    [
        (".csv", "item_id,price,title\n007,1,x\nB,2.5,\n"),
        (".jsonl", '{"item_id":"007","price":1,"title":"x"}\n{"item_id":"B","price":2.5}\n'),
    ],
)
def test_tables_keep_ids_as_text(tmp_path: Path, suffix: str, text: str, packed: bool):
    path = tmp_path / f"items{suffix}"
    if packed:
        path = path.with_name(path.name + ".gz")
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    ids, beside = read_table(path)
    assert ids.to_list() == ["007", "B"]
    assert beside.to_dict(as_series=False) == {"price": [1.0, 2.5], "title": ["x", None]}


def test_parquet_with_integer_ids(tmp_path: Path):
    path = tmp_path / "items.parquet"
    pl.DataFrame({"asin": [3, 1], "prior": [0.5, 1.5]}).write_parquet(path)
    ids, beside = read_table(path, "asin")
    assert ids.to_list() == ["3", "1"]
    assert beside.columns == ["prior"]
    with pytest.raises(ValueError, match="no column 'item_id'; it has asin, prior"):
        read_table(path)
    with pytest.raises(ValueError, match="'prior' has type Float64; expected strings"):
        read_table(path, "prior")


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", b"\xff\xfe\n", r"not a readable \.txt file"),
        ("a.csv", b"item_id,x\n\xff,2\n", r"not a readable \.csv file"),
        ("a.jsonl", b'{"item_id": \n', r"not a readable \.jsonl file"),
        ("a.parquet", b"PAR1xxxxPAR1", r"not a readable \.parquet file"),
        ("a.xls", b"", r"tables are read from \.txt, \.csv"),
    ],
)
def test_tables_that_cannot_be_read(tmp_path: Path, name: str, data: bytes, message: str):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message):
        read_table(tmp_path / name)


@pytest.mark.parametrize("suffix", [".npy", ".parquet"])
def test_codes_come_back(tmp_path: Path, suffix: str):
    codes = torch.tensor([[0, 65_535, 3], [7, 8, 9]])
    path = tmp_path / "new" / f"codes{suffix}"
    write_codes(path, codes)
    assert torch.equal(read_codes(path), codes)
    assert list(path.parent.iterdir()) == [path]


def test_codes_that_cannot_be_read(tmp_path: Path):
    with pytest.raises(ValueError, match=r"written as \.npy or \.parquet"):
        write_codes(tmp_path / "codes.csv", torch.zeros(1, 1))
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_codes(tmp_path / "codes.npy")
    np.save(tmp_path / "f.npy", np.zeros((2, 2)))
    with pytest.raises(ValueError, match=r"holds float64 .* of integers"):
        read_codes(tmp_path / "f.npy")
    pl.DataFrame({"codes": [[1, 2], [3]]}).write_parquet(tmp_path / "ragged.parquet")
    with pytest.raises(ValueError, match="row 1 has 1 values; expected 2"):
        read_codes(tmp_path / "ragged.parquet")
    (tmp_path / "bad.parquet").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="not a readable Parquet file"):
        read_codes(tmp_path / "bad.parquet")
