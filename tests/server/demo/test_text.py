"""The small text tokenizer, and the words for an item."""

from __future__ import annotations

import numpy as np
import pytest

from server.demo.text import BOS_TOKEN, PAD_TOKEN, describe, fit_text_tokenizer

TEXTS = ["Matte Lipstick by Alba", "matte lipstick, rose", "Curl shampoo"] * 5


def test_any_text_has_tokens_and_comes_back():
    tokenizer = fit_text_tokenizer(TEXTS, 300)
    assert len(tokenizer) <= 300
    for text in ("matte lipstick", "crème brûlée 口紅 🙂"):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.decode(ids).strip() == text
    assert tokenizer.encode("MATTE") == tokenizer.encode("matte")
    # Merges were learnt: the frequent word takes fewer tokens than it has letters.
    assert len(tokenizer.encode("lipstick", add_special_tokens=False)) < 8
    assert {tokenizer.bos_token, tokenizer.pad_token} == {BOS_TOKEN, PAD_TOKEN}


def test_a_vocabulary_too_small_for_bytes_is_refused():
    with pytest.raises(ValueError, match="vocab_size is 200; it must be at least 258"):
        fit_text_tokenizer(TEXTS, 200)


def test_descriptions_say_what_is_known():
    rng = np.random.default_rng(0)
    said = {describe("Alba Rose", "Alba", "Makeup > Lipstick > Matte", rng) for _ in range(200)}
    assert said == {
        "likes matte lipstick",
        "matte lipstick",
        "matte",
        "Alba matte",
        "Alba Rose",
    }
    assert describe("", "Alba", "", rng) == "Alba"
    assert describe("", "", "", rng) == ""
