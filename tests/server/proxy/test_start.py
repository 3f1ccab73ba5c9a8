"""What stops the start, and the embedding table alone."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
import torch
import typer
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rectokens.artifacts.model import RetrievalSpec
from rectokens.artifacts.open_store import open_release_store
from rectokens.prompts.recipe import PromptRecipe
from rectokens.turboquant import DEFAULT_CODEC
from server.flags import proxy_fields
from server.proxy.embedding_table import EmbeddingTable, open_embedding_table
from server.proxy.encoder import EmbedsEncoder
from server.proxy.errors import ProxyError
from server.proxy.run import run_proxy
from server.proxy.service import load_proxy
from server.settings import SettingsError, load_settings, setting_fields
from tests.waiting import LIMIT_S

ROOT = Path(__file__).parents[3]
IDS = [3, 0, 9, 3]


def expected(lm):
    with torch.inference_mode():
        return lm.get_input_embeddings()(torch.tensor(IDS))


@pytest.mark.parametrize("kind", ["qwen3", "llama", "gemma2"])
@pytest.mark.parametrize("sharded", [False, True])
def test_the_table_is_what_the_layer_gives(tiny_lm, tmp_path, kind, sharded):
    lm = tiny_lm(kind)
    lm.save_pretrained(tmp_path, max_shard_size="20KB" if sharded else "1GB")
    assert (tmp_path / "model.safetensors.index.json").exists() == sharded
    table = open_embedding_table(tmp_path)
    assert (table.vocab_size, table.hidden_size) == (64, 32)
    assert torch.equal(table.embed(IDS), expected(lm))


def test_a_layer_that_scales_is_followed(tmp_path):
    from transformers import AutoModelForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(
        vocab_size=40, hidden_size=32, intermediate_size=32, num_hidden_layers=1, head_dim=8
    )
    lm = AutoModelForCausalLM.from_config(config).bfloat16()
    lm.save_pretrained(tmp_path)
    table = open_embedding_table(tmp_path)
    assert table.scale == 32**0.5
    assert torch.equal(table.embed(IDS), expected(lm))


def test_tied_embeddings_under_the_name_of_the_head(tiny_lm, tmp_path):
    lm = tiny_lm("qwen3")
    lm.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["lm_head.weight"] = weights.pop("model.embed_tokens.weight")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(open_embedding_table(tmp_path).embed(IDS), expected(lm))


def test_other_words_in_front_of_the_name(tiny_lm, tmp_path):
    lm = tiny_lm("llama")
    lm.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights = {f"language_model.{name}": weight for name, weight in weights.items()}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(open_embedding_table(tmp_path).embed(IDS), expected(lm))


def test_the_table_is_mapped_not_read(tmp_path, tiny_lm):
    """Its memory belongs to the file: what others write there is seen."""
    lm = tiny_lm("llama")
    lm.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    table = open_embedding_table(tmp_path)
    row = lm.get_input_embeddings().weight[9].detach()
    place = path.read_bytes().index(row.numpy().tobytes())
    with path.open("r+b") as file:
        file.seek(place)
        file.write(bytes(row.numel() * 4))
    assert table.embed([9]).abs().sum() == 0


def test_folders_without_embeddings_are_refused(tiny_lm, tmp_path):
    lm = tiny_lm("llama")
    lm.save_pretrained(tmp_path / "good")

    def broken(name):
        return Path(shutil.copytree(tmp_path / "good", tmp_path / name))

    with pytest.raises(ProxyError, match="nowhere"):
        open_embedding_table(tmp_path / "nowhere")
    folder = broken("weights")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ProxyError, match="no readable safetensors weights"):
        open_embedding_table(folder)
    folder = broken("truncated")
    os.truncate(folder / "model.safetensors", 100)
    with pytest.raises(ProxyError, match="truncated"):
        open_embedding_table(folder)
    folder = broken("without")
    save_file({"lm_head.weight": torch.ones(64, 32)}, folder / "model.safetensors")
    with pytest.raises(ProxyError, match=r"has no weight model.embed_tokens.weight"):
        open_embedding_table(folder)
    folder = broken("shape")
    save_file({"model.embed_tokens.weight": torch.ones(64, 16)}, folder / "model.safetensors")
    with pytest.raises(ProxyError, match=r"\(64, 16\).*\(64, 32\)"):
        open_embedding_table(folder)
    folder = broken("index")
    index = {"weight_map": {"model.embed_tokens.weight": "../good/model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ProxyError, match="plain name"):
        open_embedding_table(folder)
    folder = broken("config")
    (folder / "config.json").write_text('{"model_type": "no_such_model"}')
    with pytest.raises(ProxyError, match="no causal LM that is known"):
        open_embedding_table(folder)


@pytest.mark.parametrize("hidden", [96, 100])
def test_a_size_that_cannot_be_compressed_names_none(hidden):
    table = EmbeddingTable(torch.ones(4, hidden))
    with pytest.raises(ProxyError, match=f"hidden size {hidden} .*embedding_compression to none"):
        EmbedsEncoder(table, "turboquant", 4)
    assert EmbedsEncoder(table, "none", 4).encode([1]).tokens == 1


def test_sizes_between_powers_of_two_use_the_block_codec():
    encoder = EmbedsEncoder(EmbeddingTable(torch.ones(4, 1_536)), "turboquant", 4)
    encoder.warm_up()
    assert encoder.encode([1, 2]).plain_bytes == 2 * 1_536 * 4 * 4 // 3


def test_serve_with_proxy_warms_up_before_it_serves(store, monkeypatch):
    """The first compressed prompt waits for no kernel to be compiled."""
    from server.cli import serve_until_signal

    seen = []

    def run_service(settings, load, on_ready, mounted):
        seen.append(("serves", mounted.hidden_size))
        return 0

    monkeypatch.setattr(
        "server.proxy.encoder.warmup_encode",
        lambda size, bits, *, codec: seen.append(("warms up", size, bits, codec)),
    )
    monkeypatch.setattr("server.run.run_service", run_service)
    flags = {
        "model": str(store.model),
        "catalog": str(store.catalog),
        "with_proxy": "true",
        "proxy.upstream": "http://x",
        "proxy.embedding_bits": "8",
    }
    with pytest.raises(typer.Exit) as ended:
        serve_until_signal(load_settings(flags))
    assert ended.value.exit_code == 0
    size = store.lm.config.hidden_size
    assert seen == [("warms up", size, 8, DEFAULT_CODEC), ("serves", size)]


@pytest.mark.parametrize(
    ("url", "part"),
    [
        (None, "--upstream"),
        ("localhost:8000", "http://"),
        ("ftp://x", "http://"),
        ("http://user:SECRET@x", "no user"),
        ("http://", "http://"),
        ("http://x:99999999", "http://"),
    ],
)
def test_a_bad_upstream_is_said(store, url, part):
    settings = load_settings({"proxy.upstream": url})
    with pytest.raises(ProxyError, match=part) as error:
        load_proxy(settings, store.model, None)
    assert "SECRET" not in str(error.value)


def test_a_model_or_a_catalog_that_does_not_fit(store, tmp_path, tiny_lm):
    settings = load_settings({"proxy.upstream": "http://x"})
    with pytest.raises(ProxyError, match="give --model"):
        load_proxy(settings, None, None)
    with pytest.raises(ProxyError, match=r"config\.json"):
        load_proxy(settings, tmp_path, None)
    tiny_lm("llama").save_pretrained(tmp_path)
    with pytest.raises(ProxyError, match="no tokenizer"):
        load_proxy(settings, tmp_path, None)
    with pytest.raises(ProxyError, match=r"generative_retrieval\.json"):
        load_proxy(settings, tmp_path, store.catalog)


def test_the_compression_has_another_name(monkeypatch):
    monkeypatch.setenv("SGP_EMBEDDING_COMPRESSION", "none")
    assert load_settings().proxy.embedding_compression == "none"
    assert load_settings({"proxy.embedding_bits": "8"}).proxy.embedding_compression == "none"
    flags = {"proxy.embedding_compression": "turboquant"}
    assert load_settings(flags).proxy.embedding_compression == "turboquant"
    monkeypatch.setenv("RECTOKENS_PROXY__EMBEDDING_COMPRESSION", "turboquant")
    assert load_settings().proxy.embedding_compression == "turboquant"
    monkeypatch.delenv("RECTOKENS_PROXY__EMBEDDING_COMPRESSION")
    monkeypatch.setenv("SGP_EMBEDDING_COMPRESSION", "zip")
    with pytest.raises(SettingsError, match=r"'zip'.*SGP_EMBEDDING_COMPRESSION"):
        load_settings()


@pytest.mark.parametrize("bits", ["3", "0", "16"])
def test_bits_are_1_2_4_or_8(bits):
    with pytest.raises(SettingsError, match="EMBEDDING_BITS"):
        load_settings({"proxy.embedding_bits": bits})


def command(*arguments, **kwargs):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RECTOKENS_")}
    return subprocess.Popen(
        [sys.executable, "-m", "server", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**environment, "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
    )


def test_help_has_every_setting_under_both_names():
    out, _ = command("proxy", "--help").communicate(timeout=LIMIT_S)
    for field, names in proxy_fields().items():
        for name in (field.flag, *(f"--{name}" for name in names)):
            assert name in out


@pytest.mark.parametrize(
    ("arguments", "code", "part"),
    [
        (["proxy"], 2, "give --upstream, and --model or --store.path"),
        (["proxy", "--upstream", "http://x", "--store.path", "s", "--model", "m"], 2, "leave out"),
        (["proxy", "--upstream", "http://x", "--model", "nowhere"], 1, "nowhere"),
        (["proxy", "--embedding-bits", "3"], 2, "RECTOKENS_PROXY__EMBEDDING_BITS"),
        (["serve", "--with-proxy", "--model", "nowhere", "--catalog", "x"], 1, "nowhere"),
    ],
)
def test_what_stops_the_start_is_one_message(arguments, code, part):
    process = command(*arguments)
    _, err = process.communicate(timeout=LIMIT_S)
    assert process.returncode == code
    assert part in err
    assert "Traceback" not in err


def in_a_store(store, root):
    """A copy of the model and the catalog, the active release of a store."""
    shutil.copytree(store.model.parent, root / "models")
    shutil.copytree(store.catalog.parent, root / "catalogs")
    releases = open_release_store(root)
    releases.activate(releases.bind(store.model.name, store.catalog.name))
    return root


def test_a_store_without_a_release_that_can_be_used_stops_the_start(store, tmp_path):
    settings = load_settings({"proxy.upstream": "http://x", "store.path": str(tmp_path / "s")})
    with pytest.raises(ProxyError, match=f"no release is active in the store {tmp_path / 's'}"):
        run_proxy(settings)
    root = in_a_store(store, tmp_path / "s")
    (root / "models" / store.model.name / "config.json").unlink()
    with pytest.raises(ProxyError, match=r"config\.json"):
        run_proxy(settings)


@pytest.mark.parametrize("named", ["folders", "store"])
def test_a_life_from_start_to_sigterm(store, tmp_path, named):
    """Listening, answering, ending with 0; neither prompts nor keys are in the log."""
    if named == "folders":
        what = ("--model", store.model, "--catalog", store.catalog)
    else:
        what = ("--store.path", in_a_store(store, tmp_path / "store"))
    process = command(
        *("proxy", "--upstream", "http://127.0.0.1:9", "--port", "0", *what),
        *("--log-level", "debug", "--forward-authorization"),
    )
    lines = []
    try:
        for line in process.stderr:
            lines.append(json.loads(line) if line.startswith("{") else {"event": line})
            if lines[-1]["event"] == "listening":
                break
        assert "port" in lines[-1], lines
        url = f"http://127.0.0.1:{lines[-1]['port']}"
        headers = {"Authorization": "Bearer SECRETKEY"}
        body = {"prompt": "matte <item:B001>"}
        response = httpx.post(f"{url}/v1/completions", json=body, headers=headers, timeout=LIMIT_S)
        assert response.json()["error"]["code"] == "upstream_unreachable"
    finally:
        process.send_signal(signal.SIGTERM)
        _, rest = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0
    log = json.dumps(lines) + rest
    assert '"hidden_size": 32' in log
    for secret in ("SECRETKEY", "matte", "B001"):
        assert secret not in log


def test_the_page_names_only_flags_that_exist():
    page = (ROOT / "docs" / "proxy.md").read_text()
    known = {f"--{name}" for names in proxy_fields().values() for name in names}
    known |= {field.flag for field in setting_fields()} | {"--out", "--no-serve"}
    flags = set(re.findall(r"--[a-z][a-z.-]*[a-z]", page)) - {"--enable-prompt-embeds"}
    assert flags <= known, flags - known
    variables = set(re.findall(r"RECTOKENS_[A-Z_]+[A-Z]", page))
    assert variables <= {field.env for field in setting_fields()}


def test_item_tokens_that_are_words_of_the_tokenizer_stay_out_of_text(mock_tools):
    """Taken off the special tokens they would be found as words; that is an error, not an item."""
    from server.errors import ServiceError
    from server.proxy.prompts import ProxyPrompts

    tokenizer = mock_tools.make_tokenizer()
    item = tokenizer.item_tokens
    recipe = PromptRecipe("interleaved", 1, {})
    prompts = ProxyPrompts(tokenizer, RetrievalSpec("ab" * 32, item, recipe), None)
    ids = prompts.completion("a <item_L0_C1> b", "prompt", add_special_tokens=True)
    assert list(ids) == [9, 0, 10]

    words = {**tokenizer.get_vocab()}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(["<item_L0_C1>", "</s>"])
    made = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    prompts = ProxyPrompts(made, RetrievalSpec("ab" * 32, item, recipe), None)
    assert list(prompts.completion("a </s>", "prompt", add_special_tokens=True)) == [9, 2]
    with pytest.raises(ServiceError, match="name items as <item:ID>"):
        prompts.completion("a <item_L0_C1> b", "prompt", add_special_tokens=True)
