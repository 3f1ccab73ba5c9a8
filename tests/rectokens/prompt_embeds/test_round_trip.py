"""What honest senders write is read as torch reads it."""

import base64
import importlib.util
import io
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rectokens.prompt_embeds import dump_payload, dump_tensor, load_prompt_embeds
from rectokens.turboquant import (
    BLOCK_CODEC,
    BlockTurboQuantMSE,
    TurboQuantMSE,
    encode_embeddings,
)

LIMITS = {"max_tokens": 64, "max_bytes": 1 << 20}


def torch_load(data: str):
    return torch.load(io.BytesIO(base64.b64decode(data)), weights_only=True)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 40),
    st.integers(1, 40),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    st.integers(0, 1000),
)
def test_plain_tensors(rows, hidden, dtype, seed):
    x = torch.randn(rows, hidden, generator=torch.Generator().manual_seed(seed)).to(dtype)
    buffer = io.BytesIO()
    torch.save(x, buffer)
    for data in (dump_tensor(x), base64.b64encode(buffer.getvalue())):
        y = load_prompt_embeds(data, hidden_size=hidden, **LIMITS)
        assert y.dtype == dtype
        assert torch.equal(y, x)
    assert torch.equal(torch_load(dump_tensor(x)), x)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 40),
    st.sampled_from([1, 2, 16, 64, 256, 384]),
    st.sampled_from([1, 2, 4, 8]),
    st.integers(0, 1000),
)
def test_payloads(rows, d, bits, seed):
    quantizer, codec = (
        (BlockTurboQuantMSE(d, bits), BLOCK_CODEC) if d == 384 else (TurboQuantMSE(d, bits), None)
    )
    x = torch.randn(rows, d, generator=torch.Generator().manual_seed(seed))
    packed, norms = quantizer.encode(x)
    data = dump_payload(packed, norms, bits, d, *([codec] if codec else []))
    loaded = torch_load(data)
    assert set(loaded) == {"packed", "norms", "bits", "d", "codec"}
    assert torch.equal(loaded["packed"], packed)
    assert torch.equal(loaded["norms"], norms)
    assert (loaded["bits"], loaded["d"], loaded["codec"]) == (bits, d, quantizer.codec)
    decoded = load_prompt_embeds(data, hidden_size=d, **LIMITS)
    assert torch.equal(decoded, quantizer.decode(packed, norms))


def test_a_view_is_dumped_without_its_neighbours():
    packed, norms = encode_embeddings(torch.randn(1000, 64))
    whole, part = dump_payload(packed, norms, 4, 64), dump_payload(packed[3:5], norms[3:5], 4, 64)
    assert len(part) < len(whole) / 5
    decoded = load_prompt_embeds(part, hidden_size=64, **LIMITS)
    assert torch.equal(decoded, TurboQuantMSE(64, 4).decode(packed[3:5], norms[3:5]))
    assert torch.equal(
        load_prompt_embeds(dump_tensor(torch.eye(64).T[2:4]), hidden_size=64, **LIMITS),
        torch.eye(64)[2:4],
    )


@pytest.mark.parametrize("with_pybase64", [True, False])
def test_the_text_is_base64_of_what_torch_saves(monkeypatch, with_pybase64):
    if not with_pybase64:
        monkeypatch.setitem(sys.modules, "pybase64", None)
    spec = importlib.util.find_spec("rectokens.prompt_embeds")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    packed, norms = encode_embeddings(torch.randn(37, 64))

    def saved(value):
        buffer = io.BytesIO()
        torch.save(value, buffer)
        return base64.b64encode(buffer.getvalue()).decode()

    for rows in (slice(None), slice(3, 5), slice(0, 37, 2)):
        value = {"packed": packed[rows].clone(), "norms": norms[rows].clone()}
        value |= {"bits": 4, "d": 64, "codec": "tq1/hd2/lsb/seed42"}
        assert module.dump_payload(packed[rows], norms[rows], 4, 64) == saved(value)
    assert module.dump_tensor(torch.eye(8).T) == saved(torch.eye(8))


def test_senders_without_our_library():
    packed, norms = encode_embeddings(torch.randn(2, 64), bits=8)
    for extra in ({}, {"codec": "tq1/hd2/lsb/seed42"}):
        buffer = io.BytesIO()
        torch.save({"bits": 8, "norms": norms, "d": 64, "packed": packed, **extra}, buffer)
        data = base64.b64encode(buffer.getvalue()).decode()
        assert load_prompt_embeds(data, hidden_size=64, **LIMITS).shape == (2, 64)


def test_a_file_saved_under_a_name(tmp_path):
    # The root folder of the archive is then called after the file.
    torch.save(torch.ones(2, 4), tmp_path / "my prompt.pt")
    data = base64.b64encode((tmp_path / "my prompt.pt").read_bytes())
    assert load_prompt_embeds(data, hidden_size=4, **LIMITS).tolist() == [[1.0] * 4] * 2


@pytest.mark.parametrize("requires_grad", [False, True])
def test_the_result_owns_its_memory(requires_grad):
    x = torch.randn(2, 4, requires_grad=requires_grad)
    y = load_prompt_embeds(dump_tensor(x), hidden_size=4, **LIMITS)
    y += 1
    assert not y.requires_grad


def test_compression_of_a_prompt():
    x = torch.randn(1024, 4096).bfloat16()
    compressed = dump_payload(*encode_embeddings(x), 4, 4096)
    assert len(dump_tensor(x)) == pytest.approx(11.2e6, rel=0.01)
    assert len(compressed) == pytest.approx(2.8e6, rel=0.01)
