"""From scheduled work to the tensors of one forward pass."""

from __future__ import annotations

import torch
from torch import Tensor

from actors.scheduler import Scheduled
from model.forward_batch import BlockTable, ForwardBatch


def build_batch(work: list[Scheduled], num_groups: int, block_size: int, device: torch.device) -> ForwardBatch:
    """Lay the work out flat, sequence after sequence. Small copies to the device, no synchronisation."""
    token_ids: list[int] = []
    positions: list[int] = []
    rope_lens: list[int] = []
    query_starts = [0]
    context_lens: list[int] = []
    for item in work:
        token_ids += item.sequence.token_ids[item.begin : item.end]
        positions += range(item.begin, item.end)
        prompt_len = item.sequence.prompt_len
        rope_lens += [max(prompt_len, position + 1) for position in range(item.begin, item.end)]
        query_starts.append(len(token_ids))
        context_lens.append(item.end)

    def to_device(values: list[int], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)

    return ForwardBatch(
        token_ids_T=to_device(token_ids, torch.int64),
        positions_T=to_device(positions, torch.int64),
        rope_lens_T=to_device(rope_lens, torch.int64),
        query_starts=to_device(query_starts, torch.int32),
        context_lens_S=to_device(context_lens, torch.int32),
        tables=tuple(_table(work, group, block_size, device) for group in range(num_groups)),
    )


def _table(work: list[Scheduled], group: int, block_size: int, device: torch.device) -> BlockTable:
    rows = [item.sequence.table.tables[group] for item in work]
    width = max(map(len, rows))
    slots: list[int] = []
    for item, row in zip(work, rows, strict=True):
        slots += [row[p // block_size] * block_size + p % block_size for p in range(item.begin, item.end)]
    padded = [row + [0] * (width - len(row)) for row in rows]
    return BlockTable(
        block_ids_SB=torch.tensor(padded, dtype=torch.int32).to(device, non_blocking=True),
        slots_T=torch.tensor(slots, dtype=torch.int64).to(device, non_blocking=True),
    )
