"""`expertmesh plan`: how many routers and shards, and what to expect. Computed, not measured."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import typer

from cluster.planner import ModelShape
from deploy.cli_options import fail


def plan(
    model: Annotated[str, typer.Argument(help="Directory or hub id; only its config is read.")],
    device: Annotated[str, typer.Option(help="a100-80g, h100, h20, l40s, rtx4090.")] = "a100-80g",
    devices: Annotated[int, typer.Option(min=2, help="How many of them.")] = 8,
    context: Annotated[int, typer.Option(min=1, help="Tokens of a sequence in the middle of its life.")] = 2048,
    users: Annotated[int, typer.Option(min=1, help="Sequences at once.")] = 256,
    tpot: Annotated[float, typer.Option(help="Most milliseconds between two tokens.")] = 50.0,
    quantization: Annotated[str | None, typer.Option(help="int8 or int4.")] = None,
    memory: Annotated[float | None, typer.Option(help="Device: GB of memory.")] = None,
    bandwidth: Annotated[float | None, typer.Option(help="Device: GB/s of memory.")] = None,
    flops: Annotated[float | None, typer.Option(help="Device: TFLOP/s.")] = None,
    network: Annotated[float | None, typer.Option(help="Device: GB/s to the others.")] = None,
    efficiency: Annotated[float | None, typer.Option(help="Share of these that kernels reach.")] = None,
    skew: Annotated[float, typer.Option(min=0, help="Simulation: how uneven experts are (Zipf), 0 is even.")] = 0.5,
    mtbf: Annotated[float | None, typer.Option(help="Hours between failures of one shard.")] = None,
) -> None:
    """From a model, a device and targets: layouts, throughput, what bounds it, and a simulation of the best."""
    from rich.console import Console
    from rich.table import Table

    from cluster.mesh_simulation import recovery_s, simulate
    from cluster.planner import DEVICES, Targets, most_users, plans
    from deploy.specs import DEMO

    if mtbf is not None and not mtbf > 0:
        fail(f"--mtbf is {mtbf:g}; it must be above 0")
    if device not in DEVICES:
        fail(f"device {device!r} is unknown; choose one of {', '.join(DEVICES)} and change it with --memory and so on")
    hardware = DEVICES[device]
    hardware = replace(
        hardware,
        memory_bytes=hardware.memory_bytes if memory is None else memory * 1e9,
        bandwidth=hardware.bandwidth if bandwidth is None else bandwidth * 1e9,
        flops=hardware.flops if flops is None else flops * 1e12,
        network=hardware.network if network is None else network * 1e9,
    )
    if efficiency is not None:
        hardware = replace(hardware, efficiency=efficiency)
    shape = model_shape(str(DEMO / "model") if model == "demo" else model, quantization)
    targets = Targets(users=users, context=context, tpot_s=tpot / 1e3)
    found = plans(shape, hardware, targets, devices)
    screen = Console(highlight=False)
    if not found:
        need = shape.experts_bytes + shape.router_bytes + users * context * shape.kv_bytes_per_token
        fail(
            f"{devices} x {hardware.name} can't hold it: about {need / 1e9:.0f} GB are needed; add devices, or quantize"
        )
    screen.print(
        f"{devices} x {hardware.name}, {users} users at {context} tokens, TPOT at most {tpot:g} ms. "
        f"Experts {shape.experts_bytes / 1e9:.1f} GB, the rest {shape.router_bytes / 1e9:.1f} GB, KV of all users "
        f"{users * context * shape.kv_bytes_per_token / 1e9:.1f} GB. [bold]Computed, not measured.[/bold]",
        soft_wrap=True,
    )
    table = Table(box=None, header_style="dim", padding=(0, 1), pad_edge=False, collapse_padding=True)
    for name in ("routers", "shards", "replicas", "micro-\nbatches", "TPOT\nms", "tokens/s", "router\nGB", "shard\nGB"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("bound by", no_wrap=True)
    for one in found[:5]:
        colour = "" if one.meets_tpot else "[red]"
        table.add_row(
            str(one.layout.routers), str(one.layout.shards), str(one.layout.replicas), str(one.layout.micro_batches),
            f"{colour}{1e3 * one.times.step_s:.1f}", f"{one.tokens_per_s:.0f}", f"{one.router_bytes_used / 1e9:.1f}",
            f"{one.shard_bytes_used / 1e9:.1f}", one.times.bound_by,
        )  # fmt: skip
    screen.print(table)
    best = found[0]
    most = most_users(shape, hardware, best.layout, targets)
    screen.print(
        f"the first layout holds up to {most} users at this TPOT" if most else "[red]no layout meets the TPOT[/red]"
    )
    seen = simulate(shape, hardware, best.layout, targets, skew=skew, num_steps=30, num_layers=4)
    screen.print(
        f"simulated with skewed experts (Zipf {skew:g}): {seen.tokens_per_s:.0f} tokens/s, step p50 "
        f"{1e3 * seen.step_s[50]:.1f} ms, p99 {1e3 * seen.step_s[99]:.1f} ms, "
        f"fullest shard {seen.imbalance:.2f} x the mean",
        soft_wrap=True,
    )
    if mtbf is not None:
        pause_s, every_s = recovery_s(shape, best.layout), mtbf * 3600 / best.layout.shards
        screen.print(
            f"a shard fails every {every_s / 3600:.1f} h and holds all up for {pause_s:.1f} s: "
            f"{100 * pause_s / every_s:.3f} % of the time"
        )


def model_shape(model: str, quantization: str | None) -> ModelShape:
    """From the config alone; a directory with nothing but config.json is enough. Raises ValueError."""
    from actors.model_source import locate_model
    from model.config import ModelConfig

    config = ModelConfig.from_directory(locate_model(model, files=["config.json"]))
    if quantization not in (None, "int8", "int4"):
        raise ValueError(f"quantization={quantization!r} must be int8 or int4")
    weight_bytes = {"int8": 1.0, "int4": 0.55}.get(quantization or "", 4.0 if config.dtype == "float32" else 2.0)
    return ModelShape(
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        num_moe_layers=len(config.moe_layers),
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        num_experts=config.num_experts,
        top_k=config.num_experts_per_tok,
        expert_size=config.moe_intermediate_size,
        shared_size=config.shared_expert_intermediate_size,
        dense_size=config.intermediate_size,
        vocab_size=config.vocab_size,
        weight_bytes=weight_bytes,
    )
