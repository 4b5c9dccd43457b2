"""From what GET /mesh shows to Prometheus families: routers, shards, experts, epochs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

PREFIX = "expertmesh_"
MAX_EXPERT_GROUPS = 16  # a layer's experts are counted in at most so many groups of neighbours

# metric, figure of a router, help
ROUTER_GAUGES = (
    ("num_requests_running", "running", "Sequences in the batch."),
    ("num_requests_waiting", "waiting", "Sequences that wait for a seat or for blocks."),
    ("kv_cache_usage_perc", "kv_usage", "Share of the KV blocks in use, 0 to 1."),
    ("router_epoch", "epoch", "Epoch that the router runs on."),
    ("last_recovery_seconds", "last_recovery_s", "How long the last recovery held a step up."),
)
ROUTER_COUNTERS = (
    ("steps", "num_steps", "Steps."),
    ("step_seconds", "step_s", "Time in steps."),
    ("computed_prompt_tokens", "num_prompt_tokens", "Prompt tokens computed (not found in the prefix cache)."),
    ("sampled_tokens", "num_output_tokens", "Tokens drawn."),
    ("prefix_cache_queries", "prefix_cache_queries", "Prompt tokens looked up in the prefix cache."),
    ("prefix_cache_hits", "prefix_cache_hits", "Prompt tokens found in the prefix cache."),
    ("num_preemptions", "num_preemptions", "Sequences that lost their blocks and wait again."),
    ("recoveries", "num_recoveries", "Exchanges repeated on a newer epoch."),
    ("recovery_seconds", "recovery_s", "Time steps were held up by recoveries."),
)
SHARD_GAUGES = (
    ("shard_experts", "num_experts", "Experts in memory."),
    ("shard_weight_bytes", "weight_bytes", "Bytes of expert weights in memory."),
)
SHARD_COUNTERS = (
    ("rank_tokens", "tokens", "Rows that the shard computed."),
    ("rank_pairs", "pairs", "(token, expert) pairs that the shard computed."),
    ("rank_busy_seconds", "busy_s", "Time the shard computed."),
)


def mesh_families(mesh: Mapping[str, Any]) -> list[Metric]:
    """Families for everything that is known; a part that did not answer is missing, never zero."""
    routers = [(str(r["router_id"]), r) for r in mesh.get("routers", ()) if "num_steps" in r]
    shards = [(str(s["shard_id"]), s) for s in mesh.get("shards", ())]
    families: list[Metric] = []
    for label, parts, gauges, counters in (
        ("router", routers, ROUTER_GAUGES, ROUTER_COUNTERS),
        ("shard", shards, SHARD_GAUGES, SHARD_COUNTERS),
    ):
        for make, rows in ((GaugeMetricFamily, gauges), (CounterMetricFamily, counters)):
            for name, figure, text in rows:
                family = make(PREFIX + name, text, labels=[label])
                for part_id, figures in parts:
                    if figure in figures:
                        family.add_metric([part_id], float(figures[figure]))
                families.append(family)
    return [*families, *_exchange(routers), *_experts(routers), *_mesh(mesh, shards)]


def balancedness(loads: Sequence[float]) -> float:
    """Mean over max: 1 is level, 1/n is everything in one place; 1 for no load."""
    top = max(loads, default=0.0)
    return sum(loads) / len(loads) / top if top else 1.0


def _exchange(routers: Sequence[tuple[str, Mapping[str, Any]]]) -> list[Metric]:
    families: list[Metric] = []
    for part in ("dispatch", "combine"):
        seconds = HistogramMetricFamily(f"{PREFIX}{part}_seconds", f"Time in a layer's {part}.", labels=["router"])
        sent = CounterMetricFamily(f"{PREFIX}{part}_bytes", f"Bytes of {part}.", labels=["router"])
        for router_id, figures in routers:
            if "exchange" not in figures:
                continue
            data = figures["exchange"][f"{part}_s"]
            seen, buckets = 0, []
            for bound, count in zip([*data["bounds"], None], data["counts"], strict=True):
                seen += count
                buckets.append(("+Inf" if bound is None else str(float(bound)), seen))
            seconds.add_metric([router_id], buckets, data["sum"])
            sent.add_metric([router_id], figures["exchange"][f"{part}_bytes"])
        families += [seconds, sent]
    return families


def _experts(routers: Sequence[tuple[str, Mapping[str, Any]]]) -> list[Metric]:
    """Tokens by layer and group of experts, added over the routers; and how level each layer's experts are."""
    layers: dict[str, list[float]] = {}
    for _, figures in routers:
        for layer, counts in figures.get("expert_tokens", {}).items():
            before = layers.get(layer, [0.0] * len(counts))
            layers[layer] = [a + b for a, b in zip(before, counts, strict=True)]
    tokens = CounterMetricFamily(
        PREFIX + "expert_tokens", "Pairs sent to experts, in groups of neighbours.", labels=["layer", "experts"]
    )
    level = GaugeMetricFamily(
        PREFIX + "layer_balancedness", "Mean over max of the experts' tokens, 0 to 1.", labels=["layer"]
    )
    for layer, counts in sorted(layers.items(), key=lambda item: int(item[0])):
        size = -(-len(counts) // MAX_EXPERT_GROUPS)
        for begin in range(0, len(counts), size):
            end = min(begin + size, len(counts))
            name = str(begin) if size == 1 else f"{begin}-{end - 1}"
            tokens.add_metric([layer, name], sum(counts[begin:end]))
        level.add_metric([layer], balancedness(counts))
    return [tokens, level]


def _mesh(mesh: Mapping[str, Any], shards: Sequence[tuple[str, Mapping[str, Any]]]) -> list[Metric]:
    def gauge(name: str, text: str, value: float) -> Metric:
        return GaugeMetricFamily(PREFIX + name, text, value=value)

    if "epoch" not in mesh:
        return [gauge("routers", "Routers connected.", len(mesh.get("routers", ())))]
    states = GaugeMetricFamily(PREFIX + "shards", "Shards by state.", labels=["state"])
    for state in ("serving", "standby", "unreachable"):
        states.add_metric([state], sum(s.get("state") == state for _, s in shards))
    pairs = [float(s["pairs"]) for _, s in shards if s.get("state") == "serving" and "pairs" in s]
    rebalances = CounterMetricFamily(PREFIX + "rebalances", "Placements changed to level the load.")
    rebalances.add_metric([], float(mesh.get("num_rebalances", 0)))
    return [
        states,
        rebalances,
        gauge("routers", "Routers known to the supervisor.", len(mesh.get("routers", ()))),
        gauge("epoch", "Number of the agreed membership and placement.", mesh["epoch"]),
        gauge("mesh_complete", "1 when every expert has a holder.", float(bool(mesh.get("complete")))),
        gauge("target_shards", "Shards wanted.", mesh.get("target_shards", 0)),
        gauge("balancedness", "Mean over max of the serving shards' pairs, 0 to 1.", balancedness(pairs)),
    ]
