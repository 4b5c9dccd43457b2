"""What the answers of OpenAI's completions and chats share: the head, the `usage` object, and the stream."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from typing import Any

from deploy.generation import Delta, TextPlan, stream_all
from deploy.openai_requests import GenerationBody, StreamOptions
from deploy.router_pool import GenerateRequest
from deploy.served_model import ServedModel
from deploy.service import Service
from deploy.sse import DONE, event


def answer_head(
    service: Service, body: GenerationBody, model: ServedModel, answer_id: str, kind: str
) -> dict[str, Any]:
    return {
        "id": answer_id,
        "object": kind,
        "created": int(time.time()),
        "model": body.model or model.names[0],
        "system_fingerprint": service.fingerprint,
    }


class Usage:
    """Tokens of one answer. A prompt counts once, with the first of its choices."""

    def __init__(self, requests: Sequence[GenerateRequest]) -> None:
        self._prompts = {i: len(one.prompt_ids) for i, one in enumerate(requests) if one.first_id is None}
        self._completion: dict[int, int] = {}
        self._cached: dict[int, int] = {}

    def count(self, delta: Delta) -> None:
        self._completion[delta.index] = delta.num_tokens
        if delta.index in self._prompts and delta.num_cached_tokens:
            self._cached.setdefault(delta.index, delta.num_cached_tokens)

    def to_dict(self) -> dict[str, Any]:
        prompt_tokens, completion_tokens = sum(self._prompts.values()), sum(self._completion.values())
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(self._cached.values())},
        }


async def stream_chunks(
    service: Service,
    plan: TextPlan,
    head: Mapping[str, Any],
    options: StreamOptions | None,
    show: Callable[[Delta], Iterable[Mapping[str, Any]]],
) -> AsyncGenerator[bytes]:
    """Chunks as events: the head and what `show` makes of each delta, with usage where the options want it."""
    usage, options = Usage(plan.requests), options or StreamOptions()
    async with contextlib.aclosing(stream_all(service.pool, plan)) as deltas:
        async for delta in deltas:
            usage.count(delta)
            for shown in show(delta):
                chunk = {**head, **shown}
                if options.continuous_usage_stats:
                    chunk["usage"] = usage.to_dict()
                elif options.include_usage:
                    chunk["usage"] = None
                yield event(chunk)
    if options.include_usage:
        yield event({**head, "choices": [], "usage": usage.to_dict()})
    yield DONE
