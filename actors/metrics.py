"""Figures that a router keeps for its operators: cheap to count in a step, read as plain JSON. No Prometheus here."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field
from typing import Any

EXCHANGE_BUCKETS_S = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


@dataclass(slots=True)
class Buckets:
    """A histogram: counts[i] are the values up to bounds[i] and above bounds[i - 1], the last one those above all."""

    bounds: tuple[float, ...]
    total: float = 0.0
    counts: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.counts = [0] * (len(self.bounds) + 1)

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def to_dict(self) -> dict[str, Any]:
        return {"bounds": list(self.bounds), "counts": list(self.counts), "sum": self.total}


@dataclass(slots=True)
class Traffic:
    """What one router's exchanges cost, retries included. dispatch: until all is handed to the network; combine: from
    when the router asks for the sums until it has them (what the shared expert hid is not in it)."""

    num_exchanges: int = 0
    dispatch_bytes: int = 0
    combine_bytes: int = 0
    dispatch: Buckets = field(default_factory=lambda: Buckets(EXCHANGE_BUCKETS_S))
    combine: Buckets = field(default_factory=lambda: Buckets(EXCHANGE_BUCKETS_S))

    def to_dict(self) -> dict[str, Any]:
        return {
            "num_exchanges": self.num_exchanges,
            "dispatch_bytes": self.dispatch_bytes,
            "combine_bytes": self.combine_bytes,
            "dispatch_s": self.dispatch.to_dict(),
            "combine_s": self.combine.to_dict(),
        }
