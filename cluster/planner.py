"""How many routers and shards for a model, and what to expect of them: arithmetic first, then a simulation.

A decode step of one router with B sequences, per layer:

    router   attention weights and B contexts of KV, read once                    (bandwidth) and computed (FLOP/s)
    network  B rows to each shard that holds one of their experts, and back       (latency + bytes)
    shard    every expert that is hit, read once; the rows, computed              (bandwidth) and (FLOP/s)
    shared   the shared expert, on the router, while the rows are away

With one micro-batch these follow each other; with two the router works on one while the other is away (routers take
whichever they measure to be faster). A shard serves one router's rows at a time, so all routers' work together is the
least that a layer can take, and on one host all processes' work over its cores. The fullest shard ends a layer:
experts are drawn, so it has more than the mean.
Computed from data sheets (efficiency says how much of them is taken for granted) or from a device that was calibrated,
as tests/bench/plan_accuracy.py does and compares with measured steps. Source of the shape: MegaScale-Infer
(arXiv:2504.02263), section 4.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist


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
    def attention_params(self) -> int:
        """Of a layer, with the gate."""
        attention = self.hidden_size * self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads)
        return attention + self.hidden_size * self.num_experts

    @property
    def router_layer_params(self) -> float:
        """Attention and what every token passes, averaged over the layers."""
        dense = self.num_layers - self.num_moe_layers
        mlps = 3 * self.hidden_size * (self.num_moe_layers * self.shared_size + dense * self.dense_size)
        without_gates = dense * self.hidden_size * self.num_experts
        return self.attention_params + (mlps - without_gates) / self.num_layers

    @property
    def router_bytes(self) -> float:
        return (self.num_layers * self.router_layer_params + 2 * self.vocab_size * self.hidden_size) * self.weight_bytes

    @property
    def kv_bytes_per_token(self) -> float:
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.kv_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One GPU, or one process' share of a CPU.

    efficiency: share of bandwidth and FLOP/s that kernels reach. overlap: share of the shorter of reading and computing
    that hides behind the longer. Seconds: latency_s of the network, each way; overhead_s of a layer on each side,
    row_s of each row of a layer and message_s of each shard that is sent to, on the router; step_s and sequence_s of a
    step and of each of its sequences (scheduling, sampling).
    kv_bandwidth: that attention reads KV with, where it isn't `bandwidth`. host_cores, host_bandwidth: of the host that
    all processes share; None where each has its own.
    """

    name: str
    memory_bytes: float
    bandwidth: float
    flops: float
    network: float
    latency_s: float = 20e-6
    overhead_s: float = 30e-6
    row_s: float = 0.0
    message_s: float = 0.0
    step_s: float = 0.0
    sequence_s: float = 0.0
    overlap: float = 1.0
    efficiency: float = 0.6
    usable_memory: float = 0.9
    kv_bandwidth: float | None = None
    host_cores: int | None = None
    host_bandwidth: float | None = None

    def __post_init__(self) -> None:
        for name in ("memory_bytes", "bandwidth", "flops", "network", "efficiency"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} of {self.name} is {getattr(self, name):g}; it must be above 0")

    def work_s(self, num_bytes: float, num_flops: float, num_busy: int = 1) -> float:
        """Seconds to read and to compute so much while num_busy processes of the host do the like."""
        bandwidth = self.bandwidth
        if self.host_bandwidth is not None:
            bandwidth = min(bandwidth, self.host_bandwidth / min(num_busy, self.host_cores or num_busy))
        reading_s = num_bytes / bandwidth / self.efficiency
        computing_s = num_flops / self.flops / self.efficiency
        return max(reading_s, computing_s) + (1 - self.overlap) * min(reading_s, computing_s)


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

    def __post_init__(self) -> None:
        if not self.tpot_s > 0:
            raise ValueError(f"tpot_s is {self.tpot_s:g}; it must be above 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """shards=0: the experts are in the routers."""

    routers: int
    shards: int
    replicas: int = 1
    micro_batches: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTimes:
    """One decode step, in seconds; the first four are sums over its layers. router_s: with shared_s in it. shard_s: for
    the rows of all routers."""

    router_s: float
    shared_s: float
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
    """imbalance: the fullest shard's rows over what even popularity gives the fullest."""
    batch = targets.users / layout.routers
    chunks = layout.micro_batches
    rows = batch / chunks
    moe, dense = model.num_moe_layers, model.num_layers - model.num_moe_layers

    kv_bytes = rows * targets.context * model.kv_bytes_per_token / model.num_layers
    attention_flops = 4 * rows * targets.context * model.num_heads * model.head_dim
    attention_s = _matrix_s(model, device, model.attention_params, rows) + device.overhead_s + rows * device.row_s
    kv_device = device if device.kv_bandwidth is None else replace(device, bandwidth=device.kv_bandwidth)
    attention_s += kv_device.work_s(kv_bytes, attention_flops)
    dense_s = attention_s + _matrix_s(model, device, 3 * model.hidden_size * model.dense_size, rows)
    num_busy = layout.routers + layout.shards
    shared_s = _matrix_s(model, device, 3 * model.hidden_size * model.shared_size, rows, num_busy)

    shard_s, mean_shard_s, memory_bound = _experts_s(model, device, layout, rows, imbalance)
    network_s = 0.0
    if layout.shards:
        shards_hit = layout.shards * (1 - (1 - 1 / layout.shards) ** (rows * model.top_k))
        copies = layout.shards * (1 - (1 - 1 / layout.shards) ** model.top_k)
        row_bytes = rows * copies * model.hidden_size * model.row_bytes
        into_shard = row_bytes * layout.routers / layout.shards * imbalance
        network_s = 2 * (device.latency_s + max(row_bytes, into_shard) / device.network)
        network_s += shards_hit * device.message_s
        away_s = max(shared_s, network_s + shard_s)
    else:
        away_s = shared_s + shard_s
    router_s = attention_s + shared_s
    layer_s = max(chunks * router_s, attention_s + away_s, layout.routers * chunks * shard_s)
    if device.host_cores is not None and layout.shards:
        # All processes' work on the cores that there are; nothing else runs while the router attends alone.
        together_s = layout.routers * (router_s + network_s) + layout.routers * layout.shards * mean_shard_s
        layer_s = max(layer_s, chunks * together_s / device.host_cores)
        if layout.routers == 1:
            side_by_side_s = (shared_s + layout.shards * mean_shard_s) / device.host_cores
            layer_s = max(layer_s, chunks * (attention_s + network_s + side_by_side_s))
    head_s = _matrix_s(model, device, model.vocab_size * model.hidden_size, batch)
    head_s += device.step_s + batch * device.sequence_s
    return StepTimes(
        router_s=chunks * (moe * router_s + dense * dense_s),
        shared_s=moe * chunks * shared_s,
        network_s=moe * chunks * network_s,
        shard_s=moe * chunks * shard_s * layout.routers,
        head_s=head_s,
        step_s=moe * layer_s + dense * chunks * dense_s + head_s,
        shard_is_memory_bound=memory_bound,
    )


def _matrix_s(model: ModelShape, device: Device, num_params: float, rows: float, num_busy: int = 1) -> float:
    return device.work_s(num_params * model.weight_bytes, 2 * num_params * rows, num_busy)


def _experts_s(
    model: ModelShape, device: Device, layout: Layout, rows: float, imbalance: float
) -> tuple[float, float, bool]:
    """A layer's seconds on the fullest shard and on a mean one, and whether the fullest is bound by memory."""
    shards = max(layout.shards, 1)
    slots = model.num_experts * layout.replicas / shards
    # A replica halves what each copy is sent, so fewer of its slots are hit.
    chance = 1 - (1 - model.top_k / model.num_experts / layout.replicas) ** rows
    fullest = NormalDist().inv_cdf((shards - 0.375) / (shards + 0.25))  # of so many draws, in deviations (Blom 1958)
    hit = min(slots, slots * chance + fullest * (slots * chance * (1 - chance)) ** 0.5)
    pairs = rows * model.top_k / shards
    most_pairs = (pairs + fullest * (pairs * (1 - 1 / shards)) ** 0.5) * imbalance
    num_busy = layout.routers + layout.shards

    def seconds(hit: float, pairs: float) -> float:
        expert_bytes = model.expert_params * model.weight_bytes
        return device.overhead_s + device.work_s(hit * expert_bytes, 2 * pairs * model.expert_params, num_busy)

    reading_s = hit * model.expert_params * model.weight_bytes / device.bandwidth
    computing_s = most_pairs * 2 * model.expert_params / device.flops
    return seconds(hit, most_pairs), seconds(slots * chance, pairs), reading_s >= computing_s


def evaluate(model: ModelShape, device: Device, layout: Layout, targets: Targets, imbalance: float = 1.0) -> Plan:
    times = step_times(model, device, layout, targets, imbalance)
    kv = targets.users / layout.routers * targets.context * model.kv_bytes_per_token
    router_bytes = model.router_bytes + kv
    shard_bytes = model.experts_bytes * layout.replicas / max(layout.shards, 1)
    if not layout.shards:
        router_bytes, shard_bytes = router_bytes + shard_bytes, 0.0
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
    model: ModelShape, device: Device, targets: Targets, num_devices: int, replicas: Sequence[int] = (1, 2, 4, 8, 16)
) -> list[Plan]:
    """Every layout on num_devices that fits in memory, best first: those that meet the TPOT, then by throughput; with
    as many micro-batches as serve it best, as routers find out for themselves."""
    found = [
        evaluate(model, device, layout, targets, imbalance=1.0 + 0.3 / layout.replicas)
        for layout in _layouts(model, num_devices, replicas)
    ]
    best: dict[Layout, Plan] = {}
    for plan in sorted(found, key=lambda p: (not p.meets_tpot, -p.tokens_per_s, p.layout.replicas)):
        if plan.fits:
            best.setdefault(replace(plan.layout, micro_batches=1), plan)
    return list(best.values())


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
