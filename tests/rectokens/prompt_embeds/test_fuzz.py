"""Hostile bytes: whatever arrives, the loader answers with a tensor in bounds or its own error.

A few hundred cases here; `FUZZ_EXAMPLES=10000` for the long run.
"""

import base64
import os
import time
import tracemalloc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rectokens.prompt_embeds import (
    PromptEmbedsError,
    dump_payload,
    dump_tensor,
    load_prompt_embeds,
)
from rectokens.turboquant import encode_embeddings

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "300"))
HIDDEN, MAX_TOKENS, MAX_BYTES = 16, 8, 1 << 13
FUZZ = settings(max_examples=EXAMPLES)
# Of a processor, which others that want it do not add to.
MAX_S = 2.0

_packed, _norms = encode_embeddings(
    torch.randn(3, HIDDEN, generator=torch.Generator().manual_seed(0))
)
VALID = [
    base64.b64decode(dump_payload(_packed, _norms, 4, HIDDEN)),
    base64.b64decode(dump_tensor(torch.ones(3, HIDDEN))),
]


def attempt(data) -> bool:
    """Load within 2 MB of Python memory and two seconds; True if the bytes were accepted."""
    began = time.thread_time()
    tracemalloc.start()
    try:
        x = load_prompt_embeds(data, hidden_size=HIDDEN, max_tokens=MAX_TOKENS, max_bytes=MAX_BYTES)
    except PromptEmbedsError as error:
        x = None
        message = str(error)
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 2_000_000
    assert time.thread_time() - began < MAX_S
    if x is None:
        assert 0 < len(message) < 500
        return False
    assert x.layout == torch.strided
    assert x.is_contiguous()
    assert x.dim() == 2
    assert 1 <= x.shape[0] <= MAX_TOKENS
    assert x.shape[1] == HIDDEN
    assert x.untyped_storage().nbytes() == x.numel() * x.itemsize
    assert torch.isfinite(x).all()
    return True


def encoded(content: bytes) -> str:
    return base64.b64encode(content).decode()


@st.composite
def damaged_archives(draw):
    """A valid archive with some bytes changed, put in, cut out or doubled."""
    content = bytearray(draw(st.sampled_from(VALID)))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(content) - 1, 0)))
        kind = draw(st.sampled_from(["change", "flip", "insert", "delete", "double", "cut"]))
        few = draw(st.binary(min_size=1, max_size=8))
        if kind == "change":
            content[at : at + len(few)] = few
        elif kind == "flip" and content:
            content[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "insert":
            content[at:at] = few
        elif kind == "delete":
            del content[at : at + draw(st.integers(1, 64))]
        elif kind == "double":
            content[at:at] = content[at : at + draw(st.integers(1, 64))]
        else:
            del content[at:]
    return bytes(content)


_INTS = st.one_of(
    st.integers(0, 300),
    st.sampled_from([-1, 1 << 31, (1 << 31) - 1, -(1 << 31), 1 << 62, 1 << 63, 1 << 200]),
)


def _int_bytes(value: int) -> bytes:
    size = (value.bit_length() + 8) // 8
    return b"\x8a" + bytes([size]) + value.to_bytes(size, "little", signed=True)


_TOKENS = st.one_of(
    st.sampled_from(
        [
            b"(", b")", b"}", b"]", b"t", b"\x85", b"\x86", b"\x87", b"R", b"Q", b"s", b"u", b"N",
            b"\x88", b"\x89", b"0", b"1", b"2", b"a", b"e", b"b", b"o", b"\x81", b"\x93", b"\x94",
            b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch\nFloatStorage\n",
            b"ctorch\nByteStorage\n", b"ccollections\nOrderedDict\n", b"cos\nsystem\n",
            b"cbuiltins\neval\n", b"ccollections\nOrderedDict\n)R",
        ]
    ),
    st.sampled_from(["storage", "0", "1", "cpu", "packed", "norms", "bits", "d", "codec", "x" * 60])
    .map(str.encode)
    .map(lambda text: b"X" + len(text).to_bytes(4, "little") + text),
    _INTS.map(_int_bytes),
    st.integers(0, 255).map(lambda value: b"K" + bytes([value])),
    st.integers(0, 5).map(lambda slot: b"q" + bytes([slot])),
    st.integers(0, 5).map(lambda slot: b"h" + bytes([slot])),
    st.binary(min_size=1, max_size=6),
)  # fmt: skip


def test_the_seeds_are_valid():
    assert all(attempt(encoded(content)) for content in VALID)


@FUZZ
@given(damaged_archives())
def test_damaged_archives(content):
    attempt(encoded(content))


@FUZZ
@given(tokens=st.lists(_TOKENS, max_size=40))
def test_random_pickles(forge, tokens):
    body = b"\x80\x02" + b"".join(tokens) + b"."
    attempt(forge.encoded(forge.archive(body, {"0": bytes(64), "1": bytes(12)})))


@FUZZ
@given(
    rows=_INTS,
    columns=_INTS,
    strides=st.tuples(_INTS, _INTS),
    offset=_INTS,
    numel=_INTS,
    content=st.binary(max_size=256),
    kind=st.sampled_from([torch.FloatStorage, torch.HalfStorage, torch.BFloat16Storage]),
    honest=st.sets(st.sampled_from(["columns", "strides", "offset", "numel", "content"])),
)
def test_lying_layouts(forge, rows, columns, strides, offset, numel, content, kind, honest):
    columns = HIDDEN if "columns" in honest else columns
    strides = (columns, 1) if "strides" in honest else strides
    offset = 0 if "offset" in honest else offset
    numel = rows * columns if "numel" in honest else numel
    if "content" in honest and 0 <= numel <= 256:
        content = bytes(numel * (4 if kind is torch.FloatStorage else 2))
    tensor = forge.Tensor(
        forge.Storage(kind, "0", numel), (rows, columns), stride=strides, offset=offset
    )
    accepted = attempt(forge.encoded(forge.archive(forge.pickled(tensor), {"0": content})))
    if accepted:
        assert (columns, offset, numel) == (HIDDEN, 0, rows * HIDDEN)


@FUZZ
@given(
    st.dictionaries(
        st.sampled_from(["packed", "norms", "bits", "d", "codec", "extra"]),
        st.one_of(_INTS, st.booleans(), st.text(max_size=20), st.just("tq1/hd2/lsb/seed42")),
        max_size=6,
    )
)
def test_random_fields(forge, change):
    accepted = attempt(forge.payload(rows=2, d=HIDDEN, change=change))
    assert accepted == all(
        (name, value) in {("bits", 4), ("d", HIDDEN), ("codec", "tq1/hd2/lsb/seed42")}
        and not isinstance(value, bool)
        for name, value in change.items()
    )


@FUZZ
@given(st.one_of(st.text(max_size=200), st.binary(max_size=200), st.integers(), st.none()))
def test_anything_at_all(data):
    assert not attempt(data)


@pytest.mark.parametrize("length", range(0, len(VALID[0]), 7))
def test_every_prefix_is_refused(length):
    assert not attempt(encoded(VALID[0][:length]))
