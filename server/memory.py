"""How much memory a release needs, and whether it is there."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from rectokens.catalog.artifact import ITEMS_NAME
from server.release import ReleaseError, require_gpu

_CGROUP = Path("/sys/fs/cgroup")
_MEMINFO = Path("/proc/meminfo")
# Loaded weights are not all that a model holds: buffers, captured shapes, working memory.
_MODEL_OVERHEAD = 1.1
# Of an item index and of semantic IDs of four levels, beside the column of ids.
_INDEX_BYTES_AN_ITEM = 17
_MAX_HEADER_BYTES = 100 * 1024 * 1024


class NotEnoughMemoryError(ReleaseError):
    """A release that does not fit beside the one that is served.

    Attributes:
        missing_bytes: what would have to be free in addition.
    """

    def __init__(self, what: str, needed: int, available: int) -> None:
        self.missing_bytes = needed - available
        super().__init__(
            f"{what} needs {needed} bytes and {available} are free: {self.missing_bytes} bytes are "
            "missing to load it beside the one served; drain the service first, so that it can "
            "take its place"
        )


@dataclass(frozen=True, slots=True)
class MemoryNeed:
    """Bytes that loading something takes.

    Attributes:
        device: where the model runs; for a model on the CPU all of it.
        host: in the memory of the host besides, 0 where the model runs there.
    """

    device: int
    host: int


AvailableBytes = Callable[[torch.device], int]


def memory_need(
    catalog_path: Path,
    model_path: Path | None,
    device: torch.device,
    dtype: str,
    prompt_bytes: int = 0,
) -> MemoryNeed:
    """What a catalog, and a model if it is not loaded already, will take.

    Args:
        catalog_path: folder of the catalog, its files verified or not.
        model_path: folder of the model, None for one that is there.
        device: where the model runs.
        dtype: of the weights once loaded, as in the settings.
        prompt_bytes: what a model takes to keep prompts in.
    """
    weights = 0
    if model_path is not None:
        weights = int(_weight_bytes(model_path, device, dtype) * _MODEL_OVERHEAD) + prompt_bytes
    tables, trie = _catalog_bytes(catalog_path)
    if device.type == "cpu":
        return MemoryNeed(device=weights + tables + trie, host=0)
    # The trie lies in both; weights pass through the host one file at a time.
    return MemoryNeed(device=weights + trie, host=tables + trie)


def require_room(need: MemoryNeed, device: torch.device, available: AvailableBytes) -> None:
    """Refuse what does not fit.

    Raises:
        NotEnoughMemoryError: says how many bytes are missing, and where.
    """
    cpu = torch.device("cpu")
    for what, place, needed in (
        ("the release", device, need.device),
        ("the catalog, in the host's memory,", cpu, need.host),
    ):
        if needed and needed > (free := available(place)):
            raise NotEnoughMemoryError(what, needed, free)


def available_bytes(device: torch.device) -> int:
    """Bytes that can still be taken on a device, as far as the machine tells.

    Raises:
        ReleaseError: it is a GPU, and there is none.
    """
    if device.type == "cuda":
        require_gpu()
        free, _ = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free + unused)
    return min(_host_available(_MEMINFO), _group_available(_CGROUP))


def _host_available(meminfo: Path) -> int:
    try:
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return 1 << 62  # a machine that does not say refuses nothing


def _group_available(group: Path) -> int:
    """What the control group leaves (version 2); caches of files count as free."""
    try:
        limit = (group / "memory.max").read_text().strip()
        if limit == "max":
            return 1 << 62
        used = int((group / "memory.current").read_text())
        statistics = dict(
            line.split() for line in (group / "memory.stat").read_text().splitlines() if line
        )
        return int(limit) - used + int(statistics.get("inactive_file", 0))
    except (OSError, ValueError):
        return 1 << 62


def _weight_bytes(model_path: Path, device: torch.device, dtype: str) -> int:
    if dtype == "auto" and device.type == "cpu":
        dtype = "float32"
    total = 0
    for path in sorted(model_path.glob("*.safetensors")):
        for stored_bytes, numbers in _tensors(path):
            total += stored_bytes if dtype == "auto" else numbers * getattr(torch, dtype).itemsize
    return total


def _tensors(path: Path) -> list[tuple[int, int]]:
    """Bytes in the file and count of numbers of each tensor, from the file's header."""
    tensors = []
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(min(length, _MAX_HEADER_BYTES)))
        for name, entry in header.items():
            if name != "__metadata__":
                start, end = entry["data_offsets"]
                tensors.append((end - start, prod(entry["shape"])))
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ReleaseError(f"{path} is not a readable safetensors file: {error}") from error
    return tensors


def _catalog_bytes(catalog_path: Path) -> tuple[int, int]:
    """Bytes of the tables in memory, and of the trie."""
    import pyarrow.parquet as pq

    path = catalog_path / ITEMS_NAME
    try:
        items = pq.read_metadata(path)
    except (ValueError, OSError) as error:
        raise ReleaseError(f"{path} is not a readable Parquet file: {error}") from error
    tables = sum(items.row_group(i).total_byte_size for i in range(items.num_row_groups))
    tables += items.num_rows * _INDEX_BYTES_AN_ITEM
    tensors = sum(path.stat().st_size for path in catalog_path.glob("*.safetensors"))
    return tables, tensors
