"""What a running service does to waiting people: the prefix cache's gain, and streams beside a long prompt.

    python -m tests.bench.latency http://127.0.0.1:8000 [--prompt 4000] [--streams 8] [--rounds 5]

The model must take the long prompt. Every figure is of one run on this machine, shared with whatever else runs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx

TOKEN_IDS = range(300, 4000)


def stream(client: httpx.Client, url: str, **body: Any) -> Iterator[list[int]]:
    """The token ids of each event of a completion."""
    body = {"stream": True, "temperature": 0, "ignore_eos": True, "return_token_ids": True, **body}
    with client.stream("POST", url + "/v1/completions", json=body) as answer:
        assert answer.status_code == 200, answer.read()
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                yield [one for choice in json.loads(line[6:])["choices"] for one in choice["token_ids"]]


def first_token(client: httpx.Client, url: str, prompt: list[int], **body: Any) -> tuple[float, list[int]]:
    """Seconds to the first token, and all tokens."""
    started, first_s, tokens = time.perf_counter(), None, []
    for new in stream(client, url, prompt=prompt, max_tokens=16, **body):
        if new and first_s is None:
            first_s = time.perf_counter() - started
        tokens += new
    assert first_s is not None
    return first_s, tokens


def prefix_cache(url: str, rounds: int, rng: random.Random) -> None:
    """A system prompt of 1,000 tokens that two users share; the second user's tokens also without the cache."""
    ratios, same = [], True
    with httpx.Client(timeout=300) as client:
        for i in range(rounds):
            system = rng.choices(TOKEN_IDS, k=1000)
            users = [rng.choices(TOKEN_IDS, k=20) for _ in range(2)]
            cold_s, _ = first_token(client, url, system + users[0])
            warm_s, tokens = first_token(client, url, system + users[1])
            alone_s, expected = first_token(client, url, system + users[1], cache_salt=f"{i} {rng.random()}")
            same = same and tokens == expected
            ratios.append(warm_s / cold_s)
            print(
                f"  TTFT first {cold_s * 1e3:7.1f} ms, second {warm_s * 1e3:7.1f} ms ({warm_s / cold_s:.3f}), "
                f"second without the cache {alone_s * 1e3:7.1f} ms"
            )
    print(f"prefix cache: second / first {statistics.median(ratios):.3f} (median), identical tokens: {same}")


@dataclass
class Listener:
    """Asks for one stream after another; keeps the moments of each one's tokens."""

    streams: list[list[float]] = field(default_factory=list)
    stopping: bool = False

    def listen(self, url: str, prompt: list[int]) -> None:
        with httpx.Client(timeout=300) as client:
            while not self.stopping:
                moments: list[float] = []
                self.streams.append(moments)
                for new in stream(client, url, prompt=prompt, max_tokens=2000):
                    if new:
                        moments.append(time.perf_counter())
                    if self.stopping:
                        return

    def gaps(self, begin: float, end: float) -> list[float]:
        """Gaps between a stream's tokens that touch the interval."""
        pairs = [pair for moments in self.streams for pair in itertools.pairwise(moments)]
        return [after - before for before, after in pairs if after > begin and before < end]


def p99(values: list[float]) -> float:
    return sorted(values)[min(len(values) - 1, int(0.99 * len(values)))]


def beside_a_prefill(url: str, num_prompt: int, num_streams: int, rounds: int, rng: random.Random) -> None:
    """Gaps between the tokens of running streams, usual ones and those while a long prompt is read."""
    listeners = [Listener() for _ in range(num_streams)]
    threads = [
        threading.Thread(target=one.listen, args=(url, rng.choices(TOKEN_IDS, k=64)), daemon=True) for one in listeners
    ]
    for thread in threads:
        thread.start()
    time.sleep(4.0)
    ratios = []
    with httpx.Client(timeout=300) as client:
        for _ in range(rounds):
            began = time.perf_counter()
            time.sleep(3.0)
            sent = time.perf_counter()
            prefill_s, _ = first_token(client, url, rng.choices(TOKEN_IDS, k=num_prompt))
            read = sent + prefill_s
            usual = [gap for one in listeners for gap in one.gaps(began, sent)]
            beside = [gap for one in listeners for gap in one.gaps(sent, read)]
            ratios.append(p99(beside) / p99(usual))
            print(
                f"  usual p50 {statistics.median(usual) * 1e3:6.1f} p99 {p99(usual) * 1e3:6.1f} ms; "
                f"beside the prefill p50 {statistics.median(beside) * 1e3:6.1f} p99 {p99(beside) * 1e3:6.1f} "
                f"max {max(beside) * 1e3:6.1f} ms ({ratios[-1]:.2f}), "
                f"which took {prefill_s:.2f} s ({num_prompt / prefill_s:.0f} tokens/s)"
            )
    for one in listeners:
        one.stopping = True
    for thread in threads:
        thread.join(30)
    print(f"ITL p99 beside a prefill of {num_prompt}: {statistics.median(ratios):.2f} times the usual (median)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--prompt", type=int, default=4000)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=None)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    prefix_cache(options.url, options.rounds, rng)
    beside_a_prefill(options.url, options.prompt, options.streams, options.rounds, rng)


if __name__ == "__main__":
    main()
