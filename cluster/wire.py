"""The bytes between router and shard.

    header   int64 x 8: opcode, epoch, step, layer, num_rows, num_pairs, hidden_size, 0
    message  float32 [num_rows, hidden]   one row per token
             int32   [num_pairs]          row of each (token, expert) pair
             int32   [num_pairs]          expert of each pair
             float32 [num_pairs]          weight of each pair
    reply    [num_rows, hidden]           weighted sum over the pairs of each row; float64 on CPU, float32 on CUDA

The reply is float64 on CPU so that the router can add the shards' partial sums and round once: the result then
does not depend on how the experts are split over shards.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

HEADER_LENGTH = 8


class Opcode(IntEnum):
    STEP = 1
    IDLE = 2
    CLOSE = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    opcode: Opcode
    epoch: int
    step: int = 0
    layer: int = 0
    num_rows: int = 0
    num_pairs: int = 0
    hidden_size: int = 0

    def to_tensor(self) -> Tensor:
        fields = [self.opcode, self.epoch, self.step, self.layer, self.num_rows, self.num_pairs, self.hidden_size, 0]
        return torch.tensor(fields, dtype=torch.int64)

    @staticmethod
    def from_tensor(tensor: Tensor) -> Header:
        opcode, epoch, step, layer, num_rows, num_pairs, hidden_size, _ = tensor.tolist()
        return Header(
            opcode=Opcode(opcode),
            epoch=epoch,
            step=step,
            layer=layer,
            num_rows=num_rows,
            num_pairs=num_pairs,
            hidden_size=hidden_size,
        )

    @property
    def message_bytes(self) -> int:
        return 4 * (self.num_rows * self.hidden_size + 3 * self.num_pairs)


@dataclass(frozen=True, slots=True)
class Message:
    """Rows for one shard and what to do with them; views of one buffer."""

    buffer: Tensor
    rows_NH: Tensor
    pair_rows_P: Tensor
    pair_experts_P: Tensor
    pair_weights_P: Tensor


def message_views(buffer: Tensor, num_rows: int, num_pairs: int, hidden_size: int) -> Message:
    """Name the parts of a message buffer (uint8, length Header.message_bytes)."""
    end_rows = 4 * num_rows * hidden_size
    pairs = buffer[end_rows:]
    return Message(
        buffer=buffer,
        rows_NH=buffer[:end_rows].view(torch.float32).view(num_rows, hidden_size),
        pair_rows_P=pairs[: 4 * num_pairs].view(torch.int32),
        pair_experts_P=pairs[4 * num_pairs : 8 * num_pairs].view(torch.int32),
        pair_weights_P=pairs[8 * num_pairs :].view(torch.float32),
    )


def new_message(num_rows: int, num_pairs: int, hidden_size: int, device: torch.device) -> Message:
    num_bytes = 4 * (num_rows * hidden_size + 3 * num_pairs)
    return message_views(torch.empty(num_bytes, dtype=torch.uint8, device=device), num_rows, num_pairs, hidden_size)


def reply_dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "cuda" else torch.float64
