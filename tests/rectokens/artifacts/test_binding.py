"""A model and a catalog are used together only if they belong together."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest

from rectokens.artifacts.binding import check_binding
from rectokens.artifacts.errors import ArtifactError
from rectokens.artifacts.model import RetrievalSpec


def fitting(spec: RetrievalSpec, **changes) -> SimpleNamespace:
    values = {
        "tokenizer_fingerprint": spec.tokenizer_fingerprint,
        "num_levels": 3,
        "codebook_size": 8,
    }
    return SimpleNamespace(**{**values, **changes})


def test_a_pair_that_fits(spec: RetrievalSpec):
    check_binding(spec, fitting(spec))


def test_both_values_are_named(spec: RetrievalSpec):
    with pytest.raises(ArtifactError, match="num_levels 3 of the model is not 4 of the catalog"):
        check_binding(spec, fitting(spec, num_levels=4))
    with pytest.raises(ArtifactError, match="codebook_size 8 of the model is not 16"):
        check_binding(spec, fitting(spec, codebook_size=16))
    other = "0" * 64
    with pytest.raises(ArtifactError, match=rf"{spec.tokenizer_fingerprint} of .* {other} of"):
        check_binding(spec, fitting(spec, tokenizer_fingerprint=other))


def test_only_the_fingerprint_can_be_overridden(spec: RetrievalSpec):
    other = dataclasses.replace(spec, tokenizer_fingerprint="0" * 64)
    check_binding(other, fitting(spec), allow_other_tokenizer=True)
    with pytest.raises(ArtifactError, match="num_levels"):
        check_binding(other, fitting(spec, num_levels=4), allow_other_tokenizer=True)
