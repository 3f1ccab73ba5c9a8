"""The demo from one call: data, release, figures."""

from __future__ import annotations

import gzip
import io
import json
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from rectokens.artifacts.open_store import open_release_store
from server.demo.command import activate_first, curl_example, demo_recipe, load_data, run_demo
from server.demo.data import DataFolderError


def write_as_folder(folder, data):
    """The data in the layout of a data folder."""
    folder.mkdir()
    with gzip.open(folder / "items.jsonl.gz", "wt", encoding="utf-8") as file:
        for row, (title, brand, category) in enumerate(data.metadata.iter_rows()):
            item = {"id": row + 1, "asin": data.item_ids[row], "text": data.texts[row]}
            item |= {"title": title, "brand": brand, "categories": category.split(" > ")}
            file.write(json.dumps(item) + "\n")
    with gzip.open(folder / "sequences.txt.gz", "wt", encoding="utf-8") as file:
        for user, sequence in enumerate(data.sequences):
            file.write(
                " ".join(str(number) for number in (user, *(r + 1 for r in sequence))) + "\n"
            )
    np.save(folder / "embeddings.f16.npy", data.embeddings.astype(np.float16))
    return folder


def quiet():
    return Console(file=io.StringIO(), width=100)


@pytest.mark.slow
def test_from_a_data_folder_to_figures_measured_through_http(tmp_path, tiny_data):
    folder = write_as_folder(tmp_path / "shop", tiny_data)
    console = quiet()
    result = run_demo(
        folder, tmp_path / "store", epochs=1, evaluate=True, evaluate_users=12, console=console
    )
    assert result.evaluation is not None
    assert result.evaluation.model.users == 12
    assert result.evaluation.data == "shop"
    assert 0 <= result.evaluation.model.ndcg <= result.evaluation.model.recall <= 1
    shown = console.file.getvalue()
    assert "epoch 1: loss" in shown
    assert "Recall@10" in shown
    assert "popularity" in shown

    again = run_demo(folder, tmp_path / "store", epochs=1, console=quiet())
    assert again.release == result.release
    assert again.evaluation is None


def test_a_release_is_activated_where_none_is(tiny_store, tmp_path):
    out = shutil.copytree(tiny_store, tmp_path / "store")
    (release,) = (out / "releases").iterdir()
    console = quiet()
    for _ in range(2):
        activate_first(out, release, console=console)
        active = open_release_store(out).active()
        assert (active.release, active.sequence) == (release.name, 1)
        assert release.name in console.file.getvalue()


def test_a_release_that_is_active_stays(small_store):
    active = small_store.releases[1]
    console = quiet()
    activate_first(small_store.root, Path(small_store.add(2)), console=console)
    assert small_store.store.active().release == active
    assert active in console.file.getvalue()


def test_bad_arguments_leave_nothing_behind(tmp_path):
    out = tmp_path / "store"
    with pytest.raises(DataFolderError, match="is no folder"):
        run_demo(tmp_path / "nowhere", out, console=quiet())
    with pytest.raises(ValueError, match="epochs is 0"):
        run_demo(None, out, epochs=0, console=quiet())
    with pytest.raises(ValueError, match="users is 0"):
        run_demo(None, out, evaluate=True, evaluate_users=0, console=quiet())
    assert not out.exists()


def test_recipes_follow_their_arguments(tmp_path):
    assert demo_recipe(None) != demo_recipe(tmp_path)
    changed = demo_recipe(None, seed=3, epochs=2, train_seconds=9.5)
    assert (changed.seed, changed.train.epochs, changed.train.max_seconds) == (3, 2, 9.5)


def test_the_example_is_a_request_about_known_items(tiny_data):
    words = shlex.split(curl_example(tiny_data, "http://127.0.0.1:8000"))
    assert words[:3] == ["curl", "-s", "http://127.0.0.1:8000/v1/recommend"]
    body = json.loads(words[words.index("-d") + 1])
    assert len(body["history"]) >= 1
    assert set(body["history"]) <= set(tiny_data.item_ids)


def test_generated_data_is_the_default():
    data = load_data(None, seed=1)
    assert data.name == "generated"
    assert len(data.item_ids) >= 2000
