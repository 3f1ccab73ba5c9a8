"""The store that a build leaves: artifacts that belong together and load with their own tools."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rectokens.artifacts.errors import ArtifactError
from rectokens.artifacts.model import load_model_manifest
from rectokens.artifacts.release import load_release
from rectokens.artifacts.store import ArtifactStore
from rectokens.artifacts.tokenizer import load_tokenizer
from rectokens.catalog.artifact import load_catalog
from rectokens.prompts.parts import ItemPart, TextPart
from rectokens.prompts.registry import prompt_builder
from rectokens.schemas.search import SearchRequest
from server.demo.build import BuildEvents, build_release, find_release
from server.demo.data import item_counts, leave_one_out
from server.demo.recipe import DemoRecipe, ModelSize, recipe_key
from server.demo.samples import Augmentation
from server.engine.loading import load_engine


@pytest.fixture(scope="module")
def release(tiny_store):
    store = ArtifactStore(tiny_store)
    (version,) = store.versions("release")
    return load_release(store.path("release", version))


def test_the_parts_belong_together(release, tiny_store, tiny_data, tiny_recipe):
    model = load_model_manifest(release.model_path)
    catalog = load_catalog(release.catalog_path)
    store = ArtifactStore(tiny_store)
    tokenizer = load_tokenizer(
        store.path("tokenizer", model.manifest.parents["tokenizer"].version or "")
    )
    assert tokenizer.fingerprint == model.spec.tokenizer_fingerprint
    assert tokenizer.fingerprint == catalog.tokenizer_fingerprint
    assert len(tokenizer.report["reconstruction_error"]) == tiny_recipe.num_levels
    codes = tokenizer.tokenizer.encode(torch.from_numpy(tiny_data.embeddings)).codes
    index = catalog.index_of(list(tiny_data.item_ids))
    assert torch.equal(catalog.codes_of(index), codes)
    row = catalog.metadata_of(int(index[7]))
    assert row is not None
    assert row["title"] == tiny_data.metadata["title"][7]
    # Colliding items come in order of their count in training parts.
    assert catalog.prior is not None
    counts = item_counts(leave_one_out(tiny_data.sequences).train, len(tiny_data.item_ids))
    assert catalog.prior[index].tolist() == counts.tolist()


def test_transformers_alone_loads_the_model_and_the_engine_searches_it(release):
    model = AutoModelForCausalLM.from_pretrained(release.model_path)
    assert model.config.model_type == "qwen3"
    hidden = model.config.hidden_size
    assert hidden & (hidden - 1) == 0
    assert model.config.tie_word_embeddings

    spec = load_model_manifest(release.model_path).spec
    catalog = load_catalog(release.catalog_path)
    builder = prompt_builder(
        spec.prompt, spec.item_tokens, AutoTokenizer.from_pretrained(release.model_path)
    )
    engine = load_engine(release.model_path, spec.item_tokens, device="cpu")
    assert builder.max_prompt_tokens <= engine.max_prompt_tokens
    known = ItemPart(tuple(catalog.codes_of(torch.tensor([3]))[0].tolist()))
    prompts = [builder.build(parts) for parts in ([], [TextPart("likes matte lipstick"), known])]
    requests = [SearchRequest(p.token_ids, beam_width=10, top_k=10) for p in prompts]
    for result in engine.search(requests, catalog.trie).results:
        assert len(result.hits) == 10


def test_a_release_that_is_there_is_used_again(tiny_store, tiny_data, tiny_recipe, release):
    stages = []
    again = build_release(tiny_data, tiny_store, tiny_recipe, BuildEvents(stage=stages.append))
    assert again == release.path
    assert len(stages) == 1
    assert "built before" in stages[0]


@pytest.mark.parametrize("change", ["seed", "epochs", "data"])
def test_another_recipe_or_other_data_is_another_release(
    change, tiny_store, tiny_data, tiny_recipe
):
    data, recipe = tiny_data, tiny_recipe
    if change == "seed":
        recipe = replace(recipe, seed=1)
    elif change == "epochs":
        recipe = replace(recipe, train=replace(recipe.train, epochs=2))
    else:
        data = replace(data, sequences=data.sequences[1:])
    assert find_release(tiny_store, recipe_key(tiny_recipe, tiny_data)) is not None
    assert find_release(tiny_store, recipe_key(recipe, data)) is None


def test_the_same_recipe_gives_the_same_weights(tmp_path, tiny_data, tiny_recipe, release):
    other = load_release(build_release(tiny_data, tmp_path, tiny_recipe))
    assert other.catalog_version == release.catalog_version
    assert other.model_version == release.model_version


def test_a_damaged_release_is_named(tmp_path, tiny_store, tiny_data, tiny_recipe):
    out = tmp_path / "store"
    shutil.copytree(tiny_store, out)
    weights = next((out / "models").glob("*/model.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(bytes(content))
    with pytest.raises(ArtifactError, match=r"model\.safetensors"):
        build_release(tiny_data, out, tiny_recipe)


def test_data_without_a_usable_user_is_refused(tmp_path, tiny_data, tiny_recipe):
    data = replace(tiny_data, sequences=((0, 1), (2,)))
    with pytest.raises(ValueError, match="none of the 2 users has three items"):
        build_release(data, tmp_path, tiny_recipe)
    assert not list(tmp_path.iterdir())


def test_bad_recipes_are_refused():
    with pytest.raises(ValueError, match="hidden_size is 96; it must be a power of two"):
        ModelSize(hidden_size=96)
    with pytest.raises(ValueError, match="a prompt holds 20 items, so at most 21"):
        DemoRecipe(augmentation=Augmentation(max_items=22))
