"""What this machine can do at most, and what that allows a checkpoint: the roofline of decoding and prefill.

python -m tests.bench.limits
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster.planner import ModelShape
from tests.bench.checkpoints import cache_directory

SOURCE = Path(__file__).parent / "limits.c"


def measure() -> list[dict[str, Any]]:
    """With one thread and with one for each core: {"threads", "read_gb_s", "float32_gflop_s", "int8_gop_s"}.

    Raises RuntimeError without a C compiler."""
    program = _compiled()
    return [_run(program, threads, megabytes=1024) for threads in sorted({1, os.cpu_count() or 1})]


def beside(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `work` found, with "read_gb_s" and "float32_gflop_s" of all cores: the mean of right before and after it.

    A machine that is shared with others gives now more, now less; figures of different minutes compare by these."""
    program, cores = _compiled(), os.cpu_count() or 1
    before = _run(program, cores, megabytes=512)
    found = work()
    after = _run(program, cores, megabytes=512)
    return {**found, **{name: (before[name] + after[name]) / 2 for name in ("read_gb_s", "float32_gflop_s")}}


def _compiled() -> Path:
    program = cache_directory() / "limits"
    program.parent.mkdir(parents=True, exist_ok=True)
    command = ["cc", "-O3", "-march=native", "-ffast-math", "-fopenmp", str(SOURCE), "-o", str(program)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise RuntimeError(f"limits.c needs a C compiler with OpenMP: {error}") from None
    return program


def _run(program: Path, threads: int, megabytes: int) -> dict[str, Any]:
    environment = {**os.environ, "OMP_PROC_BIND": "false"}
    return dict(json.loads(subprocess.check_output([str(program), str(threads), str(megabytes)], env=environment)))


def decode_limit(shape: ModelShape, batch: int, bytes_per_s: float) -> float:
    """Tokens a second when nothing takes time but reading each weight that a step needs once. Even routing."""
    hit = shape.num_experts * (1 - (1 - shape.top_k / shape.num_experts) ** batch)
    numbers = shape.num_layers * shape.router_layer_params + shape.vocab_size * shape.hidden_size
    numbers += shape.num_moe_layers * hit * shape.expert_params
    return batch * bytes_per_s / (numbers * shape.weight_bytes)


def prefill_limit(shape: ModelShape, flops: float) -> float:
    """Tokens a second when nothing takes time but the multiplications with weights."""
    numbers = shape.num_layers * shape.router_layer_params + shape.num_moe_layers * shape.top_k * shape.expert_params
    return flops / (2 * numbers)


if __name__ == "__main__":
    for line in measure():
        print(json.dumps(line))
