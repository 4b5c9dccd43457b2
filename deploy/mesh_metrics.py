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
    ("overlapped_steps", "num_overlapped_steps", "Steps in two micro-batches that took turns."),
    ("computed_prompt_tokens", "num_prompt_tokens", "Prompt tokens computed (not found in the prefix cache)."),
    ("sampled_tokens", "num_output_tokens", "Tokens drawn."),
    ("prefix_cache_queries", "prefix_cache_queries", "Prompt tokens looked up in the prefix cache."),
    ("prefix_cache_hits", "prefix_cache_hits", "Prompt tokens found in the prefix cache."),
    ("num_preemptions", "num_preemptions", "Sequences that lost their blocks and wait again."),
    ("recoveries", "num_recoveries", "Exchanges repeated after a loss, on a newer epoch or with replicas."),
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
    """Families for everything that is known; a part that did not answer is missing, never zero. Each sample is labelled
    with its mesh."""
    first = str(mesh.get("mesh", "default"))
    views: dict[str, Mapping[str, Any]] = {first: mesh, **mesh.get("further_meshes", {})}
    routers = _parts(views, "routers", "router_id")
    families: list[Metric] = []
    for label, parts, gauges, counters in (
        ("router", routers, ROUTER_GAUGES, ROUTER_COUNTERS),
        ("shard", _parts(views, "shards", "shard_id"), SHARD_GAUGES, SHARD_COUNTERS),
    ):
        for make, rows in ((GaugeMetricFamily, gauges), (CounterMetricFamily, counters)):
            for name, figure, text in rows:
                family = make(PREFIX + name, text, labels=["mesh", label])
                for labels, figures in parts:
                    if figure in figures:
                        family.add_metric(labels, float(figures[figure]))
                families.append(family)
    return [*families, *_exchange(routers), *_experts(views), *_membership(views)]


def expert_tokens(mesh: Mapping[str, Any]) -> dict[int, list[float]]:
    """Tokens of each expert by layer, over all routers of a mesh."""
    layers: dict[int, list[float]] = {}
    for router in mesh.get("routers", ()):
        for layer, counts in router.get("expert_tokens", {}).items():
            before = layers.get(int(layer), [0.0] * len(counts))
            layers[int(layer)] = [a + b for a, b in zip(before, counts, strict=True)]
    return dict(sorted(layers.items()))


def balancedness(loads: Sequence[float]) -> float:
    """Mean over max: 1 is level, 1/n is everything in one place; 1 for no load."""
    top = max(loads, default=0.0)
    return sum(loads) / len(loads) / top if top else 1.0


Parts = Sequence[tuple[tuple[str, str], Mapping[str, Any]]]  # (mesh, id of the part), its figures


def _parts(views: Mapping[str, Mapping[str, Any]], kind: str, id_name: str) -> Parts:
    return [((name, str(part[id_name])), part) for name, view in views.items() for part in view.get(kind, ())]


def _exchange(routers: Parts) -> list[Metric]:
    families: list[Metric] = []
    for part in ("dispatch", "combine"):
        labels = ["mesh", "router"]
        seconds = HistogramMetricFamily(f"{PREFIX}{part}_seconds", f"Time in a layer's {part}.", labels=labels)
        sent = CounterMetricFamily(f"{PREFIX}{part}_bytes", f"Bytes of {part}.", labels=labels)
        for router, figures in routers:
            if "exchange" not in figures:
                continue
            data = figures["exchange"][f"{part}_s"]
            seen, buckets = 0, []
            for bound, count in zip([*data["bounds"], None], data["counts"], strict=True):
                seen += count
                buckets.append(("+Inf" if bound is None else str(float(bound)), seen))
            seconds.add_metric(router, buckets, data["sum"])
            sent.add_metric(router, figures["exchange"][f"{part}_bytes"])
        families += [seconds, sent]
    return families


def _experts(views: Mapping[str, Mapping[str, Any]]) -> list[Metric]:
    """Tokens by layer and group of experts, and how level each layer's experts are."""
    tokens = CounterMetricFamily(
        PREFIX + "expert_tokens", "Pairs sent to experts, in groups of neighbours.", labels=["mesh", "layer", "experts"]
    )
    level = GaugeMetricFamily(
        PREFIX + "layer_balancedness", "Mean over max of the experts' tokens, 0 to 1.", labels=["mesh", "layer"]
    )
    layers = [(mesh, *one) for mesh, view in sorted(views.items()) for one in expert_tokens(view).items()]
    for mesh, layer, counts in layers:
        size = -(-len(counts) // MAX_EXPERT_GROUPS)
        for begin in range(0, len(counts), size):
            end = min(begin + size, len(counts))
            name = str(begin) if size == 1 else f"{begin}-{end - 1}"
            tokens.add_metric([mesh, str(layer), name], sum(counts[begin:end]))
        level.add_metric([mesh, str(layer)], balancedness(counts))
    return [tokens, level]


def _membership(views: Mapping[str, Mapping[str, Any]]) -> list[Metric]:
    def gauge(name: str, text: str, labels: Sequence[str] = ()) -> GaugeMetricFamily:
        return GaugeMetricFamily(PREFIX + name, text, labels=["mesh", *labels])

    routers = gauge("routers", "Routers known.")
    epoch = gauge("epoch", "Number of the agreed membership and placement.")
    complete = gauge("mesh_complete", "1 when every expert has a holder.")
    target = gauge("target_shards", "Shards wanted.")
    level = gauge("balancedness", "Mean over max of the serving shards' pairs, 0 to 1.")
    states = gauge("shards", "Shards by state.", ["state"])
    rebalances = CounterMetricFamily(PREFIX + "rebalances", "Placements changed to level the load.", labels=["mesh"])
    for mesh, view in views.items():
        routers.add_metric([mesh], len(view.get("routers", ())))
        if "epoch" not in view:  # its supervisor is away
            continue
        shards = view.get("shards", ())
        epoch.add_metric([mesh], view["epoch"])
        complete.add_metric([mesh], float(bool(view.get("complete"))))
        target.add_metric([mesh], view.get("target_shards", 0))
        level.add_metric(
            [mesh], balancedness([float(s["pairs"]) for s in shards if s.get("state") == "serving" and "pairs" in s])
        )
        for state in ("serving", "standby", "silent", "unreachable"):
            states.add_metric([mesh, state], sum(s.get("state") == state for s in shards))
        rebalances.add_metric([mesh], float(view.get("num_rebalances", 0)))
    return [routers, epoch, complete, target, level, states, rebalances]
