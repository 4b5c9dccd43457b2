"""Paged attention against plain attention over the whole sequence."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
import torch
from torch import Tensor

from model.attention import paged_attention_reference
from model.config import ModelConfig
from model.kv_cache import KVCache, keys_of_blocks, lay_out_keys, write_keys


def plain_attention(q_TAD: Tensor, k_KGD: Tensor, v_KGD: Tensor, window: int | None, scale: float) -> Tensor:
    """One sequence; the queries are its last tokens. Query by query, head by head."""
    out_TAD = torch.empty_like(q_TAD)
    num_queries, num_heads, _ = q_TAD.shape
    num_keys, num_kv_heads, _ = k_KGD.shape
    for query in range(num_queries):
        end = num_keys - num_queries + query + 1
        begin = 0 if window is None else max(0, end - window)
        for head in range(num_heads):
            group = head * num_kv_heads // num_heads
            weights = (k_KGD[begin:end, group] @ q_TAD[query, head] * scale).softmax(0)
            out_TAD[query, head] = weights @ v_KGD[begin:end, group]
    return out_TAD


@pytest.mark.parametrize("window", [None, 1, 4, 9])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_ragged_batch_equals_plain_attention(
    window: int | None, num_heads: int, num_kv_heads: int, dtype: torch.dtype
) -> None:
    rng = random.Random(0)
    torch.manual_seed(0)
    block_size, head_dim, scale = 4, 6, 0.3
    context_lens, query_lens = [1, 13, 8, 17], [1, 1, 8, 5]
    free = list(range(1, 20))
    rng.shuffle(free)
    # Block 0 is nobody's, and blocks the window has passed have been given back: both poison what reads them.
    k_cache = torch.full((20, num_kv_heads, block_size, head_dim), float("nan"), dtype=dtype)
    v_cache = k_cache.clone()
    table = torch.zeros(4, 5, dtype=torch.int32)
    queries, expected = [], []
    for seq, (context_len, query_len) in enumerate(zip(context_lens, query_lens, strict=True)):
        q = torch.randn(query_len, num_heads, head_dim)
        k, v = torch.randn(2, context_len, num_kv_heads, head_dim).to(dtype)
        first_seen = 0 if window is None else max(0, context_len - query_len - window + 1)
        for position in range(first_seen // block_size * block_size, context_len):
            column, offset = divmod(position, block_size)
            if not table[seq, column]:
                table[seq, column] = free.pop()
            k_cache[table[seq, column], :, offset] = k[position]
            v_cache[table[seq, column], :, offset] = v[position]
        queries.append(q)
        expected.append(plain_attention(q, k.float(), v.float(), window, scale))

    out = paged_attention_reference(
        torch.cat(queries),
        lay_out_keys(k_cache),
        v_cache,
        table,
        torch.tensor([0, 1, 2, 10, 15], dtype=torch.int32),
        torch.tensor(context_lens, dtype=torch.int32),
        window,
        scale,
    )

    torch.testing.assert_close(out, torch.cat(expected), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block_size", [4, 16, 48])
def test_keys_come_back_from_where_they_were_written(dtype: torch.dtype, block_size: int) -> None:
    num_blocks, num_kv_heads, head_dim = 5, 2, 6
    keys = torch.randn(num_blocks, num_kv_heads, block_size, head_dim).to(dtype)
    cache = KVCache((lay_out_keys(torch.zeros_like(keys)),), (torch.zeros_like(keys),), block_size)
    slots_T = torch.randperm(num_blocks * block_size)
    written_TGD = keys.transpose(1, 2).flatten(0, 1)[slots_T]
    write_keys(cache.keys[0], cache.rows(slots_T), written_TGD.float())
    assert torch.equal(cache.keys[0], lay_out_keys(keys))
    assert torch.equal(keys_of_blocks(cache.keys[0], torch.tensor([3, 0])), keys[[3, 0]])


def test_each_layer_has_the_blocks_of_its_group() -> None:
    config = ModelConfig.from_dict(
        {
            "model_type": "qwen2_moe",
            "num_hidden_layers": 3,
            "hidden_size": 32,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "use_sliding_window": True,
            "max_window_layers": 2,
        }
    )
    cache = KVCache.allocate(config, num_blocks=[5, 3], block_size=4, dtype=torch.bfloat16)
    assert [tuple(values.shape) for values in cache.values] == [(3, 2, 4, 8), (5, 2, 4, 8), (5, 2, 4, 8)]
    for keys, values in zip(cache.keys, cache.values, strict=True):
        assert keys.shape == lay_out_keys(values).shape and not keys.any() and keys.dtype == torch.bfloat16


def test_a_cache_takes_memory_where_it_is_written_to() -> None:
    def resident_bytes() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")

    config = ModelConfig.from_dict({"model_type": "qwen2_moe", "num_hidden_layers": 1, "hidden_size": 1024})
    before = resident_bytes()
    cache = KVCache.allocate(config, num_blocks=[4096], block_size=16)
    size = cache.keys[0].nbytes + cache.values[0].nbytes
    assert size == 512 << 20 and resident_bytes() - before < size / 8
    cache.values[0][:1024] = 1.0
    assert resident_bytes() - before > size / 16  # an eighth, but for what else comes and goes
    assert cache.values[0][:1024].all() and not cache.values[0][1024:1100].any()
