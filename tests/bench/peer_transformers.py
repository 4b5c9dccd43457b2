"""transformers' generate() as JSON, for tests.bench.peers: {"b1", ..., "prefill"} in tokens a second.

python tests/bench/peer_transformers.py CHECKPOINT --batches 1 8
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from typing import Any

import torch
import transformers


class Moments:
    """When each step was done; never stops."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(ids.shape[0], dtype=torch.bool)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--new", type=int, default=16)
    options = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    transformers.logging.set_verbosity_error()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        options.checkpoint, dtype=torch.bfloat16, experts_implementation="grouped_mm"
    ).eval()
    generator = torch.Generator().manual_seed(0)

    def generate(batch: int, prompt: int, new: int) -> tuple[float, list[float]]:
        """Seconds to the first token, and of each step after it."""
        ids = torch.randint(300, 8000, (batch, prompt), generator=generator)
        moments, began = Moments(), time.perf_counter()
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            stopping_criteria=[moments],
        )
        steps = [after - before for before, after in zip(moments.times, moments.times[1:], strict=False)]
        return moments.times[0] - began, steps

    with torch.inference_mode():
        generate(1, 16, 4)
        result = {"prefill": 512 / statistics.median(generate(1, 512, 1)[0] for _ in range(2))}
        for batch in options.batches:
            steps = generate(batch, 128, options.new)[1]
            result[f"b{batch}"] = batch / statistics.median(steps[1:])
    print(json.dumps(result))


if __name__ == "__main__":
    main()
