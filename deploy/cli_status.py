"""`expertmesh status`: what the service does right now, in a terminal."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from deploy.cli_options import LOCAL_URL, ApiKey, MeshModel, Url, mesh_path
from deploy.http_client import Client
from deploy.mesh_metrics import PREFIX, expert_tokens

BLOCKS = " ▁▂▃▄▅▆▇█"


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One look at the service. values: sample name -> sum over its labels; buckets: histogram -> bound -> count."""

    at: float
    values: dict[str, float]
    buckets: dict[str, dict[float, float]]
    mesh: dict[str, Any]


def status(
    url: Url = LOCAL_URL,
    api_key: ApiKey = None,
    once: Annotated[bool, typer.Option("--once", help="Print one view and end.")] = False,
    model: MeshModel = None,
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks.")] = 1.0,
) -> None:
    """Live view: tokens/s, TTFT, ITL, KV use, shards, and where the experts' tokens go. Ctrl-C ends it."""
    client = Client(url=url, api_key=api_key, timeout_s=10.0)
    with contextlib.suppress(KeyboardInterrupt):
        before = look(client, model)
        time.sleep(min(interval, 0.5))
        now = look(client, model)
        if once:
            Console().print(view(before, now))
            return
        with Live(view(before, now), refresh_per_second=4, screen=True) as live:
            while True:
                time.sleep(interval)
                before, now = now, look(client, model)
                live.update(view(before, now))


def look(client: Client, model: str | None) -> Snapshot:
    """Of a model's mesh alone, where one is named; what ingresses count is of all. Raises CallError."""
    mesh = client.get(mesh_path(model))
    values: dict[str, float] = {}
    buckets: dict[str, dict[float, float]] = {}
    for family in text_string_to_metric_families(client.text("/metrics")):
        for sample in family.samples:
            if model and sample.labels.get("mesh", mesh.get("mesh")) != mesh.get("mesh"):
                continue
            name = sample.name.removeprefix(PREFIX)
            if name.endswith("_bucket"):
                counts = buckets.setdefault(name.removesuffix("_bucket"), {})
                bound = float(sample.labels["le"])
                counts[bound] = counts.get(bound, 0.0) + sample.value
            elif name == "kv_cache_usage_perc":
                values[name] = max(values.get(name, 0.0), sample.value)
            else:
                values[name] = values.get(name, 0.0) + sample.value
    return Snapshot(time.monotonic(), values, buckets, mesh)


def rate(before: Snapshot, now: Snapshot, name: str) -> float:
    return max(0.0, now.values.get(name, 0.0) - before.values.get(name, 0.0)) / max(now.at - before.at, 1e-9)


def quantile(before: Snapshot | None, now: Snapshot, histogram: str, q: float) -> float | None:
    """As PromQL's histogram_quantile over what came between two looks; None where nothing did."""
    counts = now.buckets.get(histogram, {})
    earlier = before.buckets.get(histogram, {}) if before is not None else {}
    rows = sorted((bound, count - earlier.get(bound, 0.0)) for bound, count in counts.items())
    if not rows or rows[-1][1] <= 0:
        return None
    wanted, low, seen = q * rows[-1][1], 0.0, 0.0
    for bound, count in rows:
        if count >= wanted:
            if bound == float("inf"):
                return low
            return low + (bound - low) * (wanted - seen) / max(count - seen, 1e-9)
        low, seen = bound, count
    return low


