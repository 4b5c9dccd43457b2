"""The `usage` object."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from deploy.generation import Delta
from deploy.router_pool import GenerateRequest


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
