"""Whether a replay lets a release through: a pure function of figures and thresholds."""

from __future__ import annotations

from dataclasses import dataclass

from server.rehearsal.types import GateOptions, ReplayReport


@dataclass(frozen=True, slots=True)
class Thresholds:
    """What blocks an activation; None blocks nothing.

    Attributes:
        min_requests: compared requests.
        min_overlap: mean share of old items among the new ones.
        max_shortfall: share of requests with fewer items than asked for, on the new version.
        max_latency_ratio: new median latency over old.
    """

    min_requests: int = 0
    min_overlap: float | None = None
    max_shortfall: float | None = None
    max_latency_ratio: float | None = None

    def overridden(self, options: GateOptions) -> Thresholds:
        """These thresholds, but for those that the options name."""

        def chosen(name: str) -> float | None:
            given: float | None = getattr(options, name)
            own: float | None = getattr(self, name)
            return own if given is None else given

        min_requests = self.min_requests
        if options.min_requests is not None:
            min_requests = options.min_requests
        return Thresholds(
            min_requests=min_requests,
            min_overlap=chosen("min_overlap"),
            max_shortfall=chosen("max_shortfall"),
            max_latency_ratio=chosen("max_latency_ratio"),
        )


def objections(report: ReplayReport, thresholds: Thresholds) -> list[str]:
    """Reasons to block, each with the value found and the value allowed; empty to let through.

    A figure that nothing was measured for blocks nothing: ``min_requests`` is there to ask for
    measurements.
    """
    found = []
    if report.compared < thresholds.min_requests:
        found.append(
            f"{report.compared} requests were compared; at least {thresholds.min_requests} must be"
        )
    for name, value, limit, too_low in (
        ("mean overlap", report.mean_overlap, thresholds.min_overlap, True),
        ("shortfall", report.shortfall_new, thresholds.max_shortfall, False),
        ("latency ratio", report.latency_ratio, thresholds.max_latency_ratio, False),
    ):
        if value is None or limit is None:
            continue
        if value < limit if too_low else value > limit:
            bound = "at least" if too_low else "at most"
            found.append(f"{name} is {value:.4g}; allowed is {bound} {limit:g}")
    return found
