"""A whole service, started as a person does, and loads on it over HTTP. The same loads serve for any OpenAI server."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.bench import Outcome, Target, run
from deploy.bench_load import Job
from deploy.link import RouterAddress, RouterLink
from tests.ports import free_port

ROOT = Path(__file__).parent.parent.parent
TOKEN = "bench-token"
START_S = 300.0
# Streams -> tokens of a prompt. Prompts are let in slowly beside decodes: 32 long ones would never decode together.
PROMPTS = {1: 128, 8: 128, 32: 32}
TOKEN_IDS = range(300, 8000)  # in every model's vocabulary


@dataclass(frozen=True, slots=True)
class Service:
    url: str
    model: str
    start_s: float


@contextlib.contextmanager
def serving(arguments: Sequence[str], environment: dict[str, str] | None = None) -> Iterator[Service]:
    """`expertmesh serve` with these arguments. Raises RuntimeError with its last words when it doesn't come up."""
    port = free_port()
    command = [sys.executable, "-m", "deploy.cli", "serve", *arguments, "--port", str(port)]
    given = {**os.environ, "EXPERTMESH_MESH__TOKEN": TOKEN, **(environment or {})}
    url, began = f"http://127.0.0.1:{port}", time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=ROOT, env=given) as process:
        try:
            wait_until_ready(f"{url}/ready", process)
            yield Service(url, served_model(url), time.monotonic() - began)
        finally:
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(60)
            process.kill()


def wait_until_ready(url: str, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + START_S
    while time.monotonic() < end:
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5):
            return
        if process.poll() is not None:
            break
        time.sleep(0.2)
    process.kill()
    output = process.stdout.read().decode(errors="replace") if process.stdout else ""
    raise RuntimeError(f"the server did not come up: {output[-1500:]}")


def served_model(url: str) -> str:
    with urllib.request.urlopen(f"{url}/v1/models", timeout=30) as answer:
        return str(json.load(answer)["data"][0]["id"])


def prompts(num: int, length: int, rng: random.Random) -> list[list[int]]:
    """All different, so that no prefix cache helps."""
    return [rng.choices(TOKEN_IDS, k=length) for _ in range(num)]


def send(url: str, model: str, jobs: list[Job], max_concurrency: int | None = None) -> tuple[list[Outcome], float]:
    """Raises RuntimeError when a request fails."""
    target = Target(
        url=url, model=model, max_concurrency=max_concurrency, body={"temperature": 0.0, "ignore_eos": True}
    )
    outcomes, seconds = asyncio.run(run(jobs, target))
    failed = [outcome.error for outcome in outcomes if outcome.error is not None]
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(jobs)} requests failed: {failed[0]}")
    return outcomes, seconds


def decode_rate(outcomes: Sequence[Outcome]) -> float:
    """Tokens a second while all streams were decoding: between the last first token and the first last one."""
    begin = max(outcome.token_times[0] for outcome in outcomes)
    end = min(outcome.token_times[-1] for outcome in outcomes)
    tokens = 0.0
    for outcome in outcomes:
        for_each_event = outcome.output_tokens / len(outcome.token_times)
        tokens += for_each_event * sum(begin < moment <= end for moment in outcome.token_times)
    return tokens / (end - begin)


def figures(url: str, model: str) -> dict[str, Any]:
    """{"prefill", "b1", ...}: tokens a second, medians. Prompts of PROMPTS, the prefill's of 512."""
    rng = random.Random(0)
    send(url, model, [Job(0.0, ids, 4) for ids in prompts(4, 64, rng)])
    result: dict[str, Any] = {}
    rates = []
    for _ in range(3):
        outcomes, _ = send(url, model, [Job(0.0, prompts(1, 512, rng)[0], 1)])
        rates.append(512 / outcomes[0].ttft_s)
    result["prefill"] = statistics.median(rates)
    for batch, length in PROMPTS.items():
        outcomes, _ = send(url, model, [Job(0.0, ids, 64) for ids in prompts(batch, length, rng)])
        result[f"b{batch}"] = decode_rate(outcomes)
    return result


def sixteen_clients(url: str, model: str) -> dict[str, float]:
    """64 requests of 128 -> 64 tokens, 16 at a time, the second of two rounds."""
    rng = random.Random(1)
    for count in (16, 64):
        jobs = [Job(0.0, ids, 64) for ids in prompts(count, 128, rng)]
        outcomes, seconds = send(url, model, jobs, max_concurrency=16)
    return {
        "output_tok_s": sum(outcome.output_tokens for outcome in outcomes) / seconds,
        "ttft_p50_ms": 1e3 * statistics.median(outcome.ttft_s for outcome in outcomes),
    }


# ---- what the HTTP front adds -------------------------------------------------------------------------


def front_overhead(service: Service, streams: int = 64, rounds: int = 3) -> dict[str, Any]:
    """TTFT and ITL p50 in ms over HTTP and over a link straight to the router of the same service, turn by turn.

    Streams begin evenly over two seconds, 16 -> 96 tokens each."""
    with urllib.request.urlopen(f"{service.url}/mesh", timeout=30) as answer:
        router = json.load(answer)["routers"][0]
    address = RouterAddress(router_id=router["router_id"], host=router["host"], port=int(router["port"]))
    rng = random.Random(2)
    seen: dict[str, list[tuple[float, float]]] = {"http": [], "link": []}
    for _ in range(rounds):
        for way, medians in seen.items():
            jobs = [Job(2.0 * i / streams, ids, 96) for i, ids in enumerate(prompts(streams, 16, rng))]
            if way == "http":
                outcomes, _ = send(service.url, service.model, jobs)
            else:
                outcomes = asyncio.run(_over_link(address, jobs))
            ttfts = [outcome.ttft_s for outcome in outcomes]
            itls = [itl for outcome in outcomes for itl in outcome.itls_s]
            medians.append((1e3 * statistics.median(ttfts), 1e3 * statistics.median(itls)))
    result: dict[str, Any] = {"streams": streams}
    for way, medians in seen.items():
        result[f"{way}_ttft_p50_ms"] = statistics.median(ttft for ttft, _ in medians)
        result[f"{way}_itl_p50_ms"] = statistics.median(itl for _, itl in medians)
    for name in ("ttft", "itl"):
        result[f"added_{name}_ms"] = result[f"http_{name}_p50_ms"] - result[f"link_{name}_p50_ms"]
    return result


async def _over_link(address: RouterAddress, jobs: list[Job]) -> list[Outcome]:
    link = await RouterLink.connect(
        address, token=TOKEN, ingress_id=f"bench-{random.random()}", timeout_s=10.0, on_change=lambda: None
    )
    began = time.perf_counter()

    async def one(number: int, job: Job) -> Outcome:
        await asyncio.sleep(max(0.0, began + job.at_s - time.perf_counter()))
        outcome = Outcome(len(job.prompt_ids), time.perf_counter())
        sampling = {"temperature": 0.0, "max_tokens": job.max_tokens, "ignore_eos": True}
        message = {"op": "generate", "request_id": str(number), "prompt_ids": job.prompt_ids, "sampling": sampling}
        queue = link.submit(message)
        while True:
            chunk = await queue.get()
            if chunk is None or chunk.error is not None:
                raise RuntimeError(f"the router ended it: {chunk and chunk.error}")
            if chunk.token_ids:
                outcome.token_times.append(time.perf_counter())
                outcome.output_tokens += len(chunk.token_ids)
            if chunk.finish_reason is not None:
                return outcome

    try:
        return list(await asyncio.gather(*(one(number, job) for number, job in enumerate(jobs))))
    finally:
        await link.close()
