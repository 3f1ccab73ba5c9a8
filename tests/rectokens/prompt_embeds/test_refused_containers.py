"""Bad base64, bad archives and limits on bytes: refused, each for its own reason."""

import base64
import io
import pickle
import struct
import tracemalloc
import zipfile

import pytest
import torch

from rectokens.prompt_embeds import (
    PromptEmbedsError,
    PromptEmbedsTooLargeError,
    load_prompt_embeds,
)

LIMITS = {"hidden_size": 8, "max_tokens": 16, "max_bytes": 8192}


def load(data, **limits):
    return load_prompt_embeds(data, **{**LIMITS, **limits})


def raw(data: str) -> bytes:
    return base64.b64decode(data)


def test_the_forged_but_honest_bytes_are_accepted(forge):
    # So that each refusal below is for its own reason.
    assert load(forge.plain()).tolist() == torch.zeros(3, 8).tolist()
    assert load(forge.payload()).tolist() == torch.zeros(3, 8).tolist()
    assert load(forge.payload(drop=["codec"])).shape == (3, 8)
    assert load(forge.payload(bits=1)).shape == (3, 8)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:-1],
        lambda text: text + "A",
        lambda text: text + "====",
        lambda text: text.replace("A", "-", 1),
        lambda text: text[:40] + "\n" + text[40:],
        lambda text: " " + text,
        lambda text: text[:40] + "é" + text[41:],
        lambda text: text[:40] + "=" + text[41:],
        lambda _: "",
        lambda _: "====",
        lambda _: "A",
    ],
)
def test_not_strict_base64(forge, damage):
    with pytest.raises(PromptEmbedsError, match="base64"):
        load(damage(forge.plain()))


def test_spare_bits_must_be_zero():
    assert base64.b64decode("QUJ=") == base64.b64decode("QUI=") == b"AB"
    with pytest.raises(PromptEmbedsError, match="canonical"):
        load("QUJ=")


@pytest.mark.parametrize("value", [None, 5, ["x"], {"data": "x"}, bytearray(b"AAAA")])
def test_not_a_string(value):
    with pytest.raises(PromptEmbedsError, match="must be a base64 string"):
        load(value)


def test_body_over_the_limit_is_refused_before_it_is_decoded():
    text = "!" * 20_000_000
    tracemalloc.start()
    with pytest.raises(PromptEmbedsTooLargeError, match="20000000 characters"):
        load(text)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100_000


def test_body_at_the_limit(forge):
    data = forge.plain()
    size = len(raw(data))
    assert load(data, max_bytes=size).shape == (3, 8)
    with pytest.raises(PromptEmbedsTooLargeError):
        load(data, max_bytes=size - 1)


def test_legacy_pickles_are_refused():
    buffer = io.BytesIO()
    torch.save(torch.zeros(3, 8), buffer, _use_new_zipfile_serialization=False)
    for content in (
        buffer.getvalue(),
        pickle.dumps([1.0]),
        b"\x93NUMPY",
        b"PK\x05\x06" + bytes(18),
    ):
        with pytest.raises(PromptEmbedsError, match="not a zip archive"):
            load(base64.b64encode(content).decode())


def test_compressed_members_are_refused(forge):
    pickle_bytes = raw_pickle(forge)
    bomb = forge.archive(pickle_bytes, {"0": bytes(1 << 24)}, compression=zipfile.ZIP_DEFLATED)
    assert len(bomb) < 64_000
    with pytest.raises(PromptEmbedsError, match="compressed member"):
        load(forge.encoded(bomb), max_bytes=1 << 16)


def raw_pickle(forge) -> bytes:
    storage = forge.Storage(torch.FloatStorage, "0", 24)
    return forge.pickled(forge.Tensor(storage, (3, 8)))


def patch_directory(content: bytes, position: int, value: bytes) -> bytes:
    """Overwrite bytes of the first entry of the directory."""
    start = struct.unpack_from("<L", content, len(content) - 6)[0] + position
    return content[:start] + value + content[start + len(value) :]


def test_sizes_that_add_up_past_the_cap_are_refused(forge):
    content = forge.archive(raw_pickle(forge), {"0": bytes(96)})
    lying = patch_directory(content, 20, struct.pack("<LL", 1 << 31, 1 << 31))
    with pytest.raises(PromptEmbedsTooLargeError, match="add up to"):
        load(forge.encoded(lying))


@pytest.mark.parametrize(
    ("position", "value", "reason"),
    [
        (0, b"XXXX", "damaged"),
        (8, struct.pack("<H", 1), "flags"),
        (10, struct.pack("<H", 8), "compressed"),
        (20, struct.pack("<L", 1), "compressed"),
        (20, struct.pack("<LL", 4000, 4000), "overlap|bytes"),
        (28, struct.pack("<H", 4000), "ordinary length"),
        (30, struct.pack("<H", 4), "ordinary length"),
        (32, struct.pack("<H", 4), "ordinary length"),
        (42, struct.pack("<L", 5), "contradicts|overlap"),
        (42, struct.pack("<L", 1 << 30), "outside"),
        (46, b"Archive/data.pkl", "contradicts"),
    ],
)
def test_a_directory_that_lies(forge, position, value, reason):
    content = forge.archive(raw_pickle(forge), {"0": bytes(96)})
    with pytest.raises(PromptEmbedsError, match=reason):
        load(forge.encoded(patch_directory(content, position, value)))


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content[:-1],
        lambda content: content[:30],
        lambda content: content + b"trailing",
        lambda content: content[:-2] + b"\x04\x00note",
        lambda content: b"PK\x03\x04" + content,
        lambda content: content[:-22] + bytes(76) + content[-22:],
    ],
)
def test_an_archive_with_more_or_less_than_its_members(forge, change):
    content = forge.archive(raw_pickle(forge), {"0": bytes(96)})
    with pytest.raises(PromptEmbedsError):
        load(forge.encoded(change(content)))


@pytest.mark.parametrize(
    "extra",
    [
        [("constants.pkl", b"x")],
        [("code/model.py", b"x")],
        [("../../etc/passwd", b"x")],
        [("data/0/x", b"x")],
        [("data.pkl", b"x")],
        [(f"data/{i}", b"") for i in range(1, 40)],
        [("data/1", b"unused")],
        [(".format_version", bytes(1000))],
    ],
    ids=["torchscript", "code", "path", "nested", "twice", "many", "unused", "big"],
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_members_that_do_not_belong(forge, extra):
    content = forge.archive(raw_pickle(forge), {"0": bytes(96)}, extra=extra)
    with pytest.raises(PromptEmbedsError):
        load(forge.encoded(content))


def test_members_that_are_missing(forge):
    with pytest.raises(PromptEmbedsError, match="no data in the archive"):
        load(forge.encoded(forge.archive(raw_pickle(forge), {})))
    with pytest.raises(PromptEmbedsError, match="would not write"):
        load(forge.encoded(forge.archive(raw_pickle(forge), {"0": bytes(96)}, root="")))
