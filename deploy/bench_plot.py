"""One PNG of a benchmark: TTFT and ITL as distributions, and tokens over time. Needs matplotlib (extra `bench`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

from deploy.bench import Outcome

matplotlib.use("Agg")
from matplotlib import pyplot

BLUE, GREY = "#2f6fdb", "#8a8f98"


def draw(outcomes: Sequence[Outcome], summary: dict[str, Any], path: Path) -> None:
    """Raises OSError where path can't be written."""
    good = [o for o in outcomes if o.error is None]
    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    _cumulative(left, [1e3 * o.ttft_s for o in good], "TTFT, ms", "share of requests")
    _cumulative(middle, [1e3 * itl for o in good for itl in o.itls_s], "ITL, ms", "share of tokens")
    began = min((o.sent for o in good), default=0.0)
    times = sorted(t - began for o in good for t in o.token_times)
    if times:
        right.hist(times, bins=60, weights=[60 / max(times[-1], 1e-9)] * len(times), color=BLUE)
    right.set_xlabel("s since the start")
    right.set_ylabel("tokens/s")
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=GREY)
    figure.suptitle(f"{summary['completed']} requests, {summary['output_throughput']:.0f} output tokens/s", fontsize=11)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _cumulative(axes: Any, values: list[float], label: str, share: str) -> None:
    """Share of the values up to each value."""
    ordered = sorted(values)
    if ordered:
        axes.plot(ordered, [(i + 1) / len(ordered) for i in range(len(ordered))], color=BLUE)
        if ordered[-1] > 20 * max(ordered[len(ordered) // 2], 1e-9):
            axes.set_xscale("log")
    axes.set_ylim(0, 1.02)
    axes.set_xlabel(label)
    axes.set_ylabel(share)
