"""One request inside a router: its tokens, its blocks, and how far it has come."""

from __future__ import annotations

from dataclasses import dataclass, field

from actors.blocks import BlockTable
from actors.request import Chunk, GenerateRequest, Request
from model.sampling import SamplerState


@dataclass(eq=False, slots=True, kw_only=True)
class Sequence:
    """token_ids: prompt and output. num_computed: leading tokens whose keys and values are in the blocks.

    sampler: None for a pool request. deadline: on the engine's clock.
    """

    request: Request
    owner: str
    arrival: int
    deadline: float
    table: BlockTable
    sampler: SamplerState | None
    token_ids: list[int] = field(default_factory=list)
    num_computed: int = 0
    num_cached_tokens: int | None = None
    chunk: Chunk | None = None
    pooled: list[list[float]] = field(default_factory=list)
    prompt_logprobs: list[list[list[float]] | None] = field(default_factory=list)

    @property
    def order(self) -> tuple[int, int]:
        return self.request.priority, self.arrival

    @property
    def num_to_compute(self) -> int:
        return len(self.token_ids) - self.num_computed

    @property
    def prompt_len(self) -> int:
        return len(self.request.prompt_ids)

    @property
    def num_outputs(self) -> int:
        return len(self.token_ids) - self.prompt_len

    @property
    def wants_prompt_logprobs(self) -> bool:
        request = self.request
        return isinstance(request, GenerateRequest) and request.sampling.prompt_logprobs is not None

    @property
    def may_use_prefix_cache(self) -> bool:
        """Requests that need something of every prompt token compute every prompt token."""
        request = self.request
        if isinstance(request, GenerateRequest):
            return request.sampling.prompt_logprobs is None and not request.return_routed_experts
        return request.tokens == "last"
