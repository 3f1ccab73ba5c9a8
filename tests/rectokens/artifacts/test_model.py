"""A model artifact is a plain transformers folder that says how it speaks of items."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from rectokens.artifacts.errors import ArtifactError
from rectokens.artifacts.json_fields import JsonObject
from rectokens.artifacts.manifest import ParentRef, read_manifest, write_artifact
from rectokens.artifacts.model import RetrievalSpec, load_model_manifest, save_model


def rewrite(folder: Path, root: Path, **files: str | bytes | None) -> Path:
    """The same artifact with some files changed (None: left out), its manifest in order."""

    def populate(target: Path) -> None:
        for path in folder.iterdir():
            if path.name != "manifest.json":
                (target / path.name).write_bytes(path.read_bytes())
        for name, content in files.items():
            path = target / name.replace("__", ".")
            if content is None:
                path.unlink()
            else:
                path.write_bytes(content.encode() if isinstance(content, str) else content)

    return write_artifact(root, "model", populate, parents=read_manifest(folder).parents)


def test_transformers_alone_loads_the_folder(model_folder: Path, causal_lm):
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    ids = torch.tensor([[1, 5, 28]])
    torch.testing.assert_close(loaded(ids).logits, causal_lm(ids).logits)


def test_spec_comes_back(model_folder: Path, spec: RetrievalSpec):
    artifact = load_model_manifest(model_folder)
    assert artifact.spec == spec
    assert artifact.manifest.version == model_folder.name
    assert artifact.manifest.numbers["recall"] == 0.5
    assert artifact.manifest.numbers["vocab_size"] == 32
    assert artifact.manifest.parents["tokenizer"].fingerprint == spec.tokenizer_fingerprint
    assert artifact.path == model_folder


def test_saving_the_same_model_again_gives_the_same_version(
    tmp_path: Path, model_folder: Path, causal_lm, spec: RetrievalSpec
):
    assert save_model(tmp_path / "elsewhere", causal_lm, spec).name == model_folder.name


def test_the_text_tokenizer_travels_along(tmp_path: Path, causal_lm, spec: RetrievalSpec):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({"<unk>": 0, "lipstick": 1}, unk_token="<unk>"))
    text_tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
    folder = save_model(tmp_path, causal_lm, spec, text_tokenizer=text_tokenizer)
    load_model_manifest(folder)
    loaded = PreTrainedTokenizerFast.from_pretrained(folder)
    assert loaded("lipstick")["input_ids"] == [1]


def test_an_item_aware_model_is_saved_as_the_model_inside(
    tmp_path: Path, model_folder: Path, causal_lm, spec: RetrievalSpec
):
    class Wrapper(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = causal_lm

        class config:  # noqa: N801
            model_type = "item_aware_causal_lm"

    assert save_model(tmp_path / "wrapped", Wrapper(), spec).name == model_folder.name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"offset": 30}, "ids up to 53, but the model's input embedding has only 32 tokens"),
        ({"start_token_id": 32}, "token ids up to 32"),
        ({"end_token_id": 33}, "token ids up to 33"),
        ({"start_token_id": 13}, "start_token_id is 13, which is also the token of level 1, code"),
        ({"end_token_id": 4}, "end_token_id is 4, which is also the token of level 0, code 0"),
    ],
)
def test_token_ids_that_cannot_be_right_are_not_saved(
    tmp_path: Path, causal_lm, spec: RetrievalSpec, changes, message: str
):
    tokens = dataclasses.replace(spec.item_tokens, **changes)
    with pytest.raises(ArtifactError, match=message):
        save_model(tmp_path, causal_lm, dataclasses.replace(spec, item_tokens=tokens))
    assert list(tmp_path.iterdir()) == []


def test_a_parent_of_another_fingerprint_is_refused(tmp_path, causal_lm, spec):
    with pytest.raises(ArtifactError, match="parent tokenizer has fingerprint"):
        save_model(tmp_path, causal_lm, spec, parents={"tokenizer": ParentRef("v", "0" * 64)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("prompt"), "lacks the field 'prompt'"),
        (lambda c: c.update(colour="red"), "unknown fields 'colour'"),
        (lambda c: c["prompt"].update(extra=1), "prompt has unknown fields 'extra'"),
        (lambda c: c["prompt"].update(version="1"), "version is '1'; expected an integer"),
        (lambda c: c["prompt"].update(version=0), "version is 0"),
        (lambda c: c["prompt"].update(params=[]), r"params is \[\]; expected an object"),
        (lambda c: c.update(num_levels=0), "num_levels is 0; expected an integer from 1"),
        (lambda c: c.update(num_levels=3.0), "num_levels is 3.0"),
        (lambda c: c.update(num_levels=True), "num_levels is True"),
        (lambda c: c.update(codebook_size=70_000), "codebook_size is 70000"),
        (lambda c: c.update(codebook_size=9), "level_stride is 8; it must be at least"),
        (lambda c: c.update(tokenizer_fingerprint="abc"), "tokenizer_fingerprint is 'abc'"),
        (lambda c: c["item_tokens"].update(offset=-1), "offset is -1"),
        (lambda c: c["item_tokens"].update(offset=10), "which is also the token of level 2"),
        (lambda c: c["format"].update(version=2), "format version is 2; understood are 1"),
        (lambda c: c["format"].update(name="x"), "format is 'x'"),
    ],
)
def test_a_malformed_spec_is_refused(spec: RetrievalSpec, change, message: str):
    content = json.loads(json.dumps(spec.to_json()))
    RetrievalSpec.from_json(JsonObject(content, "spec"))
    change(content)
    with pytest.raises(ArtifactError, match=message):
        RetrievalSpec.from_json(JsonObject(content, "spec"))


def test_a_model_without_end_token(spec: RetrievalSpec):
    tokens = dataclasses.replace(spec.item_tokens, end_token_id=None)
    endless = dataclasses.replace(spec, item_tokens=tokens)
    assert RetrievalSpec.from_json(JsonObject(endless.to_json(), "spec")) == endless


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"pytorch_model__bin": b"x"}, "may be a pickle"),
        ({"generative_retrieval__json": None}, r"lacks generative_retrieval\.json"),
        ({"config__json": None}, r"lacks config\.json"),
        ({"model__safetensors": None}, "has no weights"),
        ({"config__json": '{"vocab_size": 28}'}, "up to 29, but .*config.json has only 28"),
        ({"config__json": '{"text_config": {"vocab_size": 9}}'}, "has only 9"),
        ({"generative_retrieval__json": "{"}, "not valid JSON"),
    ],
)
def test_folders_that_are_no_usable_model(tmp_path, model_folder, files, message: str):
    folder = rewrite(model_folder, tmp_path / "broken", **files)
    with pytest.raises(ArtifactError, match=message):
        load_model_manifest(folder)


def test_a_configuration_may_hold_infinities_elsewhere(tmp_path, model_folder):
    folder = rewrite(
        model_folder,
        tmp_path / "other",
        config__json='{"vocab_size": 32, "time_step_limit": [0.0, Infinity]}',
    )
    load_model_manifest(folder)


def test_damaged_weights_are_noticed(model_folder: Path):
    weights = model_folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(ArtifactError, match=r"model\.safetensors has SHA-256"):
        load_model_manifest(model_folder)
    load_model_manifest(model_folder, verify_checksums=False)
