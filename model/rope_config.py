"""RoPE settings in both spellings: `rope_parameters` (transformers 5), and `rope_theta` + `rope_scaling` before it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from model.config_fields import ConfigFields

RopeType = Literal["default", "linear", "dynamic", "yarn", "longrope", "llama3"]
_KEYS: Mapping[str, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "dynamic": frozenset({"factor"}),
    "yarn": frozenset(
        {"factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale",
         "mscale_all_dim", "truncate"}
    ),
    "longrope": frozenset(
        {"factor", "original_max_position_embeddings", "attention_factor", "short_factor", "long_factor"}
    ),
    "llama3": frozenset({"factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"}),
}  # fmt: skip
# The last three are written or tolerated beside any type by transformers, which reads them only for the types above.
_ALWAYS_ALLOWED = frozenset(
    {
        "rope_type",
        "type",
        "rope_theta",
        "partial_rotary_factor",
        "original_max_position_embeddings",
        "factor",
        "finetuned",
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """One RoPE. Fields that a type doesn't use keep their defaults; `attention_factor` multiplies cos and sin."""

    type: RopeType
    theta: float
    factor: float = 1.0
    original_max_position_embeddings: int
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0

    @property
    def depends_on_length(self) -> bool:
        """Whether the frequencies of a token depend on the length of its sequence."""
        return self.type in ("dynamic", "longrope")

    def stretched_context_len(self, max_position_embeddings: int) -> int:
        """Tokens the RoPE was stretched to: the factor times what it was trained on."""
        if self.type in ("linear", "dynamic"):
            return int(max_position_embeddings * self.factor)
        if self.type == "yarn":
            return int(self.original_max_position_embeddings * self.factor)
        return max_position_embeddings


def resolve_rope(values: Mapping[str, Any], *, head_dim: int, max_position_embeddings: int) -> RopeConfig:
    """The RoPE of a `config.json`. Raises ValueError naming the field.

    As in transformers: `rope_scaling` wins over `rope_parameters` when both are there, a theta inside wins over
    `rope_theta` outside, and a top-level `original_max_position_embeddings` wins over the one inside.
    """
    spelling = "rope_scaling" if values.get("rope_scaling") else "rope_parameters"
    params = values.get(spelling) or {}
    if not isinstance(params, Mapping):
        raise ValueError(f"{spelling} {params!r} must be a JSON object; correct config.json")
    rope_type = params.get("rope_type", params.get("type", "default"))
    if rope_type not in get_args(RopeType):
        raise ValueError(
            f"{spelling}.rope_type {rope_type!r} is not implemented: expected one of {', '.join(get_args(RopeType))}"
        )
    if unknown := sorted(set(params) - _KEYS[rope_type] - _ALWAYS_ALLOWED):
        raise ValueError(f"{spelling} of type {rope_type!r} has {unknown[0]!r}, which it doesn't know: remove it")
    for partial in (params.get("partial_rotary_factor"), values.get("partial_rotary_factor")):
        if partial not in (None, 1):
            raise ValueError(f"partial_rotary_factor {partial!r} is not implemented: Qwen2-MoE rotates whole heads (1)")
    outer, read = ConfigFields(values), ConfigFields(params, where=f"{spelling}.")
    theta = read.positive("rope_theta", outer.positive("rope_theta", 10000.0))
    original = read.count("original_max_position_embeddings", max_position_embeddings)
    original = outer.count("original_max_position_embeddings", original)
    fields: dict[str, Any] = {}
    match rope_type:
        case "linear" | "dynamic":
            if rope_type == "dynamic" and head_dim <= 2:
                raise ValueError(f"head_dim {head_dim} is too small for dynamic RoPE, which divides by head_dim - 2")
            original = max_position_embeddings
            fields = {"factor": read.positive("factor")}
        case "yarn":
            if theta < 2:
                raise ValueError(
                    f"rope_theta {theta} must be at least 2: yarn divides by its logarithm; correct config.json"
                )
            factor = read.positive("factor", max_position_embeddings / original)
            fields = {
                "factor": factor,
                "attention_factor": read.positive("attention_factor", _yarn_attention_factor(params, factor)),
                "beta_fast": read.positive("beta_fast", 32.0),
                "beta_slow": read.positive("beta_slow", 1.0),
                "truncate": read.flag("truncate", True),
            }
        case "longrope":
            factor = read.positive("factor", max_position_embeddings / original)
            if original < 2:
                raise ValueError(
                    f"original_max_position_embeddings {original} is too small for longrope, which divides by its "
                    "logarithm; correct config.json"
                )
            scale = 1.0 if factor <= 1.0 else math.sqrt(1 + math.log(factor) / math.log(original))
            fields = {
                "factor": factor,
                "attention_factor": read.positive("attention_factor", scale),
                "short_factor": read.positives("short_factor", head_dim // 2),
                "long_factor": read.positives("long_factor", head_dim // 2),
            }
        case "llama3":
            low, high = read.positive("low_freq_factor"), read.positive("high_freq_factor")
            if low >= high:
                raise ValueError(
                    f"{spelling}.low_freq_factor {low} must be below high_freq_factor {high}; correct config.json"
                )
            fields = {"factor": read.positive("factor"), "low_freq_factor": low, "high_freq_factor": high}
    return RopeConfig(type=rope_type, theta=theta, original_max_position_embeddings=original, **fields)


def _yarn_attention_factor(params: Mapping[str, Any], factor: float) -> float:
    """Equation 22 of YaRN (arXiv 2309.00071), with the two DeepSeek scales where both are given."""

    def scale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if not (params.get("mscale") and params.get("mscale_all_dim")):
        return scale(1.0)
    read = ConfigFields(params, where="yarn's ")
    return scale(read.positive("mscale")) / scale(read.positive("mscale_all_dim"))
