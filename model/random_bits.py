"""Random numbers as a pure function of (seed, position), so a replay draws what the first run drew."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_MULTIPLIER = 0xD256D193
_KEY_STEP = 0x9E3779B9
_MASK32 = 0xFFFFFFFF


def uniforms(seeds: Sequence[int], positions: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """One float64 in (0, 1) for each pair, never 0 or 1. Seeds are taken modulo 2**64, positions modulo 2**32.

    For one position this is a bijection of the seed, up to the last 12 bits, so no two seeds share a stream."""
    halves = ([seed & _MASK32 for seed in seeds], [(seed >> 32) & _MASK32 for seed in seeds], positions)
    low, high, position = (torch.tensor(half, dtype=torch.int64, device=device) for half in halves)
    first, second = philox2x32(low, high, position & _MASK32)
    bits52 = (first << 20) | (second >> 12)
    return (bits52.double() + 0.5) * 2.0**-52


def philox2x32(counter0: Tensor, counter1: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Philox2x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11) over int64 tensors that hold
    unsigned 32-bit numbers; the three broadcast."""
    for _ in range(10):
        # The product may wrap int64's sign: the shift is arithmetic, and the mask takes the sign bits away again.
        product = counter0 * _MULTIPLIER
        counter0 = ((product >> 32) & _MASK32) ^ key ^ counter1
        counter1 = product & _MASK32
        key = (key + _KEY_STEP) & _MASK32
    return counter0, counter1
