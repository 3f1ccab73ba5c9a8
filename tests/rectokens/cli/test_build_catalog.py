"""``rectokens build-catalog``."""

from __future__ import annotations

from pathlib import Path

import pytest

from rectokens.catalog.artifact import load_catalog


@pytest.fixture
def build(data, tmp_path: Path):
    """Arguments of a build, with changes; an option set to None is left out."""

    def arguments(**changes) -> list[object]:
        options = {
            "tokenizer": data.tokenizer_dir,
            "embeddings": data.embeddings,
            "ids": data.items,
            "out": tmp_path / "catalogs",
            **changes,
        }
        given = [(f"--{k.replace('_', '-')}", v) for k, v in options.items() if v is not None]
        return ["build-catalog", *(x for pair in given for x in pair)]

    return arguments


def test_everything_at_once(run, build, data):
    result = run(
        *build(
            prior_column="popularity",
            metadata_columns="title,price",
            constraint_set=f"sale={data.sale}",
            batch_size=9,
        )
    )
    assert result.exit_code == 0, result.output
    folder = Path(result.stdout.strip())
    catalog = load_catalog(folder)
    assert catalog.version == folder.name
    assert sorted(catalog.item_ids.to_list()) == data.table["item_id"].to_list()
    codes = data.tokenizer.encode(data.rows).codes
    prior, titles = data.table["popularity"].to_list(), data.table["title"].to_list()
    for row, item_id in enumerate(data.table["item_id"]):
        item = int(catalog.index_of([item_id]))
        assert catalog.codes_of([item])[0].tolist() == codes[row].tolist()
        assert float(catalog.prior[item]) == prior[row]
        assert catalog.metadata_of(item) == {"title": titles[row], "price": row / 2}
    sale = catalog.constraint_sets["sale"]
    assert sorted(catalog.ids_of(sale)) == ["B001", "B050", "B059"]


def test_the_manifest_names_tokenizer_and_floor(run, build, data):
    import json

    folder = Path(run(*build()).stdout.strip())
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["parents"]["tokenizer"]["version"] == data.tokenizer_dir.name
    assert manifest["numbers"]["collision_rate_floor"] == pytest.approx(20 / 60)
    assert manifest["numbers"]["collision_rate"] >= 20 / 60


def test_codes_in_two_steps_give_the_same_catalog(run, build, data, tmp_path: Path):
    one = run(*build())
    run(
        "encode",
        *("--tokenizer", data.tokenizer_dir, "--embeddings", data.embeddings),
        *("--out", tmp_path / "codes.parquet"),
    )
    two = run(*build(embeddings=None, codes=tmp_path / "codes.parquet", out=tmp_path / "again"))
    assert Path(one.stdout.strip()).name == Path(two.stdout.strip()).name


def test_an_extra_level(run, build):
    result = run(*build(collisions="extra_level"))
    catalog = load_catalog(Path(result.stdout.strip()))
    assert (catalog.num_levels, catalog.trie.num_leaves) == (4, 60)


def test_failures_are_one_message_and_write_nothing(fails, build, data, tmp_path: Path):
    def failure(**changes) -> str:
        message = fails(*build(**changes))
        out = tmp_path / "catalogs"
        assert not out.exists() or list(out.iterdir()) == []
        return message

    assert "one of --embeddings and --codes" in failure(embeddings=None)
    assert "one of --embeddings and --codes" in failure(codes=data.embeddings)
    assert "no column 'rank' beside the ids" in failure(prior_column="rank")
    assert "prior has type String" in failure(prior_column="title")
    assert "no column 'x'" in failure(metadata_columns="title,x")
    assert "expected NAME=FILE" in failure(constraint_set="sale")
    few = tmp_path / "few.txt"
    few.write_text("B000\nB001\n")
    assert "has 60 rows, but" in failure(ids=few)
    twice = tmp_path / "twice.txt"
    twice.write_text("B000\n" * 60)
    assert "occur more than once, among them 'B000'" in failure(ids=twice)
    unknown = tmp_path / "unknown.txt"
    unknown.write_text("B000\nX9\n")
    assert "does not have, among them 'X9'" in failure(constraint_set=f"s={unknown}")
    blank = tmp_path / "blank.txt"
    blank.write_text("B000\n\n" + "".join(f"C{i}\n" for i in range(58)))
    assert "item id of row 1 is empty" in failure(ids=blank)


def test_a_file_where_the_folder_should_be(fails, build, tmp_path: Path):
    (tmp_path / "taken").write_text("")
    assert "taken" in fails(*build(out=tmp_path / "taken"))
