"""A Parquet catalog in pieces: the same codes as in one go, whatever was interrupted."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from deploy.ray.encode import app
from deploy.ray.encode_pieces import (
    EncodeError,
    claim_folder,
    encode_piece,
    join_pieces,
    make_plan,
    piece_path,
)
from deploy.ray.encode_pieces import _cut as cut
from rectokens.artifacts.tokenizer import load_tokenizer, save_tokenizer
from rectokens.catalog.encode import encode_source
from rectokens.catalog.sources import open_embeddings
from rectokens.catalog.tables import read_codes, read_table
from rectokens.core.atomic_file import partial_sibling
from rectokens.tokenizers.rq_kmeans import RQKMeansTokenizer

DIM = 6


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = RQKMeansTokenizer(num_levels=3, codebook_size=8, dim=DIM, seed=1)
    tokenizer.fit_step(torch.randn(100, DIM, generator=torch.Generator().manual_seed(0)))
    folder = tmp_path_factory.mktemp("tokenizers")
    return save_tokenizer(folder, tokenizer, report={"p_unique": 1.0}, fitted_on={"rows": 100})


@pytest.fixture(scope="module")
def artifact(tokenizer: Path) -> Any:
    return load_tokenizer(tokenizer)


def write_source(folder: Path, rows: tuple[int, ...] = (70, 33), group: int = 10) -> Path:
    folder.mkdir(exist_ok=True)
    generator = torch.Generator().manual_seed(5)
    first = 0
    for number, count in enumerate(rows):
        table = pa.table(
            {
                "item_id": [f"i{first + row}" for row in range(count)],
                "price": [float(first + row) for row in range(count)],
                "embedding": pa.array(
                    torch.randn(count, DIM, generator=generator).tolist(), pa.list_(pa.float32())
                ),
            }
        )
        pq.write_table(table, folder / f"{number}.parquet", row_group_size=group)
        first += count
    return folder


@pytest.mark.parametrize("rows_per_piece", [1, 25, 1_000])
def test_pieces_are_what_one_go_would_be(
    artifact: Any, tmp_path: Path, rows_per_piece: int
) -> None:
    source, out = write_source(tmp_path / "in"), tmp_path / "out"
    plan = make_plan(source, artifact, copied=["item_id", "price"], rows_per_piece=rows_per_piece)
    assert plan.rows == 103
    assert len(plan.pieces) == {1: 11, 25: 6, 1_000: 2}[rows_per_piece]
    # Workers take them in any order.
    for piece in reversed(claim_folder(plan, out)):
        encode_piece(artifact, plan, piece, out, batch_size=7)
    result = join_pieces(plan, out)
    expected = encode_source(artifact.tokenizer, open_embeddings(source), num_levels=3)
    assert torch.equal(read_codes(result), expected.long())
    ids, beside = read_table(result)
    assert ids.to_list() == [f"i{row}" for row in range(103)]
    assert beside["price"].to_list() == [float(row) for row in range(103)]


def test_an_interrupted_run_does_what_is_missing(artifact: Any, tmp_path: Path) -> None:
    source, out = write_source(tmp_path / "in"), tmp_path / "out"
    plan = make_plan(source, artifact, rows_per_piece=25)
    for piece in claim_folder(plan, out)[:4]:
        encode_piece(artifact, plan, piece, out)
    with pytest.raises(EncodeError, match="cannot be joined"):
        join_pieces(plan, out)
    missing = claim_folder(make_plan(source, artifact, rows_per_piece=25), out)
    assert [piece.index for piece in missing] == [4, 5]
    for piece in missing:
        encode_piece(artifact, plan, piece, out)
    assert len(pq.read_table(join_pieces(plan, out))) == 103


def test_what_a_killed_run_left_is_in_nobodys_way(artifact: Any, tmp_path: Path) -> None:
    source, out = write_source(tmp_path / "in"), tmp_path / "out"
    out.mkdir()
    plan = make_plan(source, artifact, rows_per_piece=25)
    left = partial_sibling(out)
    left.write_text("")
    missing = claim_folder(plan, out)
    assert len(missing) == len(plan.pieces)
    for piece in missing:
        encode_piece(artifact, plan, piece, out)
    of_a_worker = piece_path(out, missing[0]).with_name(left.name)
    of_a_worker.write_bytes(b"PAR1")
    result = join_pieces(plan, out)
    assert not left.exists()
    assert not of_a_worker.exists()
    assert len(pq.read_table(result)) == 103


def test_a_folder_is_of_one_run(artifact: Any, tmp_path: Path) -> None:
    source, out = write_source(tmp_path / "in"), tmp_path / "out"
    claim_folder(make_plan(source, artifact), out)
    with pytest.raises(EncodeError, match="another source"):
        claim_folder(make_plan(source, artifact, rows_per_piece=25), out)
    write_source(tmp_path / "in", rows=(70, 34))
    with pytest.raises(EncodeError, match="another source"):
        claim_folder(make_plan(source, artifact), out)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    with pytest.raises(EncodeError, match="not empty"):
        claim_folder(make_plan(source, artifact), tmp_path / "full")


def test_a_piece_that_fails_leaves_nothing(artifact: Any, tmp_path: Path) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    rows = torch.randn(30, DIM).tolist()
    rows[17][2] = float("nan")
    column = pa.array(rows, pa.list_(pa.float32()))
    pq.write_table(pa.table({"embedding": column}), source / "0.parquet", row_group_size=10)
    plan = make_plan(source, artifact, rows_per_piece=10)
    _, bad, _ = claim_folder(plan, out)
    with pytest.raises(EncodeError, match="row 17 holds nan"):
        encode_piece(artifact, plan, bad, out)
    assert not piece_path(out, bad).exists()
    assert len(claim_folder(plan, out)) == 3


def test_mistakes_are_told_before_anything_is_encoded(artifact: Any, tmp_path: Path) -> None:
    source = write_source(tmp_path / "in")
    with pytest.raises(EncodeError, match="no column 'sku'; it has item_id, price, embedding"):
        make_plan(source, artifact, copied=["sku"])
    with pytest.raises(EncodeError, match="no column 'vector'"):
        make_plan(source, artifact, column="vector")
    with pytest.raises(EncodeError, match="at least 1"):
        make_plan(source, artifact, rows_per_piece=0)
    (tmp_path / "empty").mkdir()
    with pytest.raises(EncodeError, match=r"without \.parquet files"):
        make_plan(tmp_path / "empty", artifact)
    with pytest.raises(EncodeError, match="not a readable Parquet file"):
        make_plan(tmp_path / "missing.parquet", artifact)
    narrow = tmp_path / "narrow.parquet"
    pq.write_table(pa.table({"embedding": [[1.0, 2.0]]}), narrow)
    plan = make_plan(narrow, artifact)
    with pytest.raises(EncodeError, match="2 values; expected 6"):
        encode_piece(artifact, plan, plan.pieces[0], tmp_path / "out")


def test_a_source_that_changed_under_a_run_is_noticed(artifact: Any, tmp_path: Path) -> None:
    source, out = write_source(tmp_path / "in", rows=(20,)), tmp_path / "out"
    plan = make_plan(source, artifact)
    write_source(source, rows=(15,))
    with pytest.raises(EncodeError, match=r"has changed: 15 rows for 20|damaged"):
        encode_piece(artifact, plan, plan.pieces[0], out)


def test_the_command_ends_a_run_whose_pieces_are_there(
    tokenizer: Path, artifact: Any, tmp_path: Path
) -> None:
    source, out = write_source(tmp_path / "in"), tmp_path / "out"
    plan = make_plan(source, artifact, copied=["item_id"], rows_per_piece=25)
    for piece in claim_folder(plan, out):
        encode_piece(artifact, plan, piece, out)
    words = ["--tokenizer", tokenizer, "--embeddings", source, "--copy", "item_id"]
    words += ["--rows-per-piece", 25, "--out", out]
    ended = CliRunner().invoke(app, [str(word) for word in words])
    assert ended.exit_code == 0, ended.output
    assert ended.stdout.strip() == str(out / "codes.parquet")
    ended = CliRunner().invoke(app, [*map(str, words), "--copy", "sku"])
    assert ended.exit_code == 1
    assert "error: " in ended.stderr
    assert "no column 'sku'" in ended.stderr


@given(st.lists(st.integers(0, 9), max_size=12), st.integers(1, 15))
def test_a_cut_leaves_nothing_out(sizes: list[int], most: int) -> None:
    pieces = cut(sizes, most)
    assert sum(rows for *_, rows in pieces) == sum(sizes)
    for start, stop, first_row, rows in pieces:
        assert rows == sum(sizes[start:stop])
        assert first_row == sum(sizes[:start])
        assert 0 < rows <= max(most, *sizes[start:stop])
    assert all(one[1] == following[0] for one, following in pairwise(pieces))
