"""Archives in order whose pickle, layout, fields or values are not: refused, with the reason."""

import base64
import io
import math
import os
import struct
import time
import tracemalloc

import pytest
import torch

from rectokens.prompt_embeds import (
    PromptEmbedsError,
    PromptEmbedsTooLargeError,
    dump_payload,
    dump_tensor,
    load_prompt_embeds,
    load_prompt_embeds_list,
)
from rectokens.turboquant import BLOCK_CODEC, TurboQuantMSE, encode_embeddings

LIMITS = {"hidden_size": 8, "max_tokens": 16, "max_bytes": 8192}


def load(data, **limits):
    return load_prompt_embeds(data, **{**LIMITS, **limits})


def saved(value) -> str:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return base64.b64encode(buffer.getvalue()).decode()


def raw(data: str) -> bytes:
    return base64.b64decode(data)


class Command:
    def __reduce__(self):
        return os.system, ("touch rectokens-was-here",)


@pytest.mark.parametrize("nested", [False, True])
def test_code_is_refused_and_does_not_run(forge, nested, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    value = {"packed": Command(), "norms": 0, "bits": 4, "d": 8} if nested else Command()
    with pytest.raises(PromptEmbedsError, match=r"posix\.system|nt\.system"):
        load(forge.encoded(forge.archive(forge.pickled(value), {})))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.zeros(3, 8).to_sparse(),
        lambda: torch.zeros(3, 8).to_sparse_csr(),
        lambda: torch.quantize_per_tensor(torch.zeros(3, 8), 0.1, 0, torch.qint8),
        lambda: torch.nested.nested_tensor([torch.zeros(2, 8), torch.zeros(1, 8)]),
        lambda: torch.zeros(3, 8, device="meta"),
        lambda: torch.nn.Parameter(torch.zeros(3, 8)),
        lambda: torch.nn.Linear(2, 2),
        lambda: torch.zeros(3, 8, dtype=torch.complex64),
        lambda: torch.zeros(3, 8, dtype=torch.int64),
        lambda: torch.float32,
    ],
    ids=[
        "sparse", "sparse rows", "quantized", "nested", "meta", "parameter", "module", "complex",
        "integer", "dtype",
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore")
def test_other_objects_and_layouts_are_refused(make):
    with pytest.raises(PromptEmbedsError):
        load(saved(make()))


@pytest.mark.parametrize(
    ("layout", "reason"),
    [
        ({"stride": (0, 0)}, "not contiguous"),
        ({"stride": (0, 1)}, "not contiguous"),
        ({"stride": (1, 3)}, "not contiguous"),
        ({"stride": (-8, 1)}, "not contiguous"),
        ({"stride": (1 << 40, 1)}, "not contiguous"),
        ({"offset": 1}, "offset"),
        ({"offset": -1}, "offset"),
        ({"numel": 25}, "storage of 25"),
        ({"numel": 1 << 40}, "storage of"),
        ({"numel": -24}, "storage of"),
        ({"numel": 23}, "storage of 23"),
        ({"content": bytes(95)}, "needs 96 bytes"),
        ({"content": bytes(97)}, "needs 96 bytes"),
        ({"content": b""}, "needs 96 bytes"),
    ],
)
def test_layouts_that_reach_beyond_the_data(forge, layout, reason):
    with pytest.raises(PromptEmbedsError, match=reason):
        load(forge.plain(**layout))


def test_a_huge_shape_costs_nothing(forge):
    size = (1 << 40, 8)
    storage = forge.Storage(torch.FloatStorage, "0", 1 << 43)
    data = forge.encoded(
        forge.archive(forge.pickled(forge.Tensor(storage, size)), {"0": bytes(64)})
    )
    tracemalloc.start()
    with pytest.raises(PromptEmbedsError):
        load(data)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 200_000


@pytest.mark.parametrize("view", ["transposed", "slice", "strided"])
def test_views_saved_by_torch_are_refused(view):
    x = torch.randn(8, 8)
    x = {"transposed": x.T, "slice": x[:3], "strided": torch.randn(8, 16)[:, ::2]}[view]
    with pytest.raises(PromptEmbedsError, match=r"contiguous|clone"):
        load(saved(x))


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("device", "meta", "device"),
        ("device", "mps:0", "device"),
        ("tag", "module", "unknown way"),
        ("key", 0, "unknown way"),
        ("numel", "24", "unknown way"),
        ("numel", True, "unknown way"),
        ("kind", "FloatStorage", "unknown way"),
    ],
)
def test_storages_of_another_kind(forge, key, value, reason):
    fields = {"kind": torch.FloatStorage, "key": "0", "numel": 24, key: value}
    tensor = forge.Tensor(forge.Storage(**fields), (3, 8))
    with pytest.raises(PromptEmbedsError, match=reason):
        load(forge.encoded(forge.archive(forge.pickled(tensor), {"0": bytes(96)})))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"extra": 1}, "has the keys"),
        ({"bits": True}, "plain ints"),
        ({"bits": 4.0}, "opcode BINFLOAT"),
        ({"bits": "4"}, "plain ints"),
        ({"bits": None}, "opcode NONE"),
        ({"bits": 3}, "bits is 3"),
        ({"bits": 0}, "bits is 0"),
        ({"bits": 16}, "bits is 16"),
        ({"bits": -4}, "bits is -4"),
        ({"bits": 1 << 100}, "integer"),
        ({"d": True}, "plain ints"),
        ({"d": 16}, "hidden size is 8"),
        ({"d": -8}, "hidden size is 8"),
        ({"codec": "tq1/hd2/lsb/seed43"}, "codec is 'tq1/hd2/lsb/seed43'"),
        ({"codec": "tq1/hd1/lsb/seed42"}, "codec is"),
        ({"codec": ""}, "codec is"),
        ({"codec": 1}, "codec is int"),
        ({"packed": 5}, "must be tensors"),
        ({"norms": "x"}, "must be tensors"),
        ({"norms": {}}, "must be tensors"),
    ],
)
def test_fields_of_a_payload(forge, change, reason):
    with pytest.raises(PromptEmbedsError, match=reason):
        load(forge.payload(change=change))


