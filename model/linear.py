"""Every matmul with weights goes through `linear`.

Activations are float32, or rounded to bfloat16 on their way into a product where the weight says so; sums are float32.
Weights keep the storage they were loaded with. On CPU a row of the result has the same bits whatever the other rows
are: a request's logits don't depend on its batchmates.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor

# MKL's float32 rows are bitwise equal for every M >= 4; M = 1..3 take other kernels that sum in another order.
MIN_INVARIANT_ROWS = 4


class Weight(Protocol):
    """A weight matrix [N, K] in some storage, a dataclass of its tensors: K inputs, N outputs."""

    @property
    def shape(self) -> tuple[int, int]: ...

    @property
    def num_bytes(self) -> int:
        """Resident bytes, scales included."""
        return sum(tensor.nbytes for tensor in tensors_of(self).values())

    def dequantize(self) -> Tensor:
        """The matrix as float32 [N, K]."""

    def multiply(self, x_TK: Tensor, bias: Tensor | None = None) -> Tensor:
        """See `linear`."""
        num_rows = x_TK.shape[0]
        if x_TK.device.type == "cpu" and num_rows < MIN_INVARIANT_ROWS:
            x_TK = F.pad(x_TK, (0, 0, 0, MIN_INVARIANT_ROWS - num_rows))
        return F.linear(x_TK, self.dequantize(), bias)[:num_rows]


class Incompressible(ValueError):
    """A weight that has no compact form."""


class Embedding(Weight, Protocol):
    """A weight whose rows can be looked up."""

    def rows(self, ids_T: Tensor) -> Tensor:
        """Rows of the matrix, float32 [T, K]."""


def linear(x_TK: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias: float32 [T, K] -> float32 [T, N]."""
    return weight.multiply(x_TK, bias)


@dataclass(frozen=True, slots=True, eq=False)
class DenseWeight(Embedding):
    """A plain matrix: float32, bfloat16 or float16 [N, K]."""

    tensor: Tensor
    bfloat16_inputs: bool = False
    """Whether inputs are rounded to bfloat16 first. Only for a bfloat16 matrix."""

    @property
    def shape(self) -> tuple[int, int]:
        return self.tensor.shape[0], self.tensor.shape[1]

    def dequantize(self) -> Tensor:
        return self.tensor.float()

    def multiply(self, x_TK: Tensor, bias: Tensor | None = None) -> Tensor:
        if not self.bfloat16_inputs:
            return Embedding.multiply(self, x_TK, bias)
        if x_TK.device.type == "cuda":  # written with care, and never run: no machine of ours has a GPU
            y_TN = torch.mm(x_TK.bfloat16(), self.tensor.T, out_dtype=torch.float32)
            return y_TN if bias is None else y_TN + bias
        return Embedding.multiply(self, x_TK.bfloat16().float(), bias)

    def rows(self, ids_T: Tensor) -> Tensor:
        return F.embedding(ids_T, self.tensor).float()


@dataclass(frozen=True, slots=True, eq=False)
class Int8Weight(Embedding):
    """weight = scales[n] * values[n, k]."""

    values: Tensor
    """int8 [N, K] in [-127, 127]."""
    scales: Tensor
    """float32 [N]."""

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape[0], self.values.shape[1]

    def dequantize(self) -> Tensor:
        return self.values * self.scales[:, None]

    def rows(self, ids_T: Tensor) -> Tensor:
        return self.values[ids_T] * self.scales[ids_T, None]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Int4Weight(Weight):
    """weight = scales[n, g] * (value[n, k] - zeros[n, g]), where g = k // group_size and values are 0..15.

    With `input_order`, column k of values is input input_order[k] (GPTQ with act-order sorts inputs into groups).
    """

    num_inputs: int
    values: Tensor
    """uint8 [N, ceil(K / 2)]: input 2j in the low nibble of byte j."""
    scales: Tensor
    """float16 [N, groups]."""
    zeros: Tensor
    """uint8 [N, groups]."""
    group_size: int
    """A multiple of 4, or at least K."""
    input_order: Tensor | None = None
    """int32 [K], a permutation."""

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape[0], self.num_inputs

    def dequantize(self) -> Tensor:
        nibbles = torch.stack([self.values & 15, self.values >> 4], dim=2).flatten(1)[:, : self.num_inputs]
        scales, zeros = (
            groups.float().repeat_interleave(self.group_size, dim=1)[:, : self.num_inputs]
            for groups in (self.scales, self.zeros)
        )
        matrix = (nibbles.float() - zeros) * scales
        if self.input_order is None:
            return matrix
        return torch.empty_like(matrix).index_copy_(1, self.input_order.long(), matrix)


def stack_rows(blocks: Iterable[Weight], num_outputs: int) -> Weight:
    """One weight of blocks of its rows, filled as they come: memory for the whole and one block, never for two wholes.

    All blocks have the same storage (or ValueError) and, where they are packed, all but the last a multiple of 32 rows.
    """
    whole: dict[str, Tensor] = {}
    num_filled: dict[str, int] = {}
    block: Any = None
    for block in blocks:
        if block.shape[0] == num_outputs:
            return cast(Weight, block)
        for name, part in tensors_of(block).items():
            if name == "input_order":
                continue
            if name not in whole:
                length = -(-num_outputs // 32) * 32 * len(part) // block.shape[0]
                whole[name], num_filled[name] = part.new_empty(length, *part.shape[1:]), 0
            if (part.dtype, part.shape[1:]) != (whole[name].dtype, whole[name].shape[1:]):
                raise ValueError(
                    f"{name}: {part.dtype} {list(part.shape)} in a block of rows, expected {whole[name].dtype} "
                    f"[..., {', '.join(map(str, whole[name].shape[1:]))}] as in the first one"
                )
            whole[name][num_filled[name] : num_filled[name] + len(part)] = part
            num_filled[name] += len(part)
    changes: dict[str, Any] = {name: tensor[: num_filled[name]] for name, tensor in whole.items()}
    if any(field.name == "shape" for field in fields(block)):
        changes["shape"] = (num_outputs, block.shape[1])
    return cast(Weight, replace(block, **changes))


def tensors_of(weight: Any) -> dict[str, Tensor]:
    """The tensors of a dataclass by field."""
    values = {field.name: getattr(weight, field.name) for field in fields(weight)}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}
