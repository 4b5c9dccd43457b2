"""What a benchmark sends and when: pure functions of a seed."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

# Log-normal (median, sigma) in tokens, like first turns of ShareGPT: mean prompt about 220, mean answer about 200.
SHAREGPT_PROMPT = (70.0, 1.5)
SHAREGPT_ANSWER = (120.0, 1.0)
SHORTEST = 4
LONGEST = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """rate: requests a second, None sends all at once. burstiness: shape of the gamma-distributed gaps, 1 is Poisson;
    None spaces them evenly. prefix_len: tokens that all prompts of a group share; num_prefixes: groups."""

    num_prompts: int
    rate: float | None = None
    burstiness: float | None = 1.0
    dataset: Literal["sharegpt", "random"] = "sharegpt"
    input_len: int = 128
    output_len: int = 64
    range_ratio: float = 0.0
    prefix_len: int = 0
    num_prefixes: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_prompts < 1:
            raise ValueError(f"num_prompts={self.num_prompts} must be at least 1")
        if self.rate is not None and self.rate <= 0:
            raise ValueError(f"request_rate={self.rate} must be above 0; inf sends all at once")
        if self.burstiness is not None and self.burstiness <= 0:
            raise ValueError(f"burstiness={self.burstiness} must be above 0; 1 gives Poisson arrivals")
        if not 0 <= self.range_ratio < 1:
            raise ValueError(f"random_range_ratio={self.range_ratio} must lie in [0, 1)")
        if self.input_len < 1 or self.output_len < 1 or self.prefix_len < 0 or self.num_prefixes < 1:
            raise ValueError("lengths and num_prefixes must be at least 1, prefix_len at least 0")


@dataclass(frozen=True, slots=True)
class Job:
    """One request: when to send it, in seconds from the start, its prompt, and how many tokens to write."""

    at_s: float
    prompt_ids: list[int]
    max_tokens: int


def jobs(workload: Workload, vocabulary: Sequence[int], max_model_len: int) -> list[Job]:
    """The same for the same arguments. Raises ValueError where the context can't hold the prompts."""
    room = max_model_len - workload.prefix_len - 2
    if room < 1:
        raise ValueError(f"random_prefix_len={workload.prefix_len} leaves no room in {max_model_len} tokens of context")
    draw = random.Random(workload.seed)
    prefixes = [draw.choices(vocabulary, k=workload.prefix_len) for _ in range(workload.num_prefixes)]
    result = []
    for at_s in arrivals(workload, draw):
        num_in, num_out = _lengths(workload, draw)
        num_in = min(num_in, room)
        num_out = min(num_out, max_model_len - workload.prefix_len - num_in - 1)
        prompt_ids = [*draw.choice(prefixes), *draw.choices(vocabulary, k=num_in)]
        result.append(Job(at_s, prompt_ids, max(1, num_out)))
    return result


def arrivals(workload: Workload, draw: random.Random) -> list[float]:
    """Times from the start; the first is 0."""
    if workload.rate is None:
        return [0.0] * workload.num_prompts
    mean_s, times = 1.0 / workload.rate, [0.0]
    for _ in range(workload.num_prompts - 1):
        gap = mean_s
        if workload.burstiness is not None:
            gap = draw.gammavariate(workload.burstiness, mean_s / workload.burstiness)
        times.append(times[-1] + gap)
    return times


def _lengths(workload: Workload, draw: random.Random) -> tuple[int, int]:
    if workload.dataset == "sharegpt":
        pair = [draw.lognormvariate(math.log(median), sigma) for median, sigma in (SHAREGPT_PROMPT, SHAREGPT_ANSWER)]
        return (min(max(int(pair[0]), SHORTEST), LONGEST), min(max(int(pair[1]), SHORTEST), LONGEST))
    spread = workload.range_ratio

    def around(length: int) -> int:
        return draw.randint(max(1, int(length * (1 - spread))), max(1, int(length * (1 + spread))))

    return around(workload.input_len), around(workload.output_len)
