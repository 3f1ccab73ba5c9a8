"""Payloads that a decoder must refuse, each made of the bytes that do the harm."""

from __future__ import annotations

import base64
import io
import os
import zipfile
from typing import Any

import torch

from rectokens.prompt_embeds import dump_payload
from rectokens.turboquant import encode_embeddings, packed_dim


def _text(value: Any, **options: Any) -> str:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return base64.b64encode(buffer.getvalue()).decode()


class _Command:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("echo this must never run",)


def _deflated(text: str) -> str:
    """The same archive with its members compressed."""
    source = zipfile.ZipFile(io.BytesIO(base64.b64decode(text)))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    return base64.b64encode(buffer.getvalue()).decode()


def bad_payloads(hidden_size: int, max_tokens: int) -> dict[str, str]:
    """Name and text of each bad ``prompt_embeds`` field for a model of that size."""
    x = torch.randn(4, hidden_size, generator=torch.Generator().manual_seed(0))
    packed, norms = encode_embeddings(x, 4)
    good = {"packed": packed, "norms": norms, "bits": 4, "d": hidden_size}
    codec = "tq1/hd2/lsb/seed43"
    long = torch.zeros(max_tokens + 1, hidden_size)
    other = torch.randn(4, 2 * hidden_size)
    bad_norms = {"NaN": float("nan"), "infinite": float("inf"), "negative": -1.0}
    bad: dict[str, Any] = {
        "a key too many": {**good, "extra": 1},
        "a key too few": {k: v for k, v in good.items() if k != "norms"},
        "another codec": {**good, "codec": codec},
        "bits that are a bool": {**good, "bits": True},
        "bits of 3": {**good, "bits": 3},
        "packed rows too short": {**good, "packed": packed[:, :-1].clone()},
        "packed of another type": {**good, "packed": packed.float()},
        "norms of another length": {**good, "norms": norms[:-1].clone()},
        "norms of another type": {**good, "norms": norms.double()},
        "no tokens": {
            **good,
            "packed": torch.zeros(0, packed_dim(hidden_size, 4), dtype=torch.uint8),
            "norms": torch.zeros(0),
        },
        "a view that is larger than its storage": torch.zeros(1, 1).expand(64, hidden_size),
        "a transposed view": torch.zeros(hidden_size, 4).T,
        "a sparse tensor": torch.eye(4, hidden_size).to_sparse(),
        "a list": [x],
        "a command in the pickle": {**good, "packed": _Command()},
    }
    texts = {name: _text(value) for name, value in bad.items()}
    for name, value in bad_norms.items():
        texts[f"{name} norms"] = _text({**good, "norms": torch.full_like(norms, value)})
    texts["another hidden size"] = dump_payload(*encode_embeddings(other, 4), 4, 2 * hidden_size)
    texts["more tokens than the model takes"] = dump_payload(
        *encode_embeddings(long, 4), 4, hidden_size
    )
    texts["not base64"] = "&&&&"
    texts["not an archive"] = base64.b64encode(b"no archive at all").decode()
    texts["the legacy format"] = _text(good, _use_new_zipfile_serialization=False)
    texts["compressed members"] = _deflated(_text(good))
    texts["a body over the limit"] = "A" * (4 * (max_tokens * hidden_size * 4 + (1 << 16)))
    return texts
