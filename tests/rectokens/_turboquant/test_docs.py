"""The numbers written out for decoders in other languages are the ones the library uses."""

import re
from pathlib import Path

import pytest
import torch

from rectokens._turboquant.lloyd_max import codebook
from rectokens._turboquant.signs import sign_words
from rectokens.turboquant import BLOCK_CODEC, DEFAULT_CODEC, TurboQuantMSE

DOCS = (Path(__file__).parents[3] / "docs" / "turboquant.md").read_text()


def test_codecs():
    assert f"`{DEFAULT_CODEC}` (the default)" in DOCS
    assert f"`{BLOCK_CODEC}`" in DOCS


def test_sign_words():
    for round_index, count in ((0, 3), (1, 2)):
        for word in sign_words(42, round_index, count):
            assert f"`{int(word):016x}`" in DOCS


def test_centroids():
    line = next(line for line in DOCS.splitlines() if re.fullmatch(r"`(\d\.\d{6}\s*){8}`", line))
    written = [float(number) for number in line.strip("`").split()]
    assert written == pytest.approx(codebook(4096, 4)[0][8:], abs=5e-7)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_packed_bytes(bits):
    packed, _ = TurboQuantMSE(16, bits).encode(torch.arange(16) * 37 % 101 - 50.0)
    assert f"| {bits} | `{packed.numpy().tobytes().hex()}` |" in DOCS
