"""Hand-made `torch.save` archives, honest and otherwise, for the tests of the wire format."""

import base64
import io
import pickle
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch


@dataclass
class Storage:
    """Pickled as the persistent id of a storage."""

    kind: type
    key: str
    numel: object
    device: str = "cpu"
    tag: str = "storage"


class Tensor:
    """Pickled as torch.save pickles a tensor, with whatever layout it is told."""

    def __init__(self, storage, size, stride=None, offset=0, rebuild=None):
        if stride is None:
            stride, step = [], 1
            for extent in reversed(size):
                stride.insert(0, step)
                step *= max(extent, 1)
        self.arguments = (storage, offset, tuple(size), tuple(stride), False, OrderedDict())
        self.rebuild = rebuild or torch._utils._rebuild_tensor_v2

    def __reduce__(self):
        return self.rebuild, self.arguments


class Pickler(pickle.Pickler):
    def persistent_id(self, value):
        if isinstance(value, Storage):
            return (value.tag, value.kind, value.key, value.device, value.numel)
        return None


def pickled(value, protocol=2) -> bytes:
    buffer = io.BytesIO()
    Pickler(buffer, protocol=protocol).dump(value)
    return buffer.getvalue()


def archive(
    pickle_bytes, data, *, compression=zipfile.ZIP_STORED, extra=(), root="archive"
) -> bytes:
    """A zip of the pickle and of `data`, a dict from storage key to bytes."""
    members = [("data.pkl", pickle_bytes), ("byteorder", b"little"), ("version", b"3\n")]
    members += [(f"data/{key}", content) for key, content in data.items()]
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as file:
        for name, content in [*members, *extra]:
            file.writestr(f"{root}/{name}", content)
    return buffer.getvalue()


def encoded(value: bytes) -> str:
    return base64.b64encode(value).decode()


def plain(size=(3, 8), kind=torch.FloatStorage, numel=None, content=None, **layout) -> str:
    """A plain tensor of zeros, or one that lies about itself."""
    itemsize = {torch.FloatStorage: 4, torch.DoubleStorage: 8, torch.ByteStorage: 1}.get(kind, 2)
    true_numel = 1
    for extent in size:
        true_numel *= extent
    content = bytes(true_numel * itemsize) if content is None else content
    storage = Storage(kind, "0", true_numel if numel is None else numel)
    return encoded(archive(pickled(Tensor(storage, size, **layout)), {"0": content}))


def payload(rows=3, d=8, bits=4, *, change=None, drop=(), contents=None) -> str:
    """A TurboQuant payload of zeros, its entries changed or dropped as told."""
    width = -(-d * bits // 8)
    entries = {
        "packed": Tensor(Storage(torch.ByteStorage, "0", rows * width), (rows, width)),
        "norms": Tensor(Storage(torch.FloatStorage, "1", rows), (rows,)),
        "bits": bits,
        "d": d,
        "codec": "tq1/hd2/lsb/seed42",
    }
    entries.update(change or {})
    for name in drop:
        del entries[name]
    data = {"0": bytes(rows * width), "1": bytes(rows * 4), **(contents or {})}
    return encoded(archive(pickled(entries), data))


@pytest.fixture(scope="session")
def forge():
    """What this module makes: `forge.plain`, `forge.payload`, `forge.archive` and their parts."""
    return SimpleNamespace(
        Storage=Storage,
        Tensor=Tensor,
        pickled=pickled,
        archive=archive,
        encoded=encoded,
        plain=plain,
        payload=payload,
    )
