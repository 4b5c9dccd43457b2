"""One request inside a router: its tokens, its blocks, and how far it has come."""

from __future__ import annotations

from dataclasses import dataclass, field

from actors.blocks import BlockTable
from actors.request import Alternatives, GenerateRequest, Request
from model.sampler_state import SamplerState
from model.structured import Matcher


@dataclass(eq=False, slots=True, kw_only=True)
class Sequence:
    """token_ids: prompt and output. num_computed: leading tokens whose keys and values are in the blocks.

    owner: the ingress that asked. deadline: on the engine's clock. scope: sequences with the same one share the blocks
    of equal prefixes. sampler: None for a pool request. matcher: the grammar the output must follow. pooled:
    rows of the last step, as they travel. prompt_logprobs grow with each chunk of the prompt. routed_experts are those
    not delivered yet; num_routed counts the tokens that they have been noted for. scheduled_at: when it was first in a
    step, on the engine's clock.
    """

    request: Request
    owner: str
    arrival: int
    deadline: float
    table: BlockTable
    scope: str | None = None
    sampler: SamplerState | None = None
    matcher: Matcher | None = None
    token_ids: list[int] = field(default_factory=list)
    num_computed: int = 0
    num_cached_tokens: int | None = None
    pooled: list[str] = field(default_factory=list)
    prompt_logprobs: list[Alternatives | None] = field(default_factory=lambda: [None])
    routed_experts: list[list[list[int]]] = field(default_factory=list)
    num_routed: int = 0
    scheduled_at: float | None = None

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
    def may_use_prefix_cache(self) -> bool:
        """Requests that need something of every prompt token compute every prompt token."""
        request = self.request
        if isinstance(request, GenerateRequest):
            return request.sampling.prompt_logprobs is None and not request.return_routed_experts
        return request.tokens == "last"
