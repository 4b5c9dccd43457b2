"""The `usage` object, and OpenAI's streams, which may carry it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from typing import Any

from deploy.generation import Delta
from deploy.openai_requests import StreamOptions
from deploy.router_pool import GenerateRequest
from deploy.sse import DONE, event


class Usage:
    """Tokens of one answer. A prompt counts once, however many choices it has."""

    def __init__(self, prompt_tokens: int, n: int) -> None:
        self.prompt_tokens = prompt_tokens
        self._n = n
        self._completion: dict[int, int] = {}
        self._cached: dict[int, int] = {}

    @classmethod
    def of_prompts(cls, requests: Sequence[GenerateRequest], n: int) -> Usage:
        return cls(sum(len(request.prompt_ids) for request in requests[::n]), n)

    def count(self, delta: Delta) -> None:
        self._completion[delta.index] = delta.num_tokens
        if delta.index % self._n == 0 and delta.num_cached_tokens:
            self._cached.setdefault(delta.index, delta.num_cached_tokens)

    @property
    def completion_tokens(self) -> int:
        return sum(self._completion.values())

    @property
    def cached_tokens(self) -> int:
        return sum(self._cached.values())

    def to_dict(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


async def events_with_usage(
    deltas: AsyncIterator[Delta],
    show: Callable[[Delta], Iterable[Mapping[str, Any]]],
    head: Mapping[str, Any],
    usage: Usage,
    options: StreamOptions | None,
) -> AsyncIterator[bytes]:
    """A stream's chunks: the head and what `show` makes of each delta, with usage where the options want it."""
    options = options or StreamOptions()
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
