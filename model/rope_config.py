"""RoPE settings in both spellings: `rope_parameters` (transformers 5), and `rope_theta` + `rope_scaling` before it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

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
_ALWAYS_ALLOWED = frozenset({"rope_type", "type", "rope_theta", "partial_rotary_factor"})
# transformers writes or tolerates these beside any type, and reads them only for the types above.
_HARMLESS = frozenset({"original_max_position_embeddings", "factor", "finetuned"})


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
    unknown = sorted(set(params) - _KEYS[rope_type] - _ALWAYS_ALLOWED - _HARMLESS)
    if unknown:
        raise ValueError(f"{spelling} of type {rope_type!r} has {unknown[0]!r}, which it doesn't know: remove it")
    for partial in (params.get("partial_rotary_factor"), values.get("partial_rotary_factor")):
        if partial not in (None, 1, 1.0):
            raise ValueError(
                f"partial_rotary_factor {partial!r} is not implemented: Qwen2-MoE rotates whole heads (1.0)"
            )
    read = _Params(spelling, params)
    theta = params.get("rope_theta")
    theta = theta if theta is not None else values.get("rope_theta")
    theta = 10000.0 if theta is None else theta
    if isinstance(theta, bool) or not isinstance(theta, (int, float)) or theta <= 0:
        raise ValueError(f"rope_theta {theta!r} must be a number above 0; correct config.json")
    original = values.get("original_max_position_embeddings") or params.get("original_max_position_embeddings")
    original = max_position_embeddings if original is None else original
    if isinstance(original, bool) or not isinstance(original, int) or original < 1:
        raise ValueError(
            f"original_max_position_embeddings {original!r} must be a positive integer; correct config.json"
        )
    theta = float(theta)
    match rope_type:
        case "default":
            return RopeConfig(type="default", theta=theta, original_max_position_embeddings=max_position_embeddings)
        case "linear" | "dynamic":
            if rope_type == "dynamic" and head_dim <= 2:
                raise ValueError(f"head_dim {head_dim} is too small for dynamic RoPE, which divides by head_dim - 2")
            return RopeConfig(
                type=rope_type,
                theta=theta,
                factor=read.number("factor"),
                original_max_position_embeddings=max_position_embeddings,
            )
        case "yarn":
            factor = read.number("factor", max_position_embeddings / original)
            return RopeConfig(
                type="yarn",
                theta=theta,
                factor=factor,
                original_max_position_embeddings=original,
                attention_factor=read.number("attention_factor", _yarn_attention_factor(read, factor)),
                beta_fast=read.number("beta_fast", 0) or 32.0,
                beta_slow=read.number("beta_slow", 0) or 1.0,
                truncate=bool(params.get("truncate", True)),
            )
        case "longrope":
            factor = read.number("factor", max_position_embeddings / original)
            scale = 1.0 if factor <= 1.0 else math.sqrt(1 + math.log(factor) / math.log(original))
            return RopeConfig(
                type="longrope",
                theta=theta,
                factor=factor,
                original_max_position_embeddings=original,
                attention_factor=read.number("attention_factor", scale),
                short_factor=read.numbers("short_factor", head_dim // 2),
                long_factor=read.numbers("long_factor", head_dim // 2),
            )
        case _:
            low, high = read.number("low_freq_factor"), read.number("high_freq_factor")
            if not 0 < low < high:
                raise ValueError(
                    f"{spelling}.low_freq_factor {low} must be above 0 and below high_freq_factor {high}; "
                    "correct config.json"
                )
            return RopeConfig(
                type="llama3",
                theta=theta,
                factor=read.number("factor"),
                original_max_position_embeddings=original,
                low_freq_factor=low,
                high_freq_factor=high,
            )


def _yarn_attention_factor(read: _Params, factor: float) -> float:
    """Equation 22 of YaRN (arXiv 2309.00071), with the two DeepSeek scales where both are given."""
    mscale, mscale_all_dim = read.number("mscale", 0), read.number("mscale_all_dim", 0)

    def scale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    return scale(mscale) / scale(mscale_all_dim) if mscale and mscale_all_dim else scale(1.0)


class _Params:
    """Typed reads from one RoPE object."""

    def __init__(self, spelling: str, params: Mapping[str, Any]) -> None:
        self._spelling = spelling
        self._params = params

    def number(self, name: str, default: float | None = None) -> float:
        """A positive number; `default` (None: there is none) where it is absent or null."""
        value = self._params.get(name)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
            raise ValueError(f"{self._spelling}.{name} {value!r} must be a number above 0; correct config.json")
        return float(value)

    def numbers(self, name: str, length: int) -> tuple[float, ...]:
        value = self._params.get(name)
        if (
            not isinstance(value, list)
            or len(value) != length
            or not all(isinstance(v, (int, float)) and not isinstance(v, bool) and v > 0 for v in value)
        ):
            raise ValueError(
                f"{self._spelling}.{name} {value!r} must be a list of {length} positive numbers (head_dim / 2); "
                "correct config.json"
            )
        return tuple(float(v) for v in value)
