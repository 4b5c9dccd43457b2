"""The planner's entry for one process on this machine, from a few small measurements.

Kernels: seconds of a matrix of 5.8 M weights at 1, 8 and 32 rows, alone and in one process for each core, and of
attention. Engine: steps of `thin-8`, with 2 and 8 layers and with 1 and 3 shards, whose weights take next to no time:
what remains is overheads and the exchange. Nothing of `small` or `mid` goes in.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from cluster.planner import Device, Layout, ModelShape, Targets, step_times
from tests.bench.checkpoints import SHAPES, checkpoint
from tests.bench.mesh import Arrangement, Mesh

NUM_OUTPUTS, NUM_INPUTS = 2816, 2048
SET_BYTES = 640e6  # of the matrices: more than the caches hold, also those of a large server
ROWS = (1, 8, 32)
CONTEXT = 64  # about, of the thin steps
LAYERS = (2, 8)


def shape_of(name: str, precision: str, num_layers: int | None = None) -> ModelShape:
    """A model of SHAPES as served on CPU: float32 KV; rows go as float32 and come back as float64."""
    values = SHAPES[name]
    layers = num_layers or values["num_hidden_layers"]
    return ModelShape(
        hidden_size=values["hidden_size"],
        num_layers=layers,
        num_moe_layers=layers,
        num_heads=values["num_attention_heads"],
        num_kv_heads=values["num_key_value_heads"],
        head_dim=values["hidden_size"] // values["num_attention_heads"],
        num_experts=values["num_experts"],
        top_k=values["num_experts_per_tok"],
        expert_size=values["moe_intermediate_size"],
        shared_size=values["shared_expert_intermediate_size"],
        dense_size=values["intermediate_size"],
        vocab_size=values["vocab_size"],
        weight_bytes={"bf16": 2.0, "bf16 activations": 2.0, "int8": 1.0, "int4": 0.55}[precision],
        kv_bytes=2.0 if precision == "bf16 activations" else 4.0,
        row_bytes=6.0,
    )


def kernel_times(quantization: str | None) -> dict[str, Any]:
    """Seconds: {"rows": {rows: a matrix}, "together": a matrix at 1 row on every core at once}, {"kv_bandwidth"}."""
    alone = _in_processes(1, quantization)[0]
    together = _in_processes(os.cpu_count() or 1, quantization)
    return {**alone, "together": max(one["rows"][1] for one in together)}


def _in_processes(count: int, quantization: str | None) -> list[dict[str, Any]]:
    context = multiprocessing.get_context("spawn")
    barrier, answers = context.Barrier(count), context.Queue()
    processes = [context.Process(target=_time_kernels, args=(barrier, answers, quantization)) for _ in range(count)]
    for process in processes:
        process.start()
    results = [answers.get(timeout=300) for _ in processes]
    for process in processes:
        process.join()
    return results


def _time_kernels(barrier: Any, answers: Any, quantization: str | None) -> None:
    import torch

    from model.attention import paged_attention_reference
    from model.kernels import select_kernels
    from model.kv_cache import lay_out_keys
    from model.linear import DenseWeight, Weight, linear
    from model.native.shared_object import load_shared_object
    from model.quantize import quantize_int4, quantize_int8
    from tests.model.native.pieces import NativePieces

    torch.set_num_threads(1)
    kernels = select_kernels()
    matrix = torch.randn(NUM_OUTPUTS, NUM_INPUTS).mul_(NUM_INPUTS**-0.5).to(torch.bfloat16)
    weight: Weight = DenseWeight(matrix)
    if quantization is not None:
        weight = quantize_int8(matrix) if quantization == "int8" else quantize_int4(matrix)
    packed = [kernels.compact(kernels.pack_weight(weight))]
    while sum(one.num_bytes for one in packed) < SET_BYTES:
        packed.append(kernels.compact(kernels.pack_weight(weight)))
    rows: dict[int, float] = {}
    for num_rows in ROWS:
        x = torch.randn(num_rows, NUM_INPUTS)
        barrier.wait()
        rows[num_rows] = _median_s(lambda x=x: [linear(x, one) for one in packed]) / len(packed)
    num_seqs, context, heads, size, block = 16, 512, 16, 128, 16
    num_blocks = num_seqs * context // block
    arguments = (
        torch.randn(num_seqs, heads, size),
        lay_out_keys(torch.randn(num_blocks, heads, block, size)),
        torch.randn(num_blocks, heads, block, size),
        torch.arange(num_blocks, dtype=torch.int32).view(num_seqs, -1),
        torch.arange(num_seqs + 1, dtype=torch.int32),
        torch.full((num_seqs,), context, dtype=torch.int32),
    )
    shared_object = load_shared_object()
    attend = NativePieces(shared_object).paged_attention if shared_object else paged_attention_reference
    attention_s = _median_s(lambda: attend(*arguments, None, 0.1))
    answers.put({"rows": rows, "kv_bandwidth": 2 * 4 * num_seqs * context * heads * size / attention_s})


def _median_s(function: Callable[[], object], repeats: int = 9) -> float:
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        function()
        times.append(time.perf_counter() - began)
    return sorted(times)[repeats // 2]


def kernel_device(times: dict[str, Any], weight_bytes: float) -> Device:
    """Bandwidth, FLOP/s and their overlap from the times: reading + (1 - overlap) * computing at 1 row, computing +
    (1 - overlap) * reading at 32."""
    size = NUM_OUTPUTS * NUM_INPUTS
    one_s, eight_s, many_s = (times["rows"][rows] for rows in ROWS)
    row_s = max((many_s - eight_s) / (ROWS[2] - ROWS[1]), many_s / ROWS[2] / 4)
    share = 0.5
    for _ in range(20):
        reading_s = one_s - share * row_s
        share = min(max((many_s - ROWS[2] * row_s) / reading_s, 0.0), 1.0)
    num_cores = os.cpu_count() or 1
    return Device(
        name="here",
        memory_bytes=1e12,
        bandwidth=size * weight_bytes / reading_s,
        flops=2 * size / row_s,
        network=1e12,
        latency_s=0.0,
        overhead_s=0.0,
        overlap=1 - share,
        efficiency=1.0,
        kv_bandwidth=times["kv_bandwidth"],
        host_cores=num_cores,
        host_bandwidth=num_cores * size * weight_bytes / (times["together"] - share * row_s),
    )


def thin_steps() -> dict[str, dict[str, float]]:
    """Seconds of steps of thin-8 in bf16: by "layers/shards", then batch."""
    result = {}
    for layers, shards in ((LAYERS[0], 0), (LAYERS[1], 0), (LAYERS[1], 1), (LAYERS[1], 3)):
        path = checkpoint("thin-8", {"num_hidden_layers": layers})
        with Mesh(path, Arrangement(shards=shards)) as mesh:
            result[f"{layers}/{shards}"] = {
                str(batch): mesh.decode(batch=batch, prompt=32)[0]["step_ms"] / 1e3 for batch in (1, 32)
            }
    return result


def with_overheads(device: Device, steps: dict[str, dict[str, float]]) -> Device:
    """The device with what the thin steps take beyond its kernels' times. `device` is that of bf16."""

    def explained(layers: int, shards: int, batch: int, device: Device) -> float:
        shape = shape_of("thin-8", "bf16", layers)
        targets = Targets(users=batch, context=CONTEXT, tpot_s=1.0)
        return step_times(shape, device, Layout(routers=1, shards=shards), targets).step_s

    def missing(layers: int, shards: int, batch: int, device: Device) -> float:
        return steps[f"{layers}/{shards}"][str(batch)] - explained(layers, shards, batch, device)

    few, many = LAYERS
    layer_s = {b: (missing(many, 0, b, device) - missing(few, 0, b, device)) / (many - few) for b in (1, 32)}
    row_s = max((layer_s[32] - layer_s[1]) / 31, 0.0)
    device = replace(device, row_s=row_s, overhead_s=max(layer_s[1] - row_s, 0.0) / 2)  # once on each side
    rest_s = {b: missing(few, 0, b, device) for b in (1, 32)}
    sequence_s = max((rest_s[32] - rest_s[1]) / 31, 0.0)
    device = replace(device, sequence_s=sequence_s, step_s=max(rest_s[1] - sequence_s, 0.0))
    one_s, three_s = (missing(many, shards, 1, device) / many for shards in (1, 3))
    more_shards = 3 * (1 - (2 / 3) ** 4) - 1  # that a token's four experts reach
    message_s = max((three_s - one_s) / more_shards, 0.0)
    device = replace(device, message_s=message_s, latency_s=max(one_s - message_s, 0.0) / 2)
    rows_s = missing(many, 1, 32, device) / many
    row_bytes = 31 * 512 * 6.0
    return replace(device, network=2 * row_bytes / rows_s if rows_s > 1e-5 else 1e12)


def calibrate(quantizations: tuple[str | None, ...] = (None, "int8", "int4")) -> dict[str, Any]:
    """What was measured: {"kernels": by precision, "steps"}. JSON."""
    kernels = {name or "bf16": kernel_times(name) for name in quantizations}
    for times in kernels.values():
        times["rows"] = {int(rows): seconds for rows, seconds in times["rows"].items()}
    return {"kernels": kernels, "steps": thin_steps()}


def device_for(measured: dict[str, Any], precision: str) -> Device:
    """The planner's entry for a precision, of what `calibrate` measured (also after a passage through JSON)."""

    def kernels(name: str) -> Device:
        times = measured["kernels"][name]
        weight_bytes = shape_of("thin-8", name).weight_bytes
        return kernel_device({**times, "rows": {int(r): s for r, s in times["rows"].items()}}, weight_bytes)

    whole = with_overheads(kernels("bf16"), measured["steps"])
    own = kernels(precision)
    names = ("network", "latency_s", "overhead_s", "row_s", "message_s", "step_s", "sequence_s")
    return replace(own, **{name: getattr(whole, name) for name in names})
