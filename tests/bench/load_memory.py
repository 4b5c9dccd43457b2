"""How much memory loading takes at its peak, against the weights that stay, as a markdown table.

    python -m tests.bench.load_memory --megabytes 400

Makes a random bfloat16 checkpoint of about that size and loads from it what a router holds (all but the routed experts)
and what one of two shards holds. The peak is the process' own high-water mark (VmHWM of Linux, reset before each load)
above what it held before.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import gc
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from model.checkpoint import Checkpoint
from model.config import ModelConfig
from model.kernels import select_kernels
from model.load import Loader
from tests.bench.quantization import RANDOM, resident_bytes
from tests.gptq import write_gptq
from tests.random_checkpoint import write_random_checkpoint

GPTQ_GROUP = 64
BYTES_AT_FULL_SIZE = 447e6  # of the checkpoint "small"


def measure(checkpoint: Path, part: str, quantization: str | None, dtype: str | None) -> tuple[int, int]:
    """Bytes that stay after loading a part, and bytes at the peak."""
    config = dataclasses.replace(ModelConfig.from_directory(checkpoint), dtype=dtype)
    kernels = select_kernels()

    def load_router() -> Any:
        loader = Loader(Checkpoint(checkpoint), config, quantization, kernels=kernels)
        decoder = loader.decoder()
        return decoder.embedding, decoder.layers, decoder.norm, loader.head(decoder)

    def load_shard() -> Any:
        loader = Loader(Checkpoint(checkpoint), config, quantization, kernels=kernels)
        return [
            loader.expert(layer_idx, expert_id)
            for layer_idx in config.moe_layers
            for expert_id in range(0, config.num_experts, 2)
        ]

    load = load_router if part == "router" else load_shard
    peak_of(load)  # the first time, code of the libraries comes into memory too
    return peak_of(load)


def peak_of(load: Callable[[], Any]) -> tuple[int, int]:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # or freed memory of an earlier load would be used again, and not counted
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again at what is held now
    before = _status_bytes("VmRSS")
    loaded = load()
    return resident_bytes(loaded), _status_bytes("VmHWM") - before


def _status_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def rows(scratch: Path, megabytes: float) -> Iterator[tuple[str, str, int, int]]:
    """(checkpoint and weights, part, bytes that stay, bytes at the peak)."""
    scale = megabytes * 1e6 / BYTES_AT_FULL_SIZE
    small = RANDOM["small"]
    values = {
        **small,
        "vocab_size": int(small["vocab_size"] * scale),
        "num_hidden_layers": 2,
        "max_position_embeddings": 512,
    }
    values["num_experts"] = max(4, int(2 * small["num_experts"] * scale))
    values["shared_expert_intermediate_size"] = int(2 * small["shared_expert_intermediate_size"] * scale) // 64 * 64
    plain = write_random_checkpoint(scratch / "plain", values)
    fused = write_random_checkpoint(scratch / "fused", values, fused=True)
    write_gptq(plain, scratch / "gptq", GPTQ_GROUP)
    write_random_checkpoint(scratch / "wide", values, dtype=torch.float32)
    for name, path, quantization, dtype in (
        ("bfloat16", plain, None, None),
        ("bfloat16, fused", fused, None, None),
        ("float32 as bfloat16", scratch / "wide", None, "bfloat16"),
        ("bfloat16 to int8", plain, "int8", None),
        ("bfloat16 to int4", plain, "int4", None),
        ("bfloat16, fused, to int4", fused, "int4", None),
        ("GPTQ int4", scratch / "gptq", None, None),
        ("GPTQ int4, embeddings to int8", scratch / "gptq", "int8", None),
    ):
        for part in ("router", "shard"):
            yield name, part, *measure(path, part, quantization, dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=400.0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print("| checkpoint and weights | process | stays, MB | peak, MB | peak / stays |\n|---|---|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as directory:
        for name, part, stays, peak in rows(Path(directory), arguments.megabytes):
            print(f"| {name} | {part} | {stays / 1e6:.1f} | {peak / 1e6:.1f} | {peak / stays:.3f} |", flush=True)


if __name__ == "__main__":
    main()