def heat_row(loads: Sequence[float], width: int = 64) -> str:
    """One block a group of neighbours: the fuller, the more tokens, against the busiest group."""
    size = max(1, -(-len(loads) // width))
    groups = [sum(loads[i : i + size]) / len(loads[i : i + size]) for i in range(0, len(loads), size)]
    top = max(groups, default=0.0)
    return "".join(BLOCKS[0 if not top else round(g / top * (len(BLOCKS) - 1))] for g in groups)


def view(before: Snapshot, now: Snapshot) -> RenderableType:
    mesh = now.mesh
    parts: list[RenderableType] = [_headline(before, now), _shards(before, now)]
    if layers := expert_tokens(mesh):
        heat = Text()
        for layer, loads in layers.items():
            heat.append(f"{layer:>4} ", style="dim")
            heat.append(heat_row(loads) + "\n", style="cyan")
        heat.rstrip()
        parts.append(Panel(heat, title="tokens by layer and expert", title_align="left", border_style="dim"))
    history = mesh.get("history", ())[-3:]
    if history:
        parts.append(Text("\n".join(f"epoch {h['epoch']}: {h['reason']}" for h in history), style="dim"))
    return Group(*parts)


def one_line(before: Snapshot, now: Snapshot) -> str:
    """The least that `serve` shows while it runs."""
    values, shards = now.values, now.mesh.get("shards", ())
    parts = [
        f"{rate(before, now, 'generation_tokens_total'):.0f} tokens/s",
        f"{values.get('num_requests_running', 0):.0f} running",
        f"{values.get('num_requests_waiting', 0):.0f} waiting",
        f"KV {100 * values.get('kv_cache_usage_perc', 0):.1f} %",
        f"{sum(shard['state'] == 'serving' for shard in shards)} shards",
        f"epoch {now.mesh.get('epoch', '?')} {_state(now.mesh)}",
    ]
    return "  ".join(parts)


def _state(mesh: Mapping[str, Any]) -> str:
    return "no shards" if mesh.get("target_shards") == 0 else "complete" if mesh.get("complete") else "RECOVERING"


def _headline(before: Snapshot, now: Snapshot) -> RenderableType:
    mesh, values = now.mesh, now.values
    state = _state(mesh)
    busy = quantile(before, now, "inter_token_latency_seconds", 0.5) is not None
    since = before if busy else None
    spans = [
        f"{label} p50 {_ms(quantile(since, now, name, 0.5))} p99 {_ms(quantile(since, now, name, 0.99))}"
        for label, name in (("TTFT", "time_to_first_token_seconds"), ("ITL", "inter_token_latency_seconds"))
    ]
    queries = values.get("prefix_cache_queries_total", 0)
    hits = f", prefix {100 * values.get('prefix_cache_hits_total', 0) / queries:.0f} %" if queries else ""
    out, into = (rate(before, now, f"{name}_tokens_total") for name in ("generation", "prompt"))
    load = [
        f"[bold]{out:.0f}[/bold] tokens/s out, {into:.0f} in",
        f"{values.get('num_requests_running', 0):.0f} running, {values.get('num_requests_waiting', 0):.0f} waiting",
        f"KV {100 * values.get('kv_cache_usage_perc', 0):.1f} %{hits}",
    ]
    lines = ["  ".join(load), "  ".join([*spans, f"[dim]{'now' if busy else 'since the start'}[/dim]"])]
    colour = "red" if state == "RECOVERING" else "green"
    title = f"expertmesh  epoch {mesh.get('epoch', '?')}  [{colour}]{state}[/{colour}]"
    if mesh.get("trouble"):
        title += "  " + escape(mesh["trouble"])
    return Panel(Text.from_markup("\n".join(lines)), title=title, title_align="left", border_style="dim")


def _shards(before: Snapshot, now: Snapshot) -> RenderableType:
    table = Table(box=None, header_style="dim", padding=(0, 1), collapse_padding=True, pad_edge=False)
    for name in ("", "state", "host", "pid", "experts", "memory", "tokens/s", "busy"):
        table.add_column(name, justify="left" if name in ("", "state", "host") else "right", no_wrap=True)
    earlier = {s["shard_id"]: s for s in before.mesh.get("shards", ())}
    span = max(now.at - before.at, 1e-9)
    for shard in now.mesh.get("shards", ()):
        was = earlier.get(shard["shard_id"], shard)
        same = was.get("pid") == shard.get("pid")
        tokens = (shard.get("tokens", 0) - was.get("tokens", 0)) / span if same else 0.0
        busy = (shard.get("busy_s", 0) - was.get("busy_s", 0)) / span if same else 0.0
        colour = {"serving": "green", "standby": "yellow"}.get(shard["state"], "red")
        table.add_row(
            shard["shard_id"],
            f"[{colour}]{shard['state']}[/{colour}]",
            shard.get("host", "?"),
            str(shard.get("pid", "")),
            str(shard.get("num_experts", "?")),
            _amount(shard.get("weight_bytes", 0)),
            f"{tokens:.0f}",
            f"{100 * busy:.0f} %",
        )
    for router in now.mesh.get("routers", ()):
        steps, step_s = router.get("num_steps", 0), router.get("step_s", 0.0)
        table.add_row(
            router["router_id"], "[green]router[/green]", router.get("host", "?"), str(router.get("pid", "")), "", "",
            f"{router.get('running', 0)} run", f"{1e3 * step_s / steps:.1f} ms" if steps else "",
        )  # fmt: skip
    return table


def _amount(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.1f} ms"
