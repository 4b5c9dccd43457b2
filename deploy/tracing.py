"""OpenTelemetry traces of requests, after the conventions for generative AI. Off unless an endpoint is set.

    chat demo            the request, from its arrival to the end of its answer; joins the caller's `traceparent`
    ├── queue            until a router first scheduled it
    ├── prefill          from there to its first token (or its last row, for a pooling head)
    ├── decode           from its first token to its last
    └── recovery         a step that a recovery held up; a router that was lost is an event of the request

Each sequence of a request has its own children. Routers tell how long, and this process' clock when, so clocks need
not agree. No span holds text of a prompt or an answer. The standard `OTEL_*` variables (headers, sampler, batching)
hold.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span, Tracer

_OPERATIONS = {"/v1/chat/completions": "chat", "/v1/messages": "chat", "/v1/embeddings": "embeddings"}
_SAMPLING = ("max_tokens", "temperature", "top_p", "top_k", "frequency_penalty", "presence_penalty", "seed")


@dataclass(slots=True)
class RequestNote:
    """What is learnt of a request while it is served, for the line in the log and the span."""

    span: Span | None = None
    tracer: Tracer | None = None
    operation: str = ""
    num_sequences: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    finish_reasons: list[str] = field(default_factory=list)

    def sequence(self, model: str | None, sampling: Mapping[str, Any]) -> SequenceNote:
        """Another sequence begins."""
        self.num_sequences += 1
        if self.span is not None and self.num_sequences == 1:
            self.span.update_name(f"{self.operation} {model}" if model else self.operation)
            attributes = {
                f"gen_ai.request.{name}": sampling[name] for name in _SAMPLING if sampling.get(name) is not None
            }
            self.span.set_attributes({"gen_ai.request.model": model or "", "gen_ai.response.model": model or ""})
            self.span.set_attributes(attributes)
        return SequenceNote(self, self.num_sequences - 1)

    def lost_router(self, router_id: str, num_tokens: int) -> None:
        if self.span is not None:
            self.span.add_event("router lost", {"expertmesh.router": router_id, "expertmesh.tokens_so_far": num_tokens})

    def end(self, status: int, error: str | None) -> None:
        """The answer has ended."""
        span = self.span
        if span is None:
            return
        span.set_attributes(
            {
                "http.response.status_code": status,
                "gen_ai.usage.input_tokens": self.prompt_tokens,
                "gen_ai.usage.cache_read.input_tokens": self.cached_tokens,
                "gen_ai.usage.output_tokens": self.output_tokens,
                "gen_ai.response.finish_reasons": self.finish_reasons,
            }
        )
        failed = status >= 500 or "error" in self.finish_reasons
        if failed or error is not None:
            span.set_attribute("error.type", error or str(status))
        if failed:  # what a client got wrong is no error of the server, say the conventions
            from opentelemetry.trace import StatusCode

            span.set_status(StatusCode.ERROR)
        span.end()


CURRENT: ContextVar[RequestNote | None] = ContextVar("request_note", default=None)


class SequenceNote:
    """One sequence of a request, on its way."""

    def __init__(self, request: RequestNote, idx: int) -> None:
        self._request = request
        self._idx = idx
        self._first_ns: int | None = None

    def started(self, queue_s: float, prefill_s: float) -> None:
        """A router has just brought the first token (after a loss: the first one that it computed itself)."""
        now_ns = time.time_ns()
        scheduled_ns = now_ns - round(prefill_s * 1e9)
        self._add("queue", scheduled_ns - round(queue_s * 1e9), scheduled_ns)
        self._add("prefill", scheduled_ns, now_ns)
        self._first_ns = self._first_ns or now_ns

    def recovered(self, recovery_s: float) -> None:
        """The step that has just come waited so long for a new epoch."""
        now_ns = time.time_ns()
        self._add("recovery", now_ns - round(recovery_s * 1e9), now_ns)

    def end(self, reason: str, num_prompt_tokens: int, num_cached_tokens: int, num_tokens: int) -> None:
        request = self._request
        request.prompt_tokens += num_prompt_tokens
        request.cached_tokens += num_cached_tokens
        request.output_tokens += num_tokens
        request.finish_reasons.append(reason)
        if self._first_ns is not None and num_tokens > 1:
            self._add("decode", self._first_ns, time.time_ns(), {"gen_ai.usage.output_tokens": num_tokens})

    def _add(self, name: str, begin_ns: int, end_ns: int, attributes: Mapping[str, Any] | None = None) -> None:
        if self._request.span is None or self._request.tracer is None:
            return
        from opentelemetry.trace import set_span_in_context

        span = self._request.tracer.start_span(
            name,
            set_span_in_context(self._request.span),
            attributes={"expertmesh.sequence": self._idx, **(attributes or {})},
            start_time=begin_ns,
        )
        span.end(end_ns)


class Tracing:
    """Makes the spans of requests and sends them to the exporter in the background."""

    def __init__(self, exporter: SpanExporter, version: str) -> None:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        self._provider = TracerProvider(
            resource=Resource.create({"service.name": "expertmesh", "service.version": version})
        )
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("expertmesh", version)

    def begin(self, path: str, headers: Mapping[str, str], request_id: str) -> RequestNote:
        """A request has arrived."""
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        is_text = "completion" in path or "generation" in path
        operation = _OPERATIONS.get(path, "text_completion" if is_text else path[1:65])
        span = self._tracer.start_span(
            operation,
            TraceContextTextMapPropagator().extract(headers),
            SpanKind.SERVER,
            {
                "gen_ai.operation.name": operation,
                "gen_ai.provider.name": "expertmesh",
                "http.request.method": "POST",
                "url.path": path,
                "expertmesh.request_id": request_id,
            },
        )
        return RequestNote(span, self._tracer, operation)

    def close(self) -> None:
        """Sends what is left."""
        self._provider.shutdown()


def exporter_to(endpoint: str | None) -> SpanExporter | None:
    """None without an endpoint. Raises ValueError where the exporter is not installed."""
    if endpoint is None:
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError:
        raise ValueError(
            f"server.otlp_traces_endpoint = {endpoint!r} needs the OTLP exporter; pip install 'expertmesh[otel]'"
        ) from None
    return OTLPSpanExporter(endpoint=endpoint)
