"""Every matmul with weights goes through `linear`.

Activations are float32; weights keep the storage they were loaded with. A row of the result has the same bits
whatever the other rows are: a request's logits don't depend on its batchmates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

# MKL's float32 rows are bitwise equal for every M >= 4; M = 1..3 take other kernels that sum in another order.
MIN_INVARIANT_ROWS = 4


class Weight(Protocol):
    """A weight matrix [N, K] in some storage: K inputs, N outputs."""

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K): outputs, inputs."""

    @property
    def num_bytes(self) -> int:
        """Resident bytes, scales included."""

    @property
    def device(self) -> torch.device: ...

    def dequantize(self) -> Tensor:
        """The matrix as float32 [N, K]."""


@dataclass(frozen=True, slots=True, eq=False)
class DenseWeight:
    """A plain matrix: float32, bfloat16 or float16 [N, K]."""

    tensor: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.tensor.shape[0], self.tensor.shape[1]

    @property
    def num_bytes(self) -> int:
        return self.tensor.numel() * self.tensor.element_size()

    @property
    def device(self) -> torch.device:
        return self.tensor.device

    def dequantize(self) -> Tensor:
        return self.tensor.to(torch.float32)


def linear(x_TK: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias: float32 [T, K] -> float32 [T, N], batch-invariant on CPU."""
    num_rows = x_TK.shape[0]
    if x_TK.device.type == "cpu" and num_rows < MIN_INVARIANT_ROWS:
        x_TK = F.pad(x_TK, (0, 0, 0, MIN_INVARIANT_ROWS - num_rows))
    return F.linear(x_TK, weight.dequantize(), bias)[:num_rows]
