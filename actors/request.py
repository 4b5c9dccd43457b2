"""What travels between ingress and router: one JSON object a line, over TCP.

    ingress -> router   hello, generate, pool, abort, command
    router -> ingress   hello or refused, load, chunks: one line per step with all that is new for that ingress,
                        and further lines for rows of pool results

The first line each way is `hello`; the ingress' must carry the mesh token. A chunk with a finish_reason is the last
one of its request. When the connection is lost the router is taken for dead: the ingress sends what is unfinished
to another router, with the tokens it has in `output_ids` and the same seed, and the stream goes on.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from model.sampling_params import SamplingParams

Alternatives = list[tuple[int, float, int]]  # (token_id, logprob, rank): the token itself, then the likeliest
Rows = list[NDArray[np.float32]]  # of a pool result
FinishReason = Literal["stop", "length", "abort", "error"]
MAX_LINE_BYTES = 256 * 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateRequest:
    """Continue prompt_ids + output_ids (tokens that an earlier router has delivered already).

    first_id: request_id of the first of several sequences drawn from the same prompt; None for that one itself.
    """

    request_id: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    output_ids: tuple[int, ...] = ()
    first_id: str | None = None
    priority: int = 0
    cache_salt: str | None = None
    deadline_s: float = 600.0
    return_routed_experts: bool = False

    @property
    def prompt_id(self) -> str:
        """The same for all sequences drawn from one prompt."""
        return self.first_id or self.request_id


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolRequest:
    """Run the prompt through the model and a head. tokens: "last" gives one row, "all" one row per token."""

    request_id: str
    prompt_ids: tuple[int, ...]
    head: str
    tokens: Literal["last", "all"] = "last"
    priority: int = 0
    cache_salt: str | None = None
    deadline_s: float = 600.0

    @property
    def prompt_id(self) -> str:
        return self.request_id


Request = GenerateRequest | PoolRequest


@dataclass(slots=True, kw_only=True)
class Chunk:
    """What one step brought for one request.

    logprobs: for each new token. prompt_logprobs: for each prompt token, None for the first, which nothing predicts.
    values: rows of a pool result from first_row on, as `rows_to_wire` has them, in place of all that were told
    from there on before. timing: with a sequence's first output (the last one, of a pool result), its seconds in the
    queue and from there to now. recovery_s: how long a recovery held the step up. result: what a command answers.
    error: {"status", "code", "message"}.
    """

    request_id: str
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[Alternatives] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None
    num_cached_tokens: int = 0
    prompt_logprobs: list[Alternatives | None] | None = None
    routed_experts: list[list[list[int]]] | None = None
    values: list[str] | None = None
    first_row: int = 0
    timing: tuple[float, float] | None = None
    recovery_s: float = 0.0
    result: dict[str, Any] | None = None
    error: dict[str, Any] | None = None

    def to_wire(self) -> dict[str, Any]:
        """Whatever differs from the defaults: the other end builds its chunk of it."""
        return {name: value for name, default in _NOTHING_NEW.items() if (value := getattr(self, name)) != default}


_NOTHING_NEW = asdict(Chunk(request_id=""))


def rows_to_wire(values_NL: NDArray[np.float32]) -> list[str]:
    """Each row as base64 of its float32, little endian: a fourth of what numbers take in JSON, and quickly read."""
    return [base64.b64encode(row.tobytes()).decode() for row in values_NL.astype("<f4", copy=False)]


def rows_from_wire(values: Iterable[str]) -> Rows:
    return [np.frombuffer(base64.b64decode(row), "<f4") for row in values]


def error_chunk(request_id: str, status: int, code: str, message: str) -> Chunk:
    return Chunk(
        request_id=request_id,
        finish_reason="error",
        error={"status": status, "code": code, "message": message},
    )


def request_from_wire(data: Mapping[str, Any]) -> Request:
    """Parse a generate or pool line. Raises ValueError or KeyError where it is malformed."""
    common: dict[str, Any] = {
        "request_id": str(data["request_id"]),
        "prompt_ids": tuple(int(token) for token in data["prompt_ids"]),
        "priority": int(data.get("priority") or 0),
        "cache_salt": data.get("cache_salt"),
        "deadline_s": float(data.get("deadline_s") or 600.0),
    }
    if data["op"] == "pool":
        tokens = data.get("tokens", "last")
        if tokens not in ("last", "all"):
            raise ValueError(f"tokens={tokens!r} must be 'last' or 'all'")
        return PoolRequest(head=str(data["head"]), tokens=tokens, **common)
    return GenerateRequest(
        sampling=SamplingParams.from_dict(data["sampling"]),
        output_ids=tuple(int(token) for token in data.get("output_ids") or ()),
        first_id=data.get("first_id"),
        return_routed_experts=bool(data.get("return_routed_experts")),
        **common,
    )
