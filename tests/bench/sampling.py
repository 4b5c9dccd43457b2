"""What drawing a step's tokens costs: `python -m tests.bench.sampling`. One thread, 32 rows of Qwen's vocabulary."""

from __future__ import annotations

import statistics
import time
from dataclasses import replace

import torch
from torch import Tensor

from model.kernels import REFERENCE_KERNELS, Kernels, select_kernels
from model.sampler_state import SamplerState, SamplingRow
from model.sampling import sample
from model.sampling_params import SamplingParams

ROWS, VOCABULARY = 32, 151_936
OPTIONS = {
    "greedy": SamplingParams(temperature=0),
    "temperature": SamplingParams(temperature=0.8),
    "top_k 50": SamplingParams(temperature=0.8, top_k=50),
    "top_p 0.95": SamplingParams(temperature=0.8, top_p=0.95),
    "top_k 50, top_p 0.95": SamplingParams(temperature=0.8, top_k=50, top_p=0.95),
    "min_p 0.05": SamplingParams(temperature=0.8, min_p=0.05),
    "greedy, 5 logprobs": SamplingParams(temperature=0, logprobs=5),
    "penalties, top_k 50": SamplingParams(temperature=0.8, top_k=50, repetition_penalty=1.1),
}


def logits_of(kind: str) -> Tensor:
    """peaked: a few hundred tokens have most of the mass, as a language model's; flat: nobody has any."""
    noise = torch.randn(ROWS, VOCABULARY, generator=torch.Generator().manual_seed(0))
    if kind == "flat":
        return noise * 0.5
    return (noise * 2).index_add_(1, torch.arange(0, VOCABULARY, 500), 4 + 3 * noise[:, :304].abs())


def milliseconds(kernels: Kernels, logits_RV: Tensor, params: SamplingParams, repeats: int = 9) -> float:
    """Median of a call of `sample`, without the copy that it edits."""
    prompt = range(0, 100_000, 100)
    rows = [SamplingRow(state=SamplerState(replace(params, seed=seed), prompt)) for seed in range(len(logits_RV))]
    times = []
    for _ in range(repeats):
        copy = logits_RV.clone()
        began = time.perf_counter()
        sample(copy, rows, kernels.draw_tokens)
        times.append(time.perf_counter() - began)
    return 1e3 * statistics.median(times)


def main() -> None:
    torch.set_num_threads(1)
    logits = {kind: logits_of(kind) for kind in ("peaked", "flat")}
    columns = [(name, kernels, kind) for name, kernels in (("torch", REFERENCE_KERNELS), ("native", select_kernels()))
               for kind in logits]  # fmt: skip
    print(f"ms for {ROWS} x {VOCABULARY:,}", *(f"{name} {kind}" for name, _, kind in columns), sep=" | ")
    for name, params in OPTIONS.items():
        times = (milliseconds(kernels, logits[kind], params) for _, kernels, kind in columns)
        print(name, *(f"{each:.1f}" for each in times), sep=" | ", flush=True)


if __name__ == "__main__":
    main()
