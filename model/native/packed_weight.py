"""A weight in the kernels' panel layout (drawn in native.h)."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from model.layers import MLP
from model.linear import Incompressible, tensors_of
from model.native.shared_object import SharedObject, WeightStruct, pointer

PANEL = 32
FORMATS = ("float32", "bfloat16", "float16", "int8", "int4")
"""Their places are `enum format` of native.h."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PackedWeight:
    """A weight matrix [N, K] in panels of 32 outputs, the last one padded. Made by `pack_weight`."""

    shared_object: SharedObject
    format: str
    shape: tuple[int, int]
    panels: Tensor
    """float32 or float16 [panels, K, 32]; bfloat16 [panels, K / 2, 64]; uint8 [panels, K / 4, 128] (int8) or
    [panels, K / 4, 64] (int4)."""
    scales: Tensor | None = None
    """float32 [32 panels] (int8) or float16 [panels, groups, 32] (int4)."""
    zeros: Tensor | None = None
    """uint8 [panels, groups, 32] (int4)."""
    input_order: Tensor | None = None
    """int32 [K]: which input the packed input k is; None: k."""
    block_size: int = 0
    """Inputs that share an activation scale, and an int4 scale. 0 for float formats."""
    codebooks: Tensor | None = None
    """uint8 [panels, 16]: of compact panels, uint8 [panels, K / 32, 1536] (drawn in compact.h)."""
    exception_starts: Tensor | None = None
    """int32 [panels, K / 32 + 1]."""
    exceptions: Tensor | None = None
    """int32 [panels, most]: place in the step << 16 | weight."""
    bfloat16_inputs: bool = False
    """As in `DenseWeight`."""
    struct: WeightStruct = field(init=False)
    address: int = field(init=False)

    def __post_init__(self) -> None:
        struct = WeightStruct(
            pointer(self.panels),
            pointer(self.scales),
            pointer(self.zeros),
            pointer(self.input_order),
            pointer(self.codebooks),
            pointer(self.exception_starts),
            pointer(self.exceptions),
            FORMATS.index(self.format),
            *self.shape,
            self.block_size,
            self.bfloat16_inputs,
            0 if self.exceptions is None else self.exceptions.shape[1],
        )
        object.__setattr__(self, "struct", struct)
        object.__setattr__(self, "address", ctypes.addressof(struct))

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in tensors_of(self).values())

    def multiply(self, x_TK: Tensor, bias: Tensor | None = None) -> Tensor:
        num_outputs, num_inputs = self.shape
        if x_TK.shape[1] != num_inputs or x_TK.dtype != torch.float32:
            raise ValueError(f"x is {x_TK.dtype} {list(x_TK.shape)}, expected torch.float32 [T, {num_inputs}]")
        x_TK = x_TK.contiguous()
        y_TN = torch.empty(x_TK.shape[0], num_outputs)
        self.shared_object.linear(
            self.address, pointer(x_TK), x_TK.shape[0], pointer(bias), pointer(y_TN), self.shared_object.num_threads
        )
        return y_TN

    def rows(self, ids_T: Tensor) -> Tensor:
        """Rows of the matrix, float32 [T, K]: the lookup of an embedding that is the LM head too. Not for int4."""
        panels_T, outputs_T = ids_T // PANEL, ids_T % PANEL
        num_inputs = self.shape[1]
        if self.format == "bfloat16":
            pairs_TP2 = self.panels.view(len(self.panels), -1, PANEL, 2)[panels_T, :, outputs_T]
            return pairs_TP2.flatten(1)[:, :num_inputs].float()
        if self.format == "int8":
            assert self.scales is not None
            quads_TQ4 = self.panels.view(len(self.panels), -1, PANEL, 4)[panels_T, :, outputs_T]
            return (quads_TQ4.flatten(1)[:, :num_inputs].float() - 128) * self.scales[ids_T, None]
        assert self.format in ("float32", "float16")
        return self.panels[panels_T, :, outputs_T].float()

    def compacted(self) -> PackedWeight:
        """The same bfloat16 weight in three quarters of its bytes; itself where the kernels don't read such panels.

        Raises Incompressible for what is unlike any trained weight. Rows can't be looked up.
        """
        num_panels, num_steps = len(self.panels), self.shape[1] // 32
        if self.shared_object.compact is None or self.format != "bfloat16" or self.shape[1] % 32:
            return self
        compact = replace(
            self,
            panels=torch.empty(num_panels, num_steps, 1536, dtype=torch.uint8),
            codebooks=torch.empty(num_panels, 16, dtype=torch.uint8),
            exception_starts=torch.empty(num_panels, num_steps + 1, dtype=torch.int32),
            exceptions=torch.zeros(num_panels, 16 + 2 * num_steps, dtype=torch.int32),
        )
        fits = self.shared_object.compact(
            pointer(self.panels),
            num_panels,
            num_steps,
            *(pointer(t) for t in (compact.panels, compact.codebooks, compact.exception_starts, compact.exceptions)),
            compact.struct.most_exceptions,
        )
        if not fits:
            raise Incompressible("more than 16 weights and one in 512 of a panel are exceptions")
        return compact

    def _plain_panels(self) -> Tensor:
        """What compact panels hold, bfloat16 [panels, K / 2, 64]."""
        assert self.codebooks is not None and self.exceptions is not None and self.exception_starts is not None
        num_panels, num_steps = self.panels.shape[:2]
        pairs, low = self.panels[:, :, :512].reshape(num_panels, num_steps, 8, 1, 64), self.panels[:, :, 512:]
        codes = torch.cat([pairs & 15, pairs >> 4], dim=3).view(num_panels, -1)
        high = self.codebooks.gather(1, codes.long())
        words = torch.stack([low.reshape(num_panels, -1), high], dim=2).view(torch.int16)
        # Unpacking takes bytes 0 to 7 of each 16, and bytes 8 to 15 after those of all four.
        words = words.view(num_panels, num_steps, 16, 4, 2, 8).transpose(3, 4).reshape(num_panels, num_steps, 1024)
        for panel, starts in enumerate(self.exception_starts.tolist()):
            steps = torch.repeat_interleave(torch.arange(num_steps), torch.tensor(starts).diff())
            found = self.exceptions[panel, : starts[-1]]
            words[panel, steps, found >> 16] = (found & 0xFFFF).to(torch.int16)
        return words.view(torch.bfloat16).view(num_panels, -1, 2 * PANEL)

    def dequantize(self) -> Tensor:
        if self.codebooks is not None:
            return replace(self, panels=self._plain_panels(), codebooks=None).dequantize()
        num_outputs, num_inputs = self.shape
        num_panels = len(self.panels)
        if self.format in ("float32", "float16"):
            values = self.panels.transpose(1, 2)
        elif self.format == "bfloat16":
            values = self.panels.view(num_panels, -1, PANEL, 2).transpose(1, 2)
        elif self.format == "int8":
            values = self.panels.view(num_panels, -1, PANEL, 4).transpose(1, 2)
        else:
            halves = torch.stack([self.panels & 15, self.panels >> 4], dim=1)
            values = halves.view(num_panels, 2, -1, 16, 4).transpose(2, 3)
        matrix = values.reshape(num_panels * PANEL, -1)[:, :num_inputs].float()
        if self.format == "int8":
            assert self.scales is not None
            matrix = (matrix - 128) * self.scales[:, None]
        elif self.format == "int4":
            assert self.scales is not None and self.zeros is not None
            scales, zeros = (
                t.float().transpose(1, 2).reshape(num_panels * PANEL, -1).repeat_interleave(self.block_size, dim=1)
                for t in (self.scales, self.zeros)
            )
            matrix = (matrix - zeros[:, :num_inputs]) * scales[:, :num_inputs]
        if self.input_order is not None:
            matrix = torch.empty_like(matrix).index_copy_(1, self.input_order.long(), matrix)
        return matrix[:num_outputs]


class PackedExperts(dict[int, MLP]):
    """A layer's experts that are all packed, with the addresses that the kernel takes. Not to be changed."""

    def __init__(self, experts: Mapping[int, MLP]) -> None:
        super().__init__(experts)
        self.num_experts = max(self, default=-1) + 1
        self.matrices = (ctypes.c_void_p * (2 * self.num_experts))()
        for expert_id, expert in self.items():
            gate_up, down = expert.gate_up, expert.down
            assert isinstance(gate_up, PackedWeight) and isinstance(down, PackedWeight)
            self.matrices[2 * expert_id] = gate_up.address
            self.matrices[2 * expert_id + 1] = down.address
