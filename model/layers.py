"""The small pieces of a layer: RMSNorm, RoPE and SwiGLU."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from model.config import ModelConfig
from model.linear import Weight, linear
from model.rope_config import RopeConfig


@dataclass(frozen=True, slots=True)
class RMSNorm:
    """arXiv 1910.07467."""

    weight_H: Tensor
    """float32."""
    eps: float


def add_norm(x_TH: Tensor, delta_TH: Tensor | None, weight_H: Tensor, eps: float) -> Tensor:
    """Adds delta to x in place. -> the root-mean-square norm of x, float32."""
    if delta_TH is not None:
        x_TH += delta_TH
    return F.rms_norm(x_TH, weight_H.shape, weight_H, eps)


def swiglu(gate_up_T2I: Tensor) -> Tensor:
    """silu(gate) * up of the halves, gate first (arXiv 2002.05202). [T, 2I] -> [T, I]."""
    gate_TI, up_TI = gate_up_T2I.chunk(2, dim=-1)
    return F.silu(gate_TI).mul_(up_TI)


def add_gated(y_TH: Tensor, x_TH: Tensor, gate_T1: Tensor) -> Tensor:
    """y + x * sigmoid(gate), in y's memory.

    In float64: of a whole [T, 1] tensor, float32's last elements take a scalar path that rounds otherwise, so a token's
    bits would depend on its place in the batch.
    """
    return y_TH.add_(x_TH * gate_T1.double().sigmoid().float())


@dataclass(frozen=True, slots=True)
class MLP:
    """A SwiGLU MLP: a dense layer's, the shared expert or a routed one."""

    gate_up: Weight
    """[2I, H], gate first."""
    down: Weight
    """[H, I]."""

    @property
    def num_bytes(self) -> int:
        return self.gate_up.num_bytes + self.down.num_bytes

    def forward(self, x_TH: Tensor) -> Tensor:
        """-> [T, H]"""
        return linear(swiglu(linear(x_TH, self.gate_up)), self.down)


class Rope:
    """Rotary position embedding (arXiv 2104.09864) with the frequencies of `config.rope`.

    cos and sin come from a table made once, so a token gets the same bits in any batch. Only where the frequencies
    depend on the length of the sequence (dynamic, longrope) are they computed in each step, in float64.
    """

    def __init__(self, config: ModelConfig, device: torch.device | str = "cpu") -> None:
        self._config = config.rope
        self._head_dim = config.head_dim
        self._max_position_embeddings = config.max_position_embeddings
        self._inv_freq_F = inverse_frequencies(config.rope, config.head_dim).to(device)
        """float32 [D / 2]; of the short factors for longrope."""
        if config.rope.type == "longrope":
            long = _longrope_frequencies(config.rope, config.head_dim, config.rope.long_factor)
            self._long_inv_freq_F = long.to(device)
        self._table_PD: Tensor | None = None
        """float32 [max_context_len, D]: cos of each pair, then sin."""
        if not config.rope.depends_on_length:
            positions = torch.arange(config.max_context_len, device=device).float()[:, None]
            # In pieces: float64 of the whole would take several times the table's memory.
            self._table_PD = torch.cat(
                [self._cos_sin(piece * self._inv_freq_F) for piece in torch.split(positions, 8192)]
            )

    def cos_sin(self, positions_T: Tensor, rope_lens_T: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin for `rotate`, each float32 [T, 1, D]; sin carries the sign of the half it is for.

        Positions are below `max_context_len`.
        """
        if self._table_PD is not None:
            both_TD = self._table_PD[positions_T]
        else:
            both_TD = self._cos_sin(positions_T.float()[:, None] * self._frequencies(rope_lens_T))
        cos_T1F, sin_T1F = both_TD[:, None].chunk(2, dim=-1)
        return torch.cat((cos_T1F, cos_T1F), dim=-1), torch.cat((-sin_T1F, sin_T1F), dim=-1)

    def _cos_sin(self, angles_TF: Tensor) -> Tensor:
        angles_TF = angles_TF.double()
        return (torch.cat((angles_TF.cos(), angles_TF.sin()), dim=-1) * self._config.attention_factor).float()

    def _frequencies(self, rope_lens_T: Tensor) -> Tensor:
        """float32 [T, D / 2] for tokens of sequences with these lengths."""
        lens_T1 = rope_lens_T[:, None]
        if self._config.type == "longrope":
            is_long_T1 = lens_T1 > self._config.original_max_position_embeddings
            return torch.where(is_long_T1, self._long_inv_freq_F, self._inv_freq_F)
        factor, dim, limit = self._config.factor, self._head_dim, self._max_position_embeddings
        stretch_T1 = factor * lens_T1.clamp(min=limit).double() / limit - (factor - 1)
        base_T1 = self._config.theta * stretch_T1 ** (dim / (dim - 2))
        exponents_F = torch.arange(0, dim, 2, device=rope_lens_T.device).double() / dim
        return (base_T1**-exponents_F).float()


def rotate(x_TAD: Tensor, cos_T1D: Tensor, sin_T1D: Tensor) -> Tensor:
    """Turn each pair (i, i + D/2) of a head by its angle: x * cos + swap_halves(x) * (-sin, sin)."""
    return torch.addcmul(x_TAD * cos_T1D, x_TAD.roll(x_TAD.shape[-1] // 2, -1), sin_T1D)


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """Radians per position of each pair, float32 [D / 2], as `modeling_rope_utils` of transformers computes them."""
    inv_freq_F = 1.0 / _position_frequencies(rope, head_dim)
    match rope.type:
        case "linear":
            return inv_freq_F / rope.factor
        case "yarn":
            keep_F = _yarn_extrapolation(rope, head_dim)
            return inv_freq_F / rope.factor * (1 - keep_F) + inv_freq_F * keep_F
        case "longrope":
            return _longrope_frequencies(rope, head_dim, rope.short_factor)
        case "llama3":
            return _llama3_frequencies(rope, inv_freq_F)
        case _:
            return inv_freq_F


def _position_frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    exponents_F = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    frequencies_F: Tensor = rope.theta**exponents_F
    return frequencies_F


def _longrope_frequencies(rope: RopeConfig, head_dim: int, factors: tuple[float, ...]) -> Tensor:
    """arXiv 2402.13753: every pair has its own factor."""
    return 1.0 / (torch.tensor(factors, dtype=torch.float32) * _position_frequencies(rope, head_dim))


def _yarn_extrapolation(rope: RopeConfig, head_dim: int) -> Tensor:
    """How far each pair keeps its frequency: 1 for those that turn often in the original context, 0 for the slow ones
    (arXiv 2309.00071, section 3.2)."""

    def pair_that_turns(num_rotations: float) -> float:
        wavelengths = rope.original_max_position_embeddings / (num_rotations * 2 * math.pi)
        return head_dim * math.log(wavelengths) / (2 * math.log(rope.theta))

    low, high = pair_that_turns(rope.beta_fast), pair_that_turns(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    high = high + 0.001 if low == high else high
    return 1 - ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)


def _llama3_frequencies(rope: RopeConfig, inv_freq_F: Tensor) -> Tensor:
    """Slow pairs divided by the factor, fast ones kept, a smooth passage between (Llama 3.1)."""
    wavelengths_F = 2 * math.pi / inv_freq_F
    original, low, high = rope.original_max_position_embeddings, rope.low_freq_factor, rope.high_freq_factor
    smooth_F = ((original / wavelengths_F - low) / (high - low)).clamp(0, 1)
    return (1 - smooth_F) * inv_freq_F / rope.factor + smooth_F * inv_freq_F
