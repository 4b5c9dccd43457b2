"""Random numbers as a pure function of (seed, position, token id), so a replay draws what the first run drew.

Philox2x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11), twice: once a row, to turn the
64-bit seed and the position into a key and half a counter (a bijection of the seed, so two seeds never share a stream),
and once a token id.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_MULTIPLIER = 0xD256D193
_KEY_STEP = 0x9E3779B9
_MASK32 = 0xFFFFFFFF


def philox2x32(counter0: Tensor, counter1: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Ten rounds over int64 tensors that hold unsigned 32-bit numbers; the three broadcast."""
    for _ in range(10):
        # The product may wrap int64's sign: the shift is arithmetic, and the mask takes the sign bits away again.
        product = counter0 * _MULTIPLIER
        counter0 = ((product >> 32) & _MASK32) ^ key ^ counter1
        counter1 = product & _MASK32
        key = (key + _KEY_STEP) & _MASK32
    return counter0, counter1


def row_streams(seeds: Sequence[int], positions: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """The stream of each row: two int64 columns [R, 1] for uniforms. Seeds are taken modulo 2**64."""
    low = torch.tensor([seed & _MASK32 for seed in seeds], dtype=torch.int64, device=device)
    high = torch.tensor([(seed >> 32) & _MASK32 for seed in seeds], dtype=torch.int64, device=device)
    position = torch.tensor(positions, dtype=torch.int64, device=device) & _MASK32
    key, counter = philox2x32(low, high, position)
    return key[:, None], counter[:, None]


def uniforms(stream: tuple[Tensor, Tensor], ids_RW: Tensor) -> Tensor:
    """One float64 in (0, 1) for each id (int64, below 2**32) of each row; 52 random bits, never 0 or 1."""
    key_R1, counter_R1 = stream
    first, second = philox2x32(ids_RW, counter_R1.expand_as(ids_RW), key_R1)
    bits52 = (first << 20) | (second >> 12)
    return (bits52.double() + 0.5) * 2.0**-52


def gumbel(uniform: Tensor) -> Tensor:
    """Uniform numbers as standard Gumbel noise."""
    return -torch.log(-torch.log(uniform))


def gumbels(stream: tuple[Tensor, Tensor], ids_RW: Tensor) -> Tensor:
    """Standard Gumbel noise, float64, one number for each id of each row."""
    return gumbel(uniforms(stream, ids_RW))
