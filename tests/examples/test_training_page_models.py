"""What docs/training.md says of models: its commands in their order, on a small slice of data."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import gin
import httpx
import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from tests.ports import port_to_come
from tests.waiting import LIMIT_S, ended, wait_until

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "training.md"

SCRATCH = """
train.progress_bar = False
train.device = "cpu"
CodesSettings.num_levels = 2
CodesSettings.codebook_size = 8
CodesSettings.behaviour_dims = 4
ModelSettings.hidden_size = 16
ModelSettings.num_layers = 1
ModelSettings.num_heads = 2
ModelSettings.intermediate_size = 32
ModelSettings.max_items = 6
OptimizerSettings.epochs = 2
OptimizerSettings.batch_size = 16
ValidationSettings.beam_width = 20
ValidationSettings.every_epochs = 2
"""
TOKENIZER = "train.num_levels = 2\ntrain.codebook_size = 8\ntrain.num_epochs = 2\n"
CHATS = """
main.num_levels = 2
main.codebook_size = 8
main.model_name = "chat_model"
main.max_seq_len = 6
main.max_length = 600
"""
FINETUNE = """
train.model_name = "chat_model"
train.num_levels = 2
train.codebook_size = 8
train.num_epochs = 1
train.max_length = 600
train.bf16 = False
train.device = "cpu"
train.eval_every = 5
train.item_eval_examples = 4
train.progress_bar = False
"""
# What makes each configuration small; all else is as on the page.
SMALL = {
    "scratch_beauty.gin": SCRATCH,
    "scratch_beauty_cpu.gin": SCRATCH,
    "eval_release_beauty.gin": "main.base_url = {url!r}\nmain.num_examples = 5\n",
    "train_rqkmeans_beauty.gin": TOKENIZER,
    "precompute_sequences_beauty.gin": CHATS,
    "finetune_qwen_beauty.gin": FINETUNE,
    "eval_retrieval_beauty.gin": "main.num_examples = 4\n",
    "eval_prompts_beauty.gin": """
main.num_levels = 2
main.codebook_size = 8
main.max_new_tokens = 4
main.prompts = ("hello",)
""",
}


def commands() -> list[list[str]]:
    """Those that models are made, served and measured with."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    wanted = [words for words in map(shlex.split, lines) if words[:2] == ["python", "-m"]]
    return [
        words
        for words in wanted
        if words[2] == "server" or (len(words) == 4 and Path(words[3]).name in SMALL)
    ]


@pytest.fixture
def place(tmp_path, monkeypatch, data_folder_writer, chat_tokenizer):
    """A folder that looks like a checkout with data and a chat model."""
    data_folder_writer(tmp_path / "data" / "amazon" / "amazon-beauty")
    config = Qwen3Config(
        vocab_size=len(chat_tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    )
    Qwen3ForCausalLM(config).save_pretrained(tmp_path / "chat_model")
    chat_tokenizer.save_pretrained(tmp_path / "chat_model")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def small_config(path: str, url: str, place: Path) -> str:
    out = place / "configs" / Path(path).name
    out.parent.mkdir(exist_ok=True)
    text = (ROOT / path).read_text() + SMALL[out.name].format(url=url)
    out.write_text(text)
    return str(out)


def run_script(module: str, words: list[str]) -> None:
    """As the command would, without a process of its own, which costs seconds to start."""
    from examples.utils import run

    script = importlib.import_module(module)
    entry = getattr(script, "train", None) or script.main
    registry = gin.config._REGISTRY
    others = {
        selector: known
        for selector, known in list(registry.items())
        if selector.rsplit(".", 1)[-1] in ("train", "main") and known.wrapper is not entry
    }
    for selector in others:
        registry.pop(selector)
    try:
        run(entry, words)
    finally:
        for selector, known in others.items():
            registry[selector] = known
        gin.clear_config()


@contextmanager
def served(words: list[str]):
    port = port_to_come()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    flags = ["--host", "127.0.0.1", "--port", str(port)]
    with open("server.log", "wb") as log:
        process = subprocess.Popen(
            [sys.executable, *words[1:], *flags], env=environment, stdout=log, stderr=log
        )
    url = f"http://127.0.0.1:{port}"
    try:

        def is_ready():
            assert process.poll() is None, Path("server.log").read_text()[-2000:]
            try:
                answer = httpx.get(f"{url}/ready", trust_env=False, timeout=LIMIT_S)
            except httpx.TransportError:
                return False
            return answer.status_code == 200

        wait_until(is_ready, lambda: Path("server.log").read_text()[-2000:])
        yield url
    finally:
        process.send_signal(signal.SIGTERM)
        ended(process, lambda: Path("server.log").read_text()[-2000:])


@pytest.mark.slow
def test_the_commands_of_models(place):
    remaining = commands()
    assert {Path(words[-1]).name for words in remaining} >= set(SMALL)
    url = ""
    while remaining:
        words = remaining.pop(0)
        if words[2] == "server":
            with served(words) as url:
                # What stands behind it in the same block is for the server.
                if remaining and remaining[0][2].endswith("eval_retrieval"):
                    asked = remaining.pop(0)
                    run_script(asked[2], [small_config(asked[3], url, place)])
                else:
                    body = {"history": ["B001"], "top_k": 3}
                    answer = httpx.post(
                        f"{url}/v1/recommend", json=body, trust_env=False, timeout=LIMIT_S
                    )
                    assert len(answer.json()["items"]) == 3
        else:
            run_script(words[2], [small_config(words[3], url, place)])
    assert torch.get_num_threads() == 1
    for name in ("release_beauty", "retrieval_beauty"):
        assert (place / "out" / "evaluation" / f"{name}.json").is_file()
