"""A small data set in the folder layout."""

from __future__ import annotations

import gzip
import json

import gin
import numpy as np
import pytest


def write_data(folder, *, num_items=40, num_users=30, dim=8, seed=0, short_users=2):
    """Users walk through neighbouring items; some have fewer than three."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    with gzip.open(folder / "items.jsonl.gz", "wt", encoding="utf-8") as file:
        for number in range(1, num_items + 1):
            item = {
                "id": number,
                "asin": f"B{number:03d}",
                "text": f"title: thing {number}; categories: A > B{number % 4}",
                "title": f"thing {number}",
                "categories": ["A", f"B{number % 4}"],
            }
            file.write(json.dumps(item) + "\n")
    vectors = rng.normal(size=(num_items, dim))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    np.save(folder / "embeddings.f16.npy", vectors.astype(np.float16))
    with gzip.open(folder / "sequences.txt.gz", "wt", encoding="utf-8") as file:
        for user in range(1, num_users + 1):
            length = 2 if user <= short_users else int(rng.integers(3, 26))
            items = rng.permutation(num_items)[:length] + 1
            file.write(" ".join(map(str, [user, *items])) + "\n")
    return folder


@pytest.fixture(scope="module", autouse=True)
def _one_script(request):
    """As in a program of its own: scripts that this test file is not of are unknown to gin.

    Several call their entry ``train`` or ``main``, and a file that says ``train.root`` would be
    ambiguous once two of them are imported.
    """
    tested = {getattr(request.module, name, None) for name in ("train", "main")} - {None}
    registry = gin.config._REGISTRY
    hidden = {
        selector: entry
        for selector, entry in list(registry.items())
        if tested
        and selector.rsplit(".", 1)[-1] in ("train", "main")
        and entry.wrapper not in tested
    }
    for selector in hidden:
        registry.pop(selector)
    yield
    for selector, entry in hidden.items():
        registry[selector] = entry
    gin.clear_config()


@pytest.fixture
def data_root(tmp_path):
    """A root that holds ``amazon-beauty``: 40 items, 30 users, 2 of them with two items only."""
    write_data(tmp_path / "amazon-beauty")
    return tmp_path


@pytest.fixture(scope="session")
def data_folder_writer():
    return write_data


CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def chat_tokenizer():
    """A small text tokenizer with a chat template that writes more than the messages."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=["<pad>"], show_progress=False
    )
    backend.train_from_iterator(["title: thing 1; categories: A > B1", "oldest first:"], trainer)
    names = ("<|im_start|>", "<|im_end|>")
    backend.add_special_tokens([AddedToken(n, special=True, normalized=False) for n in names])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<|im_end|>"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@pytest.fixture
def chat_model(chat_tokenizer, tmp_path):
    """A folder with that tokenizer."""
    folder = tmp_path / "chat_model"
    chat_tokenizer.save_pretrained(folder)
    return folder