@pytest.mark.parametrize("name", ["packed", "norms", "bits", "d"])
def test_every_documented_key_is_needed(forge, name):
    with pytest.raises(PromptEmbedsError, match="has the keys"):
        load(forge.payload(drop=[name]))


def test_sizes_that_are_not_powers_of_two_need_the_block_codec(forge):
    for d in (12, 384):
        with pytest.raises(PromptEmbedsError, match="power of two"):
            load(forge.payload(d=d), hidden_size=d)
    with pytest.raises(PromptEmbedsError, match="is a power of two"):
        load(forge.payload(change={"codec": BLOCK_CODEC}))
    assert load(forge.payload(d=384, change={"codec": BLOCK_CODEC}), hidden_size=384).any() == 0


def tensor(forge, kind, key, size):
    return forge.Tensor(forge.Storage(kind, key, math.prod(size)), size)


@pytest.mark.parametrize(
    ("name", "kind", "size"),
    [
        ("packed", torch.FloatStorage, (3, 4)),
        ("packed", torch.ByteStorage, (3, 5)),
        ("packed", torch.ByteStorage, (12,)),
        ("packed", torch.ByteStorage, (3, 4, 1)),
        ("packed", torch.ByteStorage, (-3, 4)),
        ("norms", torch.DoubleStorage, (3,)),
        ("norms", torch.HalfStorage, (3,)),
        ("norms", torch.FloatStorage, (4,)),
        ("norms", torch.FloatStorage, (3, 1)),
    ],
)
def test_tensors_of_a_payload(forge, name, kind, size):
    key = {"packed": "0", "norms": "1"}[name]
    with pytest.raises(PromptEmbedsError, match=r"packed|norms"):
        load(forge.payload(change={name: tensor(forge, kind, key, size)}))


def test_two_tensors_on_one_storage(forge):
    shared = forge.Tensor(forge.Storage(torch.FloatStorage, "0", 3), (3,))
    data = forge.payload(bits=4, change={"norms": shared}, contents={"0": bytes(12)})
    with pytest.raises(PromptEmbedsError, match="one to one"):
        load(data)


@pytest.mark.parametrize("value", [-1.0, -1e-30, math.nan, math.inf, -math.inf])
def test_norms(forge, value):
    content = struct.pack("<3f", 1.0, value, 1.0)
    with pytest.raises(PromptEmbedsError, match="norms must be finite"):
        load(forge.payload(contents={"1": content}))


def test_norms_that_overflow_when_decoded(forge):
    # The outermost centroids with the signs of a one-hot row add up in one coordinate.
    one_hot, _ = TurboQuantMSE(8, 8).encode(torch.eye(8)[:3])
    outermost = torch.where(one_hot >= 128, 255, 0).to(torch.uint8).numpy().tobytes()
    for norm, fits in ((1.2e38, True), (3.4e38, False)):
        content = struct.pack("<3f", *[norm] * 3)
        data = forge.payload(bits=8, contents={"0": outermost, "1": content})
        if fits:
            assert load(data).abs().max() > norm * 2
        else:
            with pytest.raises(PromptEmbedsError, match="overflow"):
                load(data)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_plain_embeddings_that_are_not_finite(value, dtype):
    x = torch.zeros(3, 8, dtype=dtype)
    x[2, 7] = value
    with pytest.raises(PromptEmbedsError, match="NaN or infinity"):
        load(saved(x))


@pytest.mark.parametrize("size", [(8,), (3, 4), (3, 9), (1, 3, 8), (), (2, 2, 2, 2, 2, 2)])
def test_plain_shapes(forge, size):
    with pytest.raises(PromptEmbedsError, match=r"expected \(num_tokens, 8\)"):
        load(forge.plain(size=size))


