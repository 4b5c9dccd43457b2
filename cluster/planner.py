"""How many routers and shards for a model, and what to expect of them: arithmetic first, then a simulation.

A decode step of one router with B sequences, per layer:

    router   attention weights, shared expert and B contexts of KV, read once     (bandwidth) or computed (FLOP/s)
    network  B rows to each shard that holds one of their experts, and back       (latency + bytes)
    shard    every expert that is hit, read once; the rows, computed              (bandwidth) or (FLOP/s)

With one micro-batch these follow each other; with two the router works on one while the other is away. A shard serves
one router's rows at a time, so all routers' work together is the least that a layer can take. All computed, from data
sheets: efficiency says how much of them is taken for granted. Source of the shape: MegaScale-Infer (arXiv:2504.02263),
section 4.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """What of a model costs time and memory. weight_bytes, kv_bytes, row_bytes: of one number."""

    hidden_size: int
    num_layers: int
    num_moe_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_experts: int
    top_k: int
    expert_size: int
    shared_size: int
    dense_size: int
    vocab_size: int
    weight_bytes: float = 2.0
    kv_bytes: float = 2.0
    row_bytes: float = 2.0

    @property
    def expert_params(self) -> int:
        return 3 * self.hidden_size * self.expert_size

    @property
    def experts_bytes(self) -> float:
        """All routed experts, once."""
        return self.num_moe_layers * self.num_experts * self.expert_params * self.weight_bytes

    @property
    def router_layer_params(self) -> float:
        """Attention and what every token passes, averaged over the layers."""
        attention = self.hidden_size * self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads)
        dense = self.num_layers - self.num_moe_layers
        mlps = 3 * self.hidden_size * (self.num_moe_layers * self.shared_size + dense * self.dense_size)
        gates = self.num_moe_layers * self.hidden_size * self.num_experts
        return attention + (mlps + gates) / self.num_layers

    @property
    def router_bytes(self) -> float:
        return (self.num_layers * self.router_layer_params + 2 * self.vocab_size * self.hidden_size) * self.weight_bytes

    @property
    def kv_bytes_per_token(self) -> float:
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.kv_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One GPU, or one process' share of a CPU. efficiency: share of bandwidth and FLOP/s that kernels reach."""

    name: str
    memory_bytes: float
    bandwidth: float
    flops: float
    network: float
    latency_s: float = 20e-6
    overhead_s: float = 30e-6  # of a layer on each side: launches, bookkeeping
    efficiency: float = 0.6
    usable_memory: float = 0.9


