"""What one node has, for `expertmesh check`: versions, our code, devices, memory, and whether the checkpoint is whole.

    python -m deploy.node_report /models/qwen ...    # prints the report as JSON

Runs in a process of its own, since it imports torch.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PACKAGES = ("model", "cluster", "actors", "deploy")
VERSIONS = ("ray", "torch", "numpy", "safetensors", "tokenizers", "fastapi", "pydantic", "llguidance")
Source = tuple[str, str | None, str | None]  # directory or hub id, the id's revision, the cache if it isn't the Hub's


def code_hash() -> str:
    """Of every source file that this Python would import as ours."""
    digest = hashlib.sha256()
    root = Path(__file__).resolve().parent.parent
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*")):
            if path.suffix in (".py", ".c", ".h") and "recipe" not in path.parts:
                digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def installed_versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in VERSIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "missing"
    return found


def node_report(models: Sequence[Source]) -> dict[str, Any]:
    """JSON-able. Fetches nothing."""
    import torch

    from actors.model_source import cached_model

    meminfo = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines())
    flags = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="ignore")
    report: dict[str, Any] = {
        "host": socket.gethostname(),
        "versions": installed_versions(),
        "code": code_hash(),
        "cpus": len(os.sched_getaffinity(0)),
        "vectors": next((name for name in ("avx512f", "avx2") if name in flags), "none"),
        "memory_bytes": 1024 * int(meminfo["MemAvailable"].split()[0]),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "kernels": _kernels(),
        "checkpoints": [],
        "checkpoint_errors": [],
        "not_fetched": [],  # hub ids
    }
    for model in models:
        if (directory := cached_model(*model)) is None:
            report["not_fetched"].append(model[0])
            continue
        try:
            report["checkpoints"].append(check_checkpoint(directory))
        except ValueError as error:
            report["checkpoint_errors"].append(str(error))
    return report


def check_checkpoint(directory: Path) -> dict[str, Any]:
    """Every file opened, every header and size checked, every tensor that the config asks for found. ValueError."""
    from model.checkpoint import Checkpoint
    from model.config import ModelConfig
    from model.tokenizer import Tokenizer

    config = ModelConfig.from_directory(directory)
    names = set(Checkpoint(directory).names)
    missing = [name for name in _expected(config.num_hidden_layers) if not any(name in n for n in names)]
    for layer_idx in config.moe_layers:
        base = f"layers.{layer_idx}.mlp."
        here = {n.partition(base)[2] for n in names if base in n}
        if "experts.gate_up_proj" not in here:
            held = {n.split(".")[1] for n in here if n.startswith("experts.")}
            missing += [f"{base}experts.{e}" for e in range(config.num_experts) if str(e) not in held]
    if missing:
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise ValueError(f"{directory} lacks {shown}; fetch the checkpoint again")
    if (directory / "tokenizer.json").is_file():
        Tokenizer.from_directory(directory)
    num_bytes = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    return {
        "tensors": len(names),
        "bytes": num_bytes,
        "layers": config.num_hidden_layers,
        "experts": config.num_experts,
    }


def _expected(num_layers: int) -> list[str]:
    parts = ["input_layernorm", "post_attention_layernorm", *(f"self_attn.{x}_proj" for x in "qkvo")]
    return ["embed_tokens", *(f"layers.{i}.{part}." for i in range(num_layers) for part in parts)]


def _kernels() -> str:
    from model.native.shared_object import load_shared_object

    try:
        return "native" if load_shared_object() is not None else "torch"
    except Exception as error:
        return f"torch ({type(error).__name__})"


if __name__ == "__main__":
    print(json.dumps(node_report([(model, None, None) for model in sys.argv[1:]])))
