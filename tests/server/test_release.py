"""Loading what is served, from real artifacts of a tiny model."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rectokens.artifacts.model import RetrievalSpec, save_model
from rectokens.artifacts.release import save_release
from rectokens.catalog.artifact import save_catalog
from rectokens.catalog.build import build_catalog
from rectokens.prompts.recipe import PromptRecipe
from rectokens.schemas.item_tokens import ItemTokens
from server.release import ReleaseError, load_release
from server.settings import load_settings
from tests.waiting import LIMIT_S

pytestmark = pytest.mark.usefixtures("no_settings")
FINGERPRINT = "ab" * 32
ITEM_TOKENS = ItemTokens(
    offset=10, level_stride=4, num_levels=3, codebook_size=4, start_token_id=1, end_token_id=2
)
SPEC = RetrievalSpec(FINGERPRINT, ITEM_TOKENS, PromptRecipe("item_history", 1, {"max_items": 8}))


def make_catalog(levels=3, codebook_size=4, fingerprint=FINGERPRINT):
    codes = torch.tensor([[i // 16 % 4, i // 4 % 4, i % 4, 0][:levels] for i in range(30)])
    return build_catalog(
        [f"B{i:03d}" for i in range(30)],
        codes,
        codebook_size=codebook_size,
        tokenizer_fingerprint=fingerprint,
    )


@pytest.fixture(scope="module")
def store(tmp_path_factory, tiny_lm):
    """A store with a model, its catalog and their release."""
    root = tmp_path_factory.mktemp("store")
    model = save_model(root / "models", tiny_lm("qwen3"), SPEC)
    catalog = save_catalog(root / "catalogs", make_catalog())
    release = save_release(root, model.name, catalog.name)
    return {"root": root, "model": model, "catalog": catalog, "release": release}


def load(monkeypatch=None, **flags):
    return load_release(load_settings({name: str(value) for name, value in flags.items()}))


def test_a_model_and_a_catalog(store):
    release = load(model=store["model"], catalog=store["catalog"], model_name="mine")
    assert release.model_name == "mine"
    assert release.model_version == store["model"].name
    assert release.catalog.version == store["catalog"].name
    assert release.catalog.num_items == 30
    assert release.engine.max_prompt_tokens > 100


def test_a_folder_may_have_any_name(store, tmp_path):
    shutil.copytree(store["model"], tmp_path / "mounted")
    release = load(model=tmp_path / "mounted", catalog=store["catalog"])
    assert release.model_version == store["model"].name


def test_a_release_is_the_same_pair(store):
    release = load(release=store["release"])
    assert release.model_version == store["model"].name
    assert release.catalog.version == store["catalog"].name


async def test_it_answers_over_http(store, start_app):
    running = await start_app(load(release=store["release"], dtype="float32"))
    response = await running.post({"history": ["B001", "B002"], "top_k": 5, "beam_width": 8})
    assert response.status_code == 200, response.text
    items = response.json()["items"]
    assert len({item["item_id"] for item in items} - {"B001", "B002"}) == 5
    assert [item["score"] for item in items] == sorted(
        (item["score"] for item in items), reverse=True
    )


def test_the_release_and_its_parts_exclude_each_other(store):
    with pytest.raises(ReleaseError, match="do not give --model or --catalog"):
        load(release=store["release"], model=store["model"])


@pytest.mark.parametrize("missing", ["model", "catalog", "release"])
def test_a_missing_folder_is_named(store, tmp_path, missing):
    nowhere = tmp_path / "nowhere"
    paths = {"model": store["model"], "catalog": store["catalog"]}
    paths = {"release": nowhere} if missing == "release" else {**paths, missing: nowhere}
    with pytest.raises(ReleaseError, match="nowhere"):
        load(**paths)


@pytest.mark.parametrize(
    ("part", "file"),
    [
        ("model", "model.safetensors"),
        ("model", "generative_retrieval.json"),
        ("model", "manifest.json"),
        ("catalog", "items.parquet"),
        ("catalog", "trie.safetensors"),
    ],
)
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_file_is_named(store, tmp_path, part, file, damage):
    paths = {"model": store["model"], "catalog": store["catalog"]}
    paths[part] = shutil.copytree(store[part], tmp_path / part)
    victim = paths[part] / file
    content = bytearray(victim.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 0xFF
        victim.write_bytes(content)
    elif damage == "truncate":
        victim.write_bytes(content[:-7])
    else:
        victim.unlink()
    with pytest.raises(ReleaseError, match=file):
        load(**paths)


def test_a_catalog_of_another_tokenizer_is_refused_unless_allowed(store, tmp_path):
    other = save_catalog(tmp_path, make_catalog(fingerprint="cd" * 32))
    with pytest.raises(ReleaseError, match="fingerprint") as error:
        load(model=store["model"], catalog=other)
    assert "ab" * 32 in str(error.value)
    assert "cd" * 32 in str(error.value)
    assert load(model=store["model"], catalog=other, allow_mismatch=True).catalog.num_items == 30


@pytest.mark.parametrize(("levels", "codebook_size"), [(2, 4), (4, 4), (3, 8)])
def test_another_shape_is_refused_even_if_a_mismatch_is_allowed(
    store, tmp_path, levels, codebook_size
):
    other = save_catalog(tmp_path, make_catalog(levels, codebook_size))
    with pytest.raises(ReleaseError, match="do not belong together"):
        load(model=store["model"], catalog=other, allow_mismatch=True)


def test_an_unknown_prompt_builder_is_answered_with_the_known(store, tmp_path, tiny_lm):
    spec = replace(SPEC, prompt=PromptRecipe("astrology", 1, {}))
    model = save_model(tmp_path, tiny_lm("qwen3"), spec)
    with pytest.raises(ReleaseError, match=r"astrology.*item_history version 1"):
        load(model=model, catalog=store["catalog"])


def test_a_model_that_cannot_search_is_refused(store, tmp_path, tiny_lm):
    broken = tiny_lm("llama")
    with torch.no_grad():
        broken.lm_head.weight.fill_(float("nan"))
    model = save_model(tmp_path, broken, SPEC)
    with pytest.raises(ReleaseError):
        load(model=model, catalog=store["catalog"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_without_a_gpu_is_said_before_anything_is_read(tmp_path):
    with pytest.raises(ReleaseError, match="--device is cuda"):
        load(model=tmp_path, catalog=tmp_path, device="cuda")


def test_the_command_ends_with_1_and_one_message(tmp_path):
    command = f"serve --port 0 --log-level error --model {tmp_path}/nowhere --catalog {tmp_path}"
    result = subprocess.run(
        [sys.executable, "-m", "server", *command.split()],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        env={k: v for k, v in os.environ.items() if not k.startswith("RECTOKENS_")},
        timeout=LIMIT_S,
        check=False,
    )
    assert result.returncode == 1
    assert result.stderr.startswith("error: ")
    assert "nowhere" in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("8 GiB"), MemoryError("8 GiB")])
def test_memory_that_is_too_small_is_told(store, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("server.engine.runners.SharedContextRunner.__init__", fail)
    with pytest.raises(ReleaseError, match=r"memory.*8 GiB"):
        load(release=store["release"])


def test_a_search_that_raises_is_a_model_that_cannot_search(store, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("made to order")

    monkeypatch.setattr("server.engine.engine.Engine.run", fail)
    with pytest.raises(ReleaseError, match=r"cannot search.*made to order"):
        load(release=store["release"])
