"""What `plan` predicts for this machine, against steps of the real engine.

    python -m tests.bench.run --only calibration,engine      # the table is in tests/bench/results/report.md

The planner knows the model's shape, the layout, the batch, and a device entry that tests.bench.calibration makes of
kernels alone and the model `thin`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cluster.planner import Layout, Targets, step_times
from tests.bench.calibration import device_for, shape_of

WITHIN = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    shape: str
    precision: str
    where: str
    batch: int
    predicted_ms: float
    measured_ms: float

    @property
    def error(self) -> float:
        return self.predicted_ms / self.measured_ms - 1


def compare(results: dict[str, Any]) -> list[Compared]:
    """Every engine that was measured with one router whose every process has one thread."""
    compared = []
    for one in results["engine"]:
        if one["threads"] > 1 or one["routers"] > 1:
            continue
        device = device_for(results["calibration"], one["precision"])
        shape = shape_of(one["shape"], one["precision"])
        for batch, step in one["steps"].items():
            targets = Targets(users=int(batch), context=int(step["context"]), tpot_s=1.0)
            predicted_s = step_times(shape, device, Layout(routers=1, shards=one["shards"]), targets).step_s
            compared.append(
                Compared(
                    shape=one["shape"],
                    precision=one["precision"],
                    where=f"{one['shards']} shards" if one["shards"] else "local",
                    batch=int(batch),
                    predicted_ms=1e3 * predicted_s,
                    measured_ms=step["step_ms"],
                )
            )
    return compared
