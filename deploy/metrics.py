"""GET /metrics: what this ingress measured, what its fellow ingresses did, and what routers and shards tell.

Names and buckets are vLLM's with our prefix, so that its dashboards need little change. Counters and histograms of the
ingress are summed over all ingresses (actors.ledger keeps the others'), so it does not matter which one is scraped;
those of routers and shards carry their id. No Prometheus server is needed, and none is started.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Self

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import generate_latest
from prometheus_client.metrics_core import Metric

from actors.ledger import Totals, add
from deploy.mesh_metrics import PREFIX, mesh_families
from deploy.tracing import CURRENT, RequestNote, SequenceNote

if TYPE_CHECKING:
    from actors.request import Chunk

TTFT_BUCKETS_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
    *(20.0, 40.0, 80.0, 160.0, 640.0),
)
# vLLM's, and finer ones below: a small model on a CPU takes milliseconds.
ITL_BUCKETS_S = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0),
    *(2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
E2E_BUCKETS_S = (
    *(0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0),
)
LENGTH_BUCKETS = tuple(float(m * 10**e) for e in range(6) for m in (1, 2, 5))


class Watch:
    """One sequence on its way, as a context. Call saw() for each chunk, and set `ended` to "stop" or "length".

    What leaves without having ended is an abort when its reader left, and an error else."""

    def __init__(self, metrics: ServingMetrics, num_prompt_tokens: int, note: SequenceNote) -> None:
        self._metrics = metrics
        self._note = note
        self._num_prompt_tokens = num_prompt_tokens
        self._num_cached_tokens = 0
        self._num_tokens = 0
        self._started = self._last = metrics.clock()
        self._first: float | None = None
        self.ended: str | None = None
        metrics.running.inc()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        has_left = kind is not None and issubclass(kind, asyncio.CancelledError | GeneratorExit)
        self._end(self.ended or ("abort" if has_left else "error"))

    def saw(self, chunk: Chunk) -> None:
        """It came just now."""
        if chunk.recovery_s:
            self._note.recovered(chunk.recovery_s)
        if chunk.timing is not None:
            self._note.started(*chunk.timing)
            if self._first is None:  # a replay waits and prefills once more
                self._metrics.queue.observe(chunk.timing[0])
                self._metrics.prefill.observe(chunk.timing[1])
        self._num_cached_tokens = max(self._num_cached_tokens, chunk.num_cached_tokens)
        if num_tokens := len(chunk.token_ids):
            self._count(num_tokens)

    def _count(self, num_tokens: int) -> None:
        now = self._metrics.clock()
        if self._first is None:
            self._first = now
            self._metrics.ttft.observe(now - self._started)
            self._metrics.prompt_tokens.inc(self._num_prompt_tokens)
        else:
            self._metrics.itl.observe((now - self._last) / num_tokens)
        self._last = now
        self._num_tokens += num_tokens
        self._metrics.generation_tokens.inc(num_tokens)

    def _end(self, reason: str) -> None:
        metrics = self._metrics
        self._note.end(reason, self._num_prompt_tokens, self._num_cached_tokens, self._num_tokens)
        metrics.running.dec()
        metrics.finished.labels(reason).inc()
        if reason == "error":
            return
        metrics.e2e.observe(self._last - self._started if self._num_tokens else metrics.clock() - self._started)
        metrics.prompt_length.observe(self._num_prompt_tokens)
        metrics.output_length.observe(self._num_tokens)
        if self._first is not None and self._num_tokens > 1:
            metrics.tpot.observe((self._last - self._first) / (self._num_tokens - 1))
            metrics.decode.observe(self._last - self._first)


class ServingMetrics:
    """What one ingress counts. clock: seconds, monotonic."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.registry = registry = CollectorRegistry()

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(PREFIX + name, text, buckets=buckets, registry=registry)

        def counter(name: str, text: str, labels: Iterable[str] = ()) -> Counter:
            return Counter(PREFIX + name, text, tuple(labels), registry=registry)

        self.ttft = histogram("time_to_first_token_seconds", "From admission to the first token.", TTFT_BUCKETS_S)
        self.itl = histogram("inter_token_latency_seconds", "Between two tokens of a sequence.", ITL_BUCKETS_S)
        self.tpot = histogram(
            "request_time_per_output_token_seconds", "Mean over a sequence, without its first token.", ITL_BUCKETS_S
        )
        self.e2e = histogram("e2e_request_latency_seconds", "From admission to the last token.", E2E_BUCKETS_S)
        self.queue = histogram(
            "request_queue_time_seconds", "Until a router first scheduled a sequence.", TTFT_BUCKETS_S
        )
        self.prefill = histogram("request_prefill_time_seconds", "From there to its first token.", TTFT_BUCKETS_S)
        self.decode = histogram("request_decode_time_seconds", "From its first token to its last.", E2E_BUCKETS_S)
        self.prompt_length = histogram("request_prompt_tokens", "Prompt tokens of a sequence.", LENGTH_BUCKETS)
        self.output_length = histogram("request_generation_tokens", "Output tokens of a sequence.", LENGTH_BUCKETS)
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens of sequences that got their first token.")
        self.generation_tokens = counter("generation_tokens", "Output tokens.")
        self.finished = counter("request_success", "Sequences by how they ended.", ["finished_reason"])
        self.rejected = counter("rejected_requests", "Requests answered with 401, 429 or 503; no probes.", ["code"])
        self.replays = counter("replays", "Sequences sent again after their router was lost.")
        self.running = Gauge(
            PREFIX + "ingress_requests", "Sequences on their way through ingresses.", registry=registry
        )
        for reason in ("stop", "length", "abort", "error"):
            self.finished.labels(reason)
        for code in ("queue_full", "rate_limit_exceeded", "invalid_api_key", "no_router"):
            self.rejected.labels(code)

    def watch(self, num_prompt_tokens: int, model: str | None, sampling: Mapping[str, Any]) -> Watch:
        """A sequence of the request that is being served begins."""
        note = CURRENT.get() or RequestNote()
        return Watch(self, num_prompt_tokens, note.sequence(model, sampling))

    def totals(self) -> Totals:
        """Every sample, in a form that travels."""
        return {
            family.name: [
                (sample.name, dict(sample.labels), float(sample.value))
                for sample in family.samples
                if not sample.name.endswith("_created")
            ]
            for family in self.registry.collect()
        }

    def families(self, others: Totals) -> list[Metric]:
        """Ours and others' added up."""
        summed, families = add(self.totals(), others), []
        for own in self.registry.collect():
            family = Metric(own.name, own.documentation, own.type)
            for sample in summed[own.name]:
                family.add_sample(*sample)
            families.append(family)
        return families


class _Fixed:
    """A collector of families made beforehand."""

    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> list[Metric]:
        return self._families


def render(metrics: ServingMetrics, others: Totals, mesh: Mapping[str, Any]) -> bytes:
    """The text exposition of everything. mesh: what GET /mesh shows."""
    registry = CollectorRegistry()
    registry.register(_Fixed([*metrics.families(others), *mesh_families(mesh)]))
    return generate_latest(registry)
