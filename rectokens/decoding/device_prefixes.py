"""Prefix sums of constraint sets on the device: copied once, not once a batch."""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict

import torch
from torch import Tensor

# Six combinations of sets over 20 million items, at 4 bytes an item.
DEFAULT_MAX_BYTES = 512 * 1024 * 1024


class DevicePrefixes:
    """Copies of prefix sums on one device, least recently used first out. Thread-safe.

    A copy is found by the identity of the tensor it was made of: a catalog hands out one tensor
    for a combination of its sets, so the key is (catalog, combination). A copy goes when its
    source does, which is when nobody holds the catalog any more. A batch that holds a copy keeps
    it, whatever happens here.

    Args:
        device: where the copies lie.
        max_bytes: of all copies together; the newest is kept even if it is larger.
    """

    def __init__(self, device: torch.device, max_bytes: int = DEFAULT_MAX_BYTES) -> None:
        self._device = device
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._copies: OrderedDict[int, tuple[weakref.ref[Tensor], Tensor]] = OrderedDict()

    def __call__(self, prefix: Tensor) -> Tensor:
        """``prefix`` on the device; itself if it is there already."""
        if prefix.device == self._device:
            return prefix
        with self._lock:
            self._drop_orphans()
            known = self._copies.get(id(prefix))
            if known is not None:
                self._copies.move_to_end(id(prefix))
                return known[1]
            copy = prefix.to(self._device)
            self._copies[id(prefix)] = (weakref.ref(prefix), copy)
            while len(self._copies) > 1 and self.num_bytes > self._max_bytes:
                self._copies.popitem(last=False)
            return copy

    def __len__(self) -> int:
        return len(self._copies)

    @property
    def num_bytes(self) -> int:
        """Bytes of all copies."""
        return sum(copy.nbytes for _, copy in self._copies.values())

    def _drop_orphans(self) -> None:
        """Forget copies of tensors that are gone: their identity may be another's by now."""
        for key in [key for key, (source, _) in self._copies.items() if source() is None]:
            del self._copies[key]
