"""What a step costs as one thing grows and the rest stays: batch, context, experts, requests. On the model `thin`.

A slope is an exponent: 1 is linear, 2 quadratic. `slope` is fitted over all points, `end` over the last two, where
what grows outweighs what is fixed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from tests.bench.checkpoints import checkpoint
from tests.bench.mesh import Arrangement, Mesh

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)
CONTEXTS = (128, 512, 2048, 8192, 16000)
EXPERTS = (8, 16, 32, 64, 128)
REQUESTS = (1, 8, 64, 512)


def slope(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Of log y over log x, by least squares."""
    points = [(math.log(x), math.log(y)) for x, y in zip(xs, ys, strict=True)]
    mean_x, mean_y = (sum(values) / len(points) for values in zip(*points, strict=True))
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)


def measure(say: Callable[[str], None]) -> dict[str, dict[str, Any]]:
    """Name -> {"unit", "x", "y", "slope", "end"}."""
    found: dict[str, dict[str, Any]] = {}

    def keep(name: str, unit: str, xs: Sequence[int], ys: list[float]) -> None:
        all_of_it, end = slope(xs, ys), slope(xs[-2:], ys[-2:])
        found[name] = {"unit": unit, "x": list(xs), "y": ys, "slope": all_of_it, "end": end}
        say(f"{name}: {', '.join(f'{y:.2f}' for y in ys)} {unit}; slope {all_of_it:.2f}, at the end {end:.2f}")

    with Mesh(checkpoint("thin-32"), Arrangement(shards=2, max_model_len=17000)) as mesh:
        keep("batch, 2 shards", "ms a step", BATCHES, [_step_ms(mesh, batch, 32) for batch in BATCHES])
        drained = [1e3 * mesh.drain(count, 8)[0]["seconds"] for count in REQUESTS]
        keep("requests, 2 shards", "ms until done", REQUESTS, drained)
    with Mesh(checkpoint("thin-32"), Arrangement(max_model_len=17000)) as mesh:
        keep("batch, local", "ms a step", BATCHES, [_step_ms(mesh, batch, 32) for batch in BATCHES])
        results = [mesh.decode(batch=1, prompt=context, num_steps=16)[0] for context in CONTEXTS]
        keep("context", "ms a step", CONTEXTS, [one["step_ms"] for one in results])
        keep("context, attention", "ms a step", CONTEXTS, [one["parts"]["attention"] for one in results])
    steps = []
    for number in EXPERTS:
        with Mesh(checkpoint(f"thin-{number}"), Arrangement()) as mesh:
            steps.append(_step_ms(mesh, 8, 32))
    keep("experts, batch 8", "ms a step", EXPERTS, steps)
    return found


def _step_ms(mesh: Mesh, batch: int, prompt: int) -> float:
    return float(mesh.decode(batch=batch, prompt=prompt, num_steps=20)[0]["step_ms"])
