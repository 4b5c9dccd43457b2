"""The bytes between a router and its shards.

    header   int64 x 12: see Header
    message  int64   [pairs]          row of each (token, expert) pair, counted from the shard's first row
             int64   [pairs]          expert of each pair
             float32 [pairs]          weight of each pair, then zero to 60 bytes of padding
             float32 [rows, hidden]   one row per token
    sums     [rows, hidden]           weighted sum over the pairs of each row; float64 on CPU, float32 on CUDA

The sums are float64 on CPU so that the router can add the shards' partial sums and round once: the result then
does not depend on how the experts are split over shards.

A router keeps the messages of one exchange for all shards in one arena: first every shard's pairs, one shard after
the other, then every shard's rows, then every shard's sums. A shard on the same host works on its part of that very
memory; for others their part is copied into a message of its own. Two exchanges of a router may be under way at once,
each in a lane, and so in an arena, of its own; a shard answers them in the order in which they came.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

LANES = 2
ROUTER_RANK = 0
HEADER_TAG, MESSAGE_TAG, REPLY_TAG = 1, 2, 3


class Opcode(IntEnum):
    STEP = 1
    IDLE = 2
    CLOSE = 3


class Header(NamedTuple):
    """What a message is about, and which part of the exchange's arena is this shard's. total_*: of all shards.
    lane: of the exchange, and so which arena."""

    opcode: int
    epoch: int
    step: int = 0
    layer: int = 0
    hidden_size: int = 0
    first_row: int = 0
    num_rows: int = 0
    first_pair: int = 0
    num_pairs: int = 0
    total_rows: int = 0
    total_pairs: int = 0
    lane: int = 0

    @property
    def rows_offset(self) -> int:
        """Where the rows begin in the arena, in bytes."""
        return _aligned(20 * self.total_pairs)

    @property
    def sums_offset(self) -> int:
        return _aligned(self.rows_offset + 4 * self.total_rows * self.hidden_size)

    @property
    def arena_bytes(self) -> int:
        return self.sums_offset + 8 * self.total_rows * self.hidden_size

    @property
    def message_bytes(self) -> int:
        """Of this shard's message when it travels alone."""
        return _aligned(20 * self.num_pairs) + 4 * self.num_rows * self.hidden_size

    def alone(self) -> Header:
        """The same part as the only one of an arena."""
        return self._replace(first_row=0, first_pair=0, total_rows=self.num_rows, total_pairs=self.num_pairs)


HEADER_LENGTH = len(Header._fields)


@dataclass(frozen=True, slots=True)
class Message:
    """Rows for one shard (or all), what to do with them, and where the sums go; views of one arena."""

    pair_rows_P: Tensor
    pair_experts_P: Tensor
    pair_weights_P: Tensor
    rows_NH: Tensor
    sums_NH: Tensor


class Arena:
    """Memory for one exchange at a time: the lane's next one overwrites it. Grows and never shrinks."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._adopt(torch.empty(0, dtype=torch.uint8, device=device))

    def reserve(self, num_bytes: int) -> None:
        if self.buffer.numel() < num_bytes:
            self._adopt(torch.empty(roomy(num_bytes), dtype=torch.uint8, device=self.device))

    def message(self, header: Header) -> Message:
        """The header's part of the arena, which must be large enough. (as_strided: one call for each part.)"""
        hidden_size, total_pairs, first_pair = header.hidden_size, header.total_pairs, header.first_pair
        pairs, rows = (header.num_pairs,), (header.num_rows, hidden_size)
        strides = (hidden_size, 1)
        first = header.first_row * hidden_size
        return Message(
            self._integers.as_strided(pairs, (1,), first_pair),
            self._integers.as_strided(pairs, (1,), total_pairs + first_pair),
            self._floats.as_strided(pairs, (1,), 4 * total_pairs + first_pair),
            self._floats.as_strided(rows, strides, header.rows_offset // 4 + first),
            self._sums.as_strided(rows, strides, header.sums_offset // self._sums.itemsize + first),
        )

    def _adopt(self, buffer: Tensor) -> None:
        self.buffer = buffer
        self._integers, self._floats = buffer.view(torch.int64), buffer.view(torch.float32)
        self._sums = buffer.view(sums_dtype(self.device))


def roomy(num_bytes: int) -> int:
    """The next power of two, at least 64 KiB."""
    return 1 << max(16, (num_bytes - 1).bit_length())


def sums_dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "cuda" else torch.float64


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // 64) * 64


def no_bytes(device: torch.device) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=device)
