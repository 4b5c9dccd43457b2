"""Three plots of what tests.bench.run measured. Needs matplotlib (extra `bench`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.ticker import NullFormatter

from tests.bench.calibration import shape_of
from tests.bench.limits import decode_limit
from tests.bench.step_parts import PARTS

COLOURS = {"bf16": "#2f6fdb", "bf16 activations": "#7aa7ee", "int8": "#d9822b", "int4": "#2a9d6f"}
BATCHES = (1, 8, 32)


def draw(results: dict[str, Any], folder: Path) -> None:
    if "http" in results:
        _throughput(results, folder / "throughput.png")
    if "engine" in results:
        _breakdown(results["engine"], folder / "step.png")
        _shards(results["engine"], folder / "shards.png")


def _save(figure: Any, path: Path) -> None:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def _throughput(results: dict[str, Any], path: Path) -> None:
    figure, all_axes = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for axes, name in zip(all_axes, ("mid", "small"), strict=True):
        for precision, colour in COLOURS.items():
            ways = [one for one in results["http"] if one["shape"] == name and one["precision"] == precision]
            best = [max(one[f"b{batch}"] for one in ways) for batch in BATCHES]
            shape, read = shape_of(name, precision), max(one["read_gb_s"] for one in ways) * 1e9
            axes.plot(BATCHES, best, "o-", color=colour, label=precision)
            if precision != "bf16 activations":  # the weights, and so the limit, are those of bf16
                axes.plot(BATCHES, [decode_limit(shape, b, read) for b in BATCHES], ":", color=colour)
        axes.set(title=f"{name}, over HTTP", xlabel="streams", ylabel="tokens/s", xscale="log", yscale="log")
        axes.set_xticks(BATCHES, [str(batch) for batch in BATCHES])
        axes.yaxis.set_major_formatter("{x:.0f}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    all_axes[0].plot([], [], ":", color="grey", label="memory's limit")
    all_axes[0].legend(frameon=False)
    _save(figure, path)


def _breakdown(engines: list[dict[str, Any]], path: Path) -> None:
    chosen = [
        one
        for one in engines
        if one["shape"] == "mid" and one["precision"] == "int8" and one["routers"] == 1
        if (one["shards"], one["threads"]) in ((0, 2), (2, 2))
    ]
    figure, axes = pyplot.subplots(figsize=(9, 3.4), layout="constrained")
    names, bottoms = [], [0.0] * (len(chosen) * len(BATCHES))
    for batch in BATCHES:
        names += [f"b{batch}\n{'2 shards' if one['shards'] else 'local'}" for one in chosen]
    steps = [one["steps"][str(batch)]["parts"] for batch in BATCHES for one in chosen]
    for part in PARTS:
        heights = [parts[part] for parts in steps]
        axes.bar(names, heights, bottom=bottoms, label=part, width=0.6)
        bottoms = [low + high for low, high in zip(bottoms, heights, strict=True)]
    axes.set(title="mid int8: one step", ylabel="ms")
    axes.legend(frameon=False, fontsize=8, ncols=2)
    _save(figure, path)


def _shards(engines: list[dict[str, Any]], path: Path) -> None:
    some = [one for one in engines if one["shape"] == "mid" and one["precision"] == "int8"]
    figure, axes = pyplot.subplots(figsize=(6.5, 3.4), layout="constrained")
    for batch, colour in zip(map(str, BATCHES), COLOURS.values(), strict=False):
        mesh = sorted(
            (one["shards"], one["tok_s"][batch])
            for one in some
            if one["shards"] and one["routers"] * one["threads"] == 1
        )
        axes.plot(*zip(*mesh, strict=True), "o-", color=colour, label=f"batch {batch}")
        local = max(one["tok_s"][batch] for one in some if not one["shards"])
        axes.axhline(local, linestyle=":", color=colour)
        axes.plot(
            [one["shards"] for one in some if one["routers"] == 2],
            [one["tok_s"][batch] for one in some if one["routers"] == 2],
            "s",
            color=colour,
            fillstyle="none",
        )
    axes.plot([], [], "s", color="grey", fillstyle="none", label="2 routers, batch each")
    axes.plot([], [], ":", color="grey", label="local")
    axes.set(title="mid int8, one router with one thread", xlabel="shards", ylabel="tokens/s", ylim=(0, None))
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    _save(figure, path)
