"""A mesh in the mind: routers run steps side by side, and experts are more and less popular.

What a layer costs is the planner's arithmetic; here is what the arithmetic leaves out: queues at the shards and the
draw of experts. What the loss of a shard costs is arithmetic again.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np

from cluster.planner import Device, Layout, ModelShape, Targets, step_times

DETECT_S = 0.3  # that a lost shard's step waits
READ_BYTES_S = 2e9  # of the survivors together, when they read the experts of a shard that had the only copy


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulated:
    """step_s: percentile -> seconds. imbalance: fullest shard over mean, averaged."""

    tokens_per_s: float
    step_s: dict[int, float]
    imbalance: float


def simulate(
    model: ModelShape,
    device: Device,
    layout: Layout,
    targets: Targets,
    *,
    skew: float = 0.0,
    num_steps: int = 50,
    num_layers: int | None = None,
    seed: int = 0,
) -> Simulated:
    """Routers run steps side by side, each layer's rows queue at the shards, and the slowest shard ends the layer.

    skew: exponent of the experts' Zipf popularity, 0 is even. num_layers: simulate only so many MoE layers of each step
    and scale the time. Good for 1 to 1,000 shards; about 20 us of computing for each router, layer and step. The same
    for the same seed.
    """
    draw = np.random.default_rng(seed)
    layers = min(num_layers or model.num_moe_layers, model.num_moe_layers)
    chunks, lanes = layout.micro_batches, layout.routers * layout.micro_batches
    share_SE = _shares(model, layout, skew, draw)
    times = step_times(model, device, layout, targets)
    batch = targets.users / lanes
    attention_layer_s = (times.router_s - times.shared_s) / model.num_layers / chunks
    shared_layer_s, network_layer_s = (
        t / max(model.num_moe_layers, 1) / chunks for t in (times.shared_s, times.network_s)
    )
    bandwidth, flops = device.bandwidth * device.efficiency, device.flops * device.efficiency
    other_s = times.head_s + (model.num_layers - model.num_moe_layers) * attention_layer_s
    scale = model.num_moe_layers / layers

    free_at = np.zeros(layout.shards)
    router_free = [0.0] * layout.routers
    queue = [(0.0, lane, 0, 0) for lane in range(lanes)]  # time, lane (a router's micro-batch), layer, step
    heapq.heapify(queue)
    began = [0.0] * lanes
    durations: list[float] = []
    imbalances: list[float] = []
    end = 0.0
    while queue:
        now, lane, layer, step = heapq.heappop(queue)
        pairs_E = draw.poisson(share_SE.sum(axis=0) * batch * model.top_k)
        rows_S = share_SE @ (pairs_E / np.maximum(share_SE.sum(axis=0), 1e-12))
        hit_S = ((share_SE > 0) & (pairs_E > 0)).sum(axis=1).astype(float)
        reading_S = hit_S * model.expert_params * model.weight_bytes / bandwidth
        computing_S = rows_S * 2 * model.expert_params / flops
        work_S = device.overhead_s + np.maximum(reading_S, computing_S)
        work_S += (1 - device.overlap) * np.minimum(reading_S, computing_S)
        router = lane % layout.routers
        sent = max(now, router_free[router]) + attention_layer_s
        router_free[router] = sent + shared_layer_s
        arrive = sent + network_layer_s / 2
        free_at = np.maximum(free_at, arrive) + work_S
        done = max(float(free_at.max()) + network_layer_s / 2, router_free[router])
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
    )


def recovery_s(model: ModelShape, layout: Layout) -> float:
    """How long the loss of one shard holds everybody up."""
    if layout.replicas > 1:
        return DETECT_S
    return DETECT_S + model.experts_bytes / layout.shards / READ_BYTES_S


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
