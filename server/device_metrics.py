"""Metrics of the GPU's memory, read whenever they are asked for."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from prometheus_client import Metric
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector


class DeviceMemoryCollector(Collector):
    """What torch holds of the GPU that serves; no figures where a CPU does.

    The figures are torch's own account. Asking the driver would also tell what others hold, but
    may disturb a search that is being captured at that moment.
    """

    def __init__(self) -> None:
        self._device: torch.device | None = None

    def watch(self, device: torch.device) -> None:
        """Report this device from now on."""
        self._device = device

    def collect(self) -> Iterator[Metric]:
        """All metrics, with figures for a GPU only."""
        taken = GaugeMetricFamily(
            "rectokens_gpu_memory_bytes",
            "Memory of the GPU that this process holds (reserved), and what of it is in use "
            "(allocated).",
            labels=["state"],
        )
        total = GaugeMetricFamily(
            "rectokens_gpu_memory_total_bytes", "Memory that the GPU has.", labels=["name"]
        )
        device = self._device
        if device is not None and device.type == "cuda":
            taken.add_metric(["reserved"], torch.cuda.memory_reserved(device))
            taken.add_metric(["allocated"], torch.cuda.memory_allocated(device))
            properties = torch.cuda.get_device_properties(device)
            total.add_metric([properties.name], properties.total_memory)
        yield taken
        yield total
