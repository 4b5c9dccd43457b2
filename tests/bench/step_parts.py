"""Where the time of a router's steps goes: its functions are wrapped with clocks, in the measuring process only."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import actors.engine
import actors.step_outputs
from actors.remote_exchange import RemoteExchange
from actors.router import Router
from actors.scheduler import Scheduler, count_tokens
from model.heads import Head
from model.moe import LocalExchange

PARTS = (
    "attention",
    "gate",
    "pack",
    "exchange",
    "experts",
    "shared expert",
    "head",
    "sampling",
    "scheduler",
    "rest",
)


@dataclass(frozen=True, slots=True)
class Step:
    """One step. parts: seconds in each wrapped function; busy_s[shard][i]: (layer, seconds) of each exchange's
    computing there; uses: distinct experts of a layer, mean; context: tokens of a sequence, mean."""

    num_decodes: int
    num_prompt: int
    seconds: float
    parts: dict[str, float]
    busy_s: list[list[tuple[int, float]]]
    uses: float
    context: float


class StepClock:
    """Wraps one router's step. shard_times: asks each shard for (layer, seconds) of its exchanges since last asked."""

    def __init__(self, router: Router, shard_times: Callable[[], list[list[tuple[int, float]]]]) -> None:
        self.steps: list[Step] = []
        self._parts: dict[str, float] = defaultdict(float)
        self._router = router
        self._shard_times = shard_times
        for owner, name, part in (
            (Head, "forward", "head"),
            (actors.step_outputs, "sample", "sampling"),
            (Scheduler, "schedule", "scheduler"),
            (actors.engine, "build_batch", "scheduler"),
            (actors.engine.Engine, "_commit", "scheduler"),
            (LocalExchange, "dispatch", "experts"),
            (RemoteExchange, "dispatch", "dispatch"),
            (RemoteExchange, "combine", "combine"),
        ):
            self._wrap(owner, name, part)
        model, kernels = router.engine.model, router.engine.model.decoder.kernels
        kernels = replace(
            kernels,
            attention=self._timed(kernels.attention, "attention"),
            route=self._timed(kernels.route, "gate"),
            mlp=self._timed(kernels.mlp, "shared expert"),
        )
        router.engine.model = replace(model, decoder=replace(model.decoder, kernels=kernels))
        self._step = router.engine.step
        router.engine.step = self._timed_step  # type: ignore[method-assign]
        self._transport: Any = None
        self._num_uses = 0

    def _wrap(self, owner: Any, name: str, part: str) -> None:
        setattr(owner, name, self._timed(getattr(owner, name), part))

    def _timed(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        parts = self._parts

        def timed(*arguments: Any, **options: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                parts[part] += time.perf_counter() - began

        return timed

    def _timed_step(self) -> None:
        connection = self._router.membership.newest()
        if connection is not None and connection.transport is not self._transport:
            self._transport = connection.transport
            self._wrap(self._transport, "send", "send")
            self._wrap(self._transport, "receive", "wait")
        self._parts.clear()
        began = time.perf_counter()
        self._step()
        seconds = time.perf_counter() - began
        work = self._router.engine._work
        if not work:
            return
        num_decodes, num_prompt = count_tokens(work)
        uses = getattr(self._router.exchange, "expert_uses", {})
        total = sum(int(layer.sum()) for layer in uses.values())
        used, self._num_uses = (total - self._num_uses) / max(len(uses), 1), total
        self.steps.append(
            Step(
                num_decodes=num_decodes,
                num_prompt=num_prompt,
                seconds=seconds,
                parts=dict(self._parts),
                busy_s=self._shard_times(),
                uses=used,
                context=statistics.mean(item.end for item in work),
            )
        )


def split(steps: Sequence[Step]) -> dict[str, float]:
    """Mean milliseconds of PARTS and of whole steps, of those that were not held up (up to twice the median).

    With shards, `exchange` is what the router waited for or spent on sending and adding up that no shard's computing
    explains, and `experts` the slowest shard's computing as far as the shared expert didn't hide it.
    """
    median = statistics.median(step.seconds for step in steps)
    kept = [step for step in steps if step.seconds <= 2 * median]
    sums: dict[str, float] = defaultdict(float)
    for step in kept:
        parts = step.parts
        for name in ("attention", "gate", "shared expert", "head", "sampling", "scheduler", "experts"):
            sums[name] += parts.get(name, 0.0)
        if step.busy_s:
            shared = parts.get("shared expert", 0.0)
            busy = slowest_s(step)
            sums["busy"] += busy
            sums["pack"] += parts["dispatch"] - parts["send"]
            away = parts["send"] + parts["combine"]  # seconds that the router gave to it
            hidden = max(busy - shared, 0.0)
            sums["experts"] += min(hidden, away)
            sums["exchange"] += away - min(hidden, away)
        sums["step"] += step.seconds
    result = {name: 1e3 * sums[name] / len(kept) for name in (*PARTS, "step", "busy")}
    result["rest"] = result["step"] - sum(result[name] for name in PARTS)
    return result


def slowest_s(step: Step) -> float:
    """Seconds of the slowest shard in each layer, added up; a shard's two exchanges of a layer, with two micro-batches,
    count together."""
    by_layer: dict[int, list[float]] = defaultdict(lambda: [0.0] * len(step.busy_s))
    for shard_idx, shard in enumerate(step.busy_s):
        for layer, seconds in shard:
            by_layer[layer][shard_idx] += seconds
    return sum(map(max, by_layer.values()))
