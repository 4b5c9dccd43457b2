"""The paged KV cache: tensors only. Which block belongs to whom is the scheduler's business."""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.config import ModelConfig

KV_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class KVCache:
    """Keys and values of every layer, in blocks of `block_size` tokens, float32 or bfloat16.

    Layers of one KV group (`ModelConfig.kv_groups`) share block ids: a block is a slice in each of its group's
    layers. A slot is `block_id * block_size + offset`.

        values[layer_idx]: [num_blocks of the layer's group, G, block_size, D]
        keys[layer_idx]: the same laid out by `lay_out_keys`
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    block_size: int

    @classmethod
    def allocate(
        cls,
        config: ModelConfig,
        *,
        num_blocks: Sequence[int],
        block_size: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> KVCache:
        """Zeroed blocks, `num_blocks[i]` for group i of `config.kv_groups`; on CPU they take memory when they are first
        written to. dtype: of KV_DTYPES."""
        shapes = [
            (num_blocks[config.layer_kv_group(i)], config.num_key_value_heads, block_size, config.head_dim)
            for i in range(config.num_hidden_layers)
        ]
        key_shapes = [lay_out_keys(torch.empty(shape, dtype=dtype, device="meta")).shape for shape in shapes]
        return cls(
            keys=tuple(_zeros(shape, dtype, device) for shape in key_shapes),
            values=tuple(_zeros(shape, dtype, device) for shape in shapes),
            block_size=block_size,
        )

    def rows(self, slots_T: Tensor) -> Tensor:
        """int64 [T, G]: where each head of a slot is in a layer's values seen as [num_blocks * G * block_size, D]."""
        num_kv_heads = self.keys[0].shape[1]
        blocks_T, offsets_T = slots_T // self.block_size, slots_T % self.block_size
        heads_TG = blocks_T[:, None] * num_kv_heads + torch.arange(num_kv_heads, device=slots_T.device)
        return heads_TG * self.block_size + offsets_T[:, None]


def _zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """On CPU of pages that the system makes when they are written to; torch.zeros writes all of them."""
    if torch.device(device).type != "cpu" or 0 in shape:
        return torch.zeros(shape, dtype=dtype, device=device)
    pages = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=dtype).view(tuple(shape))


def keys_together(block_size: int) -> int:
    """Keys of a block that lie side by side, so that as many scores are computed at once."""
    return 1 if block_size % 16 else 16


def lay_out_keys(k_BGSD: Tensor) -> Tensor:
    """Keys of blocks [B, G, block_size, D] as the cache has them: [B, G, block_size / n, D / w, n, w]. Numbers of `n` =
    keys_together keys lie side by side, each key's in words of 4 bytes: `w` = 1 in float32, 2 in bfloat16."""
    num_blocks, num_kv_heads, block_size, head_dim = k_BGSD.shape
    together, in_word = keys_together(block_size), 4 // k_BGSD.element_size()
    words = k_BGSD.reshape(num_blocks, num_kv_heads, -1, together, head_dim // in_word, in_word)
    return words.transpose(3, 4).contiguous()


def keys_of_blocks(k_cache: Tensor, block_ids_B: Tensor) -> Tensor:
    """[B, G, block_size, D], a copy: the inverse of `lay_out_keys`."""
    words = k_cache[block_ids_B].transpose(3, 4)
    return words.reshape(*words.shape[:2], words.shape[2] * words.shape[3], -1)


def write_keys(k_cache: Tensor, rows_TG: Tensor, k_TGD: Tensor) -> None:
    """Put keys into their rows of the cache (`KVCache.rows`)."""
    num_words, together, in_word = k_cache.shape[3:]
    words = k_TGD.to(k_cache.dtype).view(*rows_TG.shape, num_words, in_word)
    k_cache.view(-1, num_words, together, in_word)[rows_TG // together, :, rows_TG % together] = words
