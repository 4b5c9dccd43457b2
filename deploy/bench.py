"""The load generator: sends jobs on time, notes when each token came, and sums it up."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from deploy.bench_load import Job


@dataclass(slots=True)
class Outcome:
    """One request. token_times: when each piece came, on the clock of `sent`."""

    prompt_tokens: int
    sent: float = 0.0
    token_times: list[float] = field(default_factory=list)
    output_tokens: int = 0
    error: str | None = None

    @property
    def ttft_s(self) -> float:
        return self.token_times[0] - self.sent

    @property
    def e2e_s(self) -> float:
        return self.token_times[-1] - self.sent

    @property
    def itls_s(self) -> list[float]:
        return [b - a for a, b in zip(self.token_times, self.token_times[1:], strict=False)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Where jobs go and what goes with each of them."""

    url: str
    model: str
    api_key: str | None = None
    max_concurrency: int | None = None
    body: Mapping[str, Any] = field(default_factory=dict)


async def run(
    jobs: Sequence[Job], target: Target, *, progress: Callable[[int], None] = lambda done: None
) -> tuple[list[Outcome], float]:
    """Outcomes in the order of the jobs, and the seconds from the first request to the last token."""
    import aiohttp

    headers = {"Authorization": f"Bearer {target.api_key}"} if target.api_key else {}
    seats = asyncio.Semaphore(target.max_concurrency or len(jobs))
    timeout = aiohttp.ClientTimeout(total=None, sock_read=600)
    num_done = 0
    async with aiohttp.ClientSession(
        headers=headers, timeout=timeout, connector=aiohttp.TCPConnector(limit=0), read_bufsize=1 << 18
    ) as session:
        began = time.perf_counter()

        async def one(job: Job) -> Outcome:
            nonlocal num_done
            await asyncio.sleep(max(0.0, began + job.at_s - time.perf_counter()))
            async with seats:
                outcome = await _send(session, target, job)
            num_done += 1
            progress(num_done)
            return outcome

        outcomes = await asyncio.gather(*(one(job) for job in jobs))
    return outcomes, time.perf_counter() - began


async def _send(session: Any, target: Target, job: Job) -> Outcome:
    outcome = Outcome(len(job.prompt_ids), time.perf_counter())
    body = {
        **target.body,
        "model": target.model,
        "prompt": job.prompt_ids,
        "max_tokens": job.max_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    try:
        async with session.post(target.url.rstrip("/").removesuffix("/v1") + "/v1/completions", json=body) as answer:
            if answer.status != 200:
                outcome.error = f"HTTP {answer.status}: {(await answer.text())[:200]}"
                return outcome
            async for line in answer.content:
                if line.startswith(b"data:") and b"[DONE]" not in line:
                    _note(outcome, json.loads(line[5:]))
    except Exception as error:
        outcome.error = f"{type(error).__name__}: {error}"[:200]
    if outcome.error is None and not outcome.token_times:
        outcome.error = "no token came"
    return outcome


def _note(outcome: Outcome, event: dict[str, Any]) -> None:
    if "error" in event:
        outcome.error = str(event["error"].get("message"))[:200]
    elif event.get("choices"):
        outcome.token_times.append(time.perf_counter())
    if event.get("usage"):
        outcome.output_tokens = event["usage"]["completion_tokens"]


def summarize(outcomes: Sequence[Outcome], duration_s: float, percentiles: Sequence[float]) -> dict[str, Any]:
    """Names as in `vllm bench serve`: milliseconds, requests and tokens a second."""
    good = [o for o in outcomes if o.error is None]
    output_tokens = sum(o.output_tokens for o in good)
    prompt_tokens = sum(o.prompt_tokens for o in good)
    result: dict[str, Any] = {
        "duration": duration_s,
        "completed": len(good),
        "failed": len(outcomes) - len(good),
        "total_input_tokens": prompt_tokens,
        "total_output_tokens": output_tokens,
        "request_throughput": len(good) / duration_s,
        "output_throughput": output_tokens / duration_s,
        "total_token_throughput": (prompt_tokens + output_tokens) / duration_s,
        "errors": sorted({o.error for o in outcomes if o.error is not None})[:5],
    }
    series = {
        "ttft": [o.ttft_s for o in good],
        "tpot": [(o.e2e_s - o.ttft_s) / (o.output_tokens - 1) for o in good if o.output_tokens > 1],
        "itl": [itl for o in good for itl in o.itls_s],
        "e2el": [o.e2e_s for o in good],
    }
    for name, values in series.items():
        result[f"mean_{name}_ms"] = 1e3 * sum(values) / len(values) if values else None
        for percent in percentiles:
            result[f"p{percent:g}_{name}_ms"] = 1e3 * float(np.percentile(values, percent)) if values else None
    return result