@pytest.mark.parametrize("kind", [torch.DoubleStorage, torch.ByteStorage])
def test_plain_dtypes(forge, kind):
    with pytest.raises(PromptEmbedsError, match="allowed are float32"):
        load(forge.plain(kind=kind))


def test_numbers_of_tokens(forge):
    for make in (forge.payload(rows=0), forge.plain(size=(0, 8))):
        with pytest.raises(PromptEmbedsError, match="no tokens"):
            load(make)
    assert load(forge.payload(rows=16)).shape == (16, 8)
    assert load(forge.plain(size=(16, 8))).shape == (16, 8)
    for make in (forge.payload(rows=17), forge.plain(size=(17, 8))):
        with pytest.raises(PromptEmbedsTooLargeError, match="17 tokens, allowed are 16"):
            load(make)


def test_other_values_in_the_pickle(forge):
    for value in ({}, "text", 5, True, (), (1, 2), {"a": {}}):
        with pytest.raises(PromptEmbedsError):
            load(forge.encoded(forge.archive(forge.pickled(value), {})))
    with pytest.raises(PromptEmbedsError, match="protocol 4"):
        load(forge.encoded(forge.archive(forge.pickled({}, protocol=4), {})))


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\x80\x02",
        b"\x80\x02.",
        b"\x80\x02(.",
        b"\x80\x02}}.",
        b"\x80\x02t.",
        b"\x80\x02h\x05.",
        b"\x80\x02}K\x01K\x02s.",
        b"\x80\x02}(K\x01u.",
        b"\x80\x02}R.",
        b"\x80\x02ccollections\nOrderedDict\nK\x01R.",
        b"\x80\x02X\xff\xff\xff\x7fabc.",
        b"\x80\x02\x8a\xffabc.",
        b"\x80\x02ctorch\nFloatStorage\n)R.",
        b"\x80\x02Ptext\n.",
        b"\xff\xff",
    ],
)
def test_pickles_that_make_no_sense(forge, body):
    with pytest.raises(PromptEmbedsError):
        load(forge.encoded(forge.archive(body, {})))


def test_a_pickle_that_doubles_itself_is_not_expanded(forge):
    # A tuple of a tuple of ... 800 deep, each holding the one before twice.
    body = b"\x80\x02)" + b"q\x00h\x00\x86" * 800
    started = time.thread_time()  # expanded, it would take longer than the universe is old
    for end in (b".", b"Q.", b"}h\x00K\x01s.", b"K\x01R."):
        with pytest.raises(PromptEmbedsError):
            load(forge.encoded(forge.archive(body + end, {})))
    assert time.thread_time() - started < 5


def test_lists(forge):
    good = forge.payload()
    limits = {**LIMITS, "max_payloads": 3}
    assert [x.shape for x in load_prompt_embeds_list([good] * 3, **limits)] == [(3, 8)] * 3
    with pytest.raises(PromptEmbedsTooLargeError, match="4 payloads, allowed are 3"):
        load_prompt_embeds_list([good] * 4, **limits)
    with pytest.raises(PromptEmbedsError, match="empty list"):
        load_prompt_embeds_list([], **limits)
    with pytest.raises(PromptEmbedsError, match=r"^prompt_embeds\[1\]: .*bits is 3"):
        load_prompt_embeds_list([good, forge.payload(change={"bits": 3})], **limits)
    with pytest.raises(PromptEmbedsTooLargeError, match="in all"):
        load_prompt_embeds_list([good] * 3, **{**limits, "max_bytes": 2 * len(raw(good))})
    with pytest.raises(PromptEmbedsError, match=r"\[0\]: .*base64 string"):
        load_prompt_embeds_list([7], **limits)


def test_dumping_refuses_what_no_decoder_takes():
    packed, norms = encode_embeddings(torch.randn(3, 64))
    dump_payload(packed, norms, 4, 64)
    for arguments in [
        (packed, norms, 3, 64),
        (packed, norms, 8, 64),
        (packed, norms, 4, 128),
        (packed, norms[:2], 4, 64),
        (packed.int(), norms, 4, 64),
        (packed, norms.double(), 4, 64),
        (packed[0], norms[0], 4, 64),
        (packed, norms, 4, 64, "other"),
        (packed, norms, 4, 64, BLOCK_CODEC),
    ]:
        with pytest.raises(ValueError):
            dump_payload(*arguments)
    for x in (torch.zeros(8), torch.zeros(3, 8, dtype=torch.float64), torch.zeros(3, 8).int()):
        with pytest.raises(ValueError):
            dump_tensor(x)


def test_decoded_values_do_not_depend_on_the_road():
    x = torch.randn(5, 8)
    quantizer = TurboQuantMSE(8, 8)
    packed, norms = quantizer.encode(x)
    assert torch.equal(load(dump_payload(packed, norms, 8, 8)), quantizer.decode(packed, norms))