DEVICES = {
    device.name: device
    for device in (
        Device(name="a100-80g", memory_bytes=80e9, bandwidth=2.0e12, flops=312e12, network=25e9),
        Device(name="h100", memory_bytes=80e9, bandwidth=3.35e12, flops=989e12, network=50e9),
        Device(name="h20", memory_bytes=96e9, bandwidth=4.0e12, flops=148e12, network=50e9),
        Device(name="l40s", memory_bytes=48e9, bandwidth=0.86e12, flops=362e12, network=12.5e9),
        Device(name="rtx4090", memory_bytes=24e9, bandwidth=1.0e12, flops=165e12, network=3e9, latency_s=50e-6),
    )
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """context: tokens of a sequence in the middle of its life. users: sequences at once."""

    users: int
    context: int
    tpot_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    routers: int
    shards: int
    replicas: int = 1
    micro_batches: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTimes:
    """One decode step, in seconds; the first four are sums over its layers. shard_s: for the rows of all routers."""

    router_s: float
    network_s: float
    shard_s: float
    head_s: float
    step_s: float
    shard_is_memory_bound: bool

    @property
    def bound_by(self) -> str:
        shard = "expert weights" if self.shard_is_memory_bound else "expert FLOP/s"
        parts = {"attention and KV": self.router_s, "network": self.network_s, shard: self.shard_s}
        return max(parts, key=lambda name: parts[name])


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    layout: Layout
    times: StepTimes
    tokens_per_s: float
    router_bytes_used: float
    shard_bytes_used: float
    fits: bool
    meets_tpot: bool


def step_times(
    model: ModelShape, device: Device, layout: Layout, targets: Targets, imbalance: float = 1.0
) -> StepTimes:
    """imbalance: the fullest shard's rows over the mean."""
    batch = targets.users / layout.routers
    bandwidth, flops = device.bandwidth * device.efficiency, device.flops * device.efficiency
    chunks = layout.micro_batches
    rows = batch / chunks

    weights = model.router_layer_params
    kv = rows * targets.context * model.kv_bytes_per_token / model.num_layers
    attention_flops = rows * (2 * weights + 4 * targets.context * model.num_heads * model.head_dim)
    router_s = max((weights * model.weight_bytes + kv) / bandwidth, attention_flops / flops) + device.overhead_s

    shards_hit = layout.shards * (1 - (1 - 1 / layout.shards) ** model.top_k)
    row_bytes = rows * shards_hit * model.hidden_size * model.row_bytes
    into_shard = row_bytes * layout.routers / layout.shards * imbalance
    network_s = 2 * (device.latency_s + max(row_bytes, into_shard) / device.network)

    pairs = rows * model.top_k / layout.shards * imbalance
    slots = model.num_experts * layout.replicas / layout.shards
    # A replica halves what each copy is sent, so fewer of its slots are hit.
    hit = slots * (1 - (1 - model.top_k / model.num_experts / layout.replicas) ** rows)
    reading_s = hit * model.expert_params * model.weight_bytes / bandwidth
    computing_s = pairs * 2 * model.expert_params / flops
    shard_s = max(reading_s, computing_s) + device.overhead_s

    moe, dense = model.num_moe_layers, model.num_layers - model.num_moe_layers
    away_s = network_s + shard_s
    layer_s = max(chunks * router_s, router_s + away_s, layout.routers * chunks * shard_s)
    head_s = max(
        model.vocab_size * model.hidden_size * model.weight_bytes / bandwidth,
        batch * 2 * model.vocab_size * model.hidden_size / flops,
    )
    return StepTimes(
        router_s=model.num_layers * chunks * router_s,
        network_s=moe * chunks * network_s,
        shard_s=moe * chunks * shard_s * layout.routers,
        head_s=head_s,
        step_s=moe * layer_s + dense * chunks * router_s + head_s,
        shard_is_memory_bound=reading_s >= computing_s,
    )


def evaluate(model: ModelShape, device: Device, layout: Layout, targets: Targets, imbalance: float = 1.0) -> Plan:
    times = step_times(model, device, layout, targets, imbalance)
    kv = targets.users / layout.routers * targets.context * model.kv_bytes_per_token
    router_bytes = model.router_bytes + kv
    shard_bytes = model.experts_bytes * layout.replicas / layout.shards
    room = device.memory_bytes * device.usable_memory
    return Plan(
        layout=layout,
        times=times,
        tokens_per_s=targets.users / times.step_s,
        router_bytes_used=router_bytes,
        shard_bytes_used=shard_bytes,
        fits=router_bytes <= room and shard_bytes <= room,
        meets_tpot=times.step_s <= targets.tpot_s,
    )


def plans(
    model: ModelShape, device: Device, targets: Targets, num_devices: int, replicas: Sequence[int] = (1, 2)
) -> list[Plan]:
    """Every layout on num_devices that fits in memory, best first: those that meet the TPOT, then by throughput."""
    found = [
        evaluate(model, device, layout, targets, imbalance=1.0 + 0.3 / layout.replicas)
        for layout in _layouts(model, num_devices, replicas)
    ]
    return sorted((p for p in found if p.fits), key=lambda p: (not p.meets_tpot, -p.tokens_per_s, p.layout.replicas))


def _layouts(model: ModelShape, num_devices: int, replicas: Sequence[int]) -> Iterator[Layout]:
    for routers in range(1, num_devices):
        shards = num_devices - routers
        for copies in replicas:
            if copies <= shards <= model.num_experts * copies:
                for micro_batches in (1, 2):
                    yield Layout(routers=routers, shards=shards, replicas=copies, micro_batches=micro_batches)


def most_users(model: ModelShape, device: Device, layout: Layout, targets: Targets) -> int:
    """The largest number of users, at the same context, that still fits and meets the TPOT; 0 when one is too many."""
    low, high = 0, 1
    while high < 1 << 24 and _holds(evaluate(model, device, layout, replace(targets, users=high))):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        if _holds(evaluate(model, device, layout, replace(targets, users=middle))):
            low = middle
        else:
            high = middle
    return low


def _holds(plan: Plan) -> bool:
    return plan.fits and plan.meets_tpot


# ---- simulation --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Trouble:
    """skew: exponent of the experts' Zipf popularity, 0 is even. mtbf_s: mean time between failures of one shard.
    A lost shard's step waits detect_s; without another copy also for the read of its experts at read_bytes_s by the
    survivors together; a new shard takes its place after restart_s."""

    skew: float = 0.0
    mtbf_s: float = math.inf
    detect_s: float = 0.3
    read_bytes_s: float = 2e9
    restart_s: float = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulated:
    """step_s: percentile -> seconds. imbalance: fullest shard over mean, averaged. stalled: share of the time."""

    tokens_per_s: float
    step_s: dict[int, float]
    imbalance: float
    num_failures: int
    stalled: float


def simulate(
    model: ModelShape,
    device: Device,
    layout: Layout,
    targets: Targets,
    trouble: Trouble,
    *,
    num_steps: int = 50,
    num_layers: int | None = None,
    seed: int = 0,
) -> Simulated:
    """Routers run steps side by side, each layer's rows queue at the shards, and the slowest shard ends the layer.

    num_layers: simulate only so many MoE layers of each step and scale the time; all where shards fail. Good for 1 to
    1,000 shards; about 20 us of computing for each router, layer and step. The same for the same seed.
    """
    draw = np.random.default_rng(seed)
    rate = layout.shards / trouble.mtbf_s if math.isfinite(trouble.mtbf_s) else 0.0
    layers = min(num_layers or model.num_moe_layers, model.num_moe_layers) if not rate else model.num_moe_layers
    chunks, lanes = layout.micro_batches, layout.routers * layout.micro_batches
    share_SE = _shares(model, layout, trouble.skew, draw)
    times = step_times(model, device, layout, targets)
    batch = targets.users / lanes
    router_layer_s = times.router_s / model.num_layers / chunks
    network_layer_s = times.network_s / max(model.num_moe_layers, 1) / chunks
    bandwidth, flops = device.bandwidth * device.efficiency, device.flops * device.efficiency
    other_s = times.head_s + (model.num_layers - model.num_moe_layers) * router_layer_s
    scale = model.num_moe_layers / layers

    free_at = np.zeros(layout.shards)
    alive = np.ones(layout.shards, dtype=bool)
    next_failure = float(draw.exponential(1 / rate)) if rate else math.inf
    back: list[tuple[float, int]] = []
    router_free = [0.0] * layout.routers
    queue = [(0.0, lane, 0, 0) for lane in range(lanes)]  # time, lane (a router's micro-batch), layer, step
    heapq.heapify(queue)
    began = [0.0] * lanes
    durations: list[float] = []
    imbalances: list[float] = []
    stalled, num_failures, end = 0.0, 0, 0.0
    while queue:
        now, lane, layer, step = heapq.heappop(queue)
        while back and back[0][0] <= now:
            alive[heapq.heappop(back)[1]] = True
        if now >= next_failure and alive.sum() > 1:
            victim = int(draw.choice(np.flatnonzero(alive)))
            alive[victim] = False
            num_failures += 1
            pause_s = recovery_s(model, layout, trouble)
            free_at = np.maximum(free_at, now) + pause_s  # every router waits for the new epoch
            stalled += pause_s
            heapq.heappush(back, (now + pause_s + trouble.restart_s, victim))
            next_failure = now + float(draw.exponential(1 / rate))
        pairs_E = draw.poisson(share_SE.sum(axis=0) * batch * model.top_k)
        rows_S = share_SE @ (pairs_E / np.maximum(share_SE.sum(axis=0), 1e-12))
        hit_S = ((share_SE > 0) & (pairs_E > 0)).sum(axis=1).astype(float)
        if not alive.all():  # the survivors share what the dead would have done
            for values in (rows_S, hit_S):
                moved = values[~alive].sum() / alive.sum()
                values[~alive] = 0.0
                values[alive] += moved
        work_S = device.overhead_s + np.maximum(
            hit_S * model.expert_params * model.weight_bytes / bandwidth, rows_S * 2 * model.expert_params / flops
        )
        router = lane % layout.routers
        router_free[router] = max(now, router_free[router]) + router_layer_s
        arrive = router_free[router] + network_layer_s / 2
        free_at = np.where(alive, np.maximum(free_at, arrive) + work_S, free_at)
        done = float(free_at[alive].max()) + network_layer_s / 2
        imbalances.append(float(rows_S.max() / max(rows_S.mean(), 1e-12)))
        if layer + 1 < layers:
            heapq.heappush(queue, (done, lane, layer + 1, step))
            continue
        done += other_s / scale
        durations.append((done - began[lane]) * scale)
        began[lane] = done
        end = max(end, done)
        if step + 1 < num_steps:
            heapq.heappush(queue, (done, lane, 0, step + 1))
    return Simulated(
        tokens_per_s=batch * len(durations) / (end * scale),
        step_s={q: float(np.percentile(durations, q)) for q in (50, 90, 99)},
        imbalance=float(np.mean(imbalances)),
        num_failures=num_failures,
        stalled=min(1.0, stalled / end),
    )


def recovery_s(model: ModelShape, layout: Layout, trouble: Trouble) -> float:
    """How long the loss of one shard holds everybody up."""
    if layout.replicas > 1:
        return trouble.detect_s
    return trouble.detect_s + model.experts_bytes / layout.shards / trouble.read_bytes_s


def _shares(model: ModelShape, layout: Layout, skew: float, draw: np.random.Generator) -> np.ndarray:
    """[shards, experts]: which part of all pairs goes to each shard for each expert. Popular experts get the further
    copies, and experts go in order of their load to the emptiest shard, as the balancer does."""
    popularity = (1.0 + np.arange(model.num_experts)) ** -skew
    popularity = draw.permutation(popularity / popularity.sum())
    copies = np.ones(model.num_experts, dtype=int)
    for _ in range(model.num_experts * (layout.replicas - 1)):
        room = copies < layout.shards
        copies[int(np.argmax(np.where(room, popularity / copies, -1.0)))] += 1
    share = np.zeros((layout.shards, model.num_experts))
    load = np.zeros(layout.shards)
    most = -(-int(copies.sum()) // layout.shards)
    held = np.zeros(layout.shards, dtype=int)
    for expert in np.argsort(-popularity / copies):
        for _ in range(copies[expert]):
            blocked = (share[:, expert] > 0) | (held >= most)
            if blocked.all():
                blocked = share[:, expert] > 0
            shard = int(np.argmin(np.where(blocked, np.inf, load)))
            part = popularity[expert] / copies[expert]
            share[shard, expert] = part
            load[shard] += part
            held[shard] += 1
    return share
