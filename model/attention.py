"""Self-attention over the paged KV cache."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from model.forward_batch import ForwardBatch
from model.kv_cache import KVCache, keys_of_blocks, write_keys
from model.layers import RMSNorm, add_norm, rotate
from model.linear import Weight, linear


@dataclass(frozen=True, slots=True)
class AttentionInputs:
    """What all layers of one KV group share in a step."""

    batch: ForwardBatch
    cos_sin_T1D: tuple[Tensor, Tensor]
    block_ids_SB: Tensor
    write_rows_TG: Tensor
    """`KVCache.rows` of the slots."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """Grouped-query attention of one layer, and the norm before it."""

    layer_idx: int
    norm: RMSNorm
    qkv: Weight
    """[(A + 2G) D, H]: the rows of q_proj, k_proj and v_proj."""
    qkv_bias: Tensor | None
    """float32 [(A + 2G) D]."""
    o: Weight
    """[H, A D]."""
    num_heads: int
    num_kv_heads: int
    head_dim: int
    window: int | None


def attention_reference(
    layer: Attention, x_TH: Tensor, delta_TH: Tensor | None, inputs: AttentionInputs, kv_cache: KVCache
) -> Tensor:
    """x += delta, in place; then attention over norm(x), with this step's keys and values written into the cache first.
    -> what the layer adds to x, float32 [T, H]."""
    keys, values = kv_cache.keys[layer.layer_idx], kv_cache.values[layer.layer_idx]
    normed_TH = add_norm(x_TH, delta_TH, layer.norm.weight_H, layer.norm.eps)
    qkv_THD = linear(normed_TH, layer.qkv, layer.qkv_bias).view(len(x_TH), -1, layer.head_dim)
    q_TAD = rotate_into_cache_reference(qkv_THD, *inputs.cos_sin_T1D, inputs.write_rows_TG, keys, values)
    out_TAD = paged_attention_reference(
        q_TAD,
        keys,
        values,
        inputs.block_ids_SB,
        inputs.batch.query_starts,
        inputs.batch.context_lens_S,
        layer.window,
        layer.head_dim**-0.5,
    )
    return linear(out_TAD.flatten(1), layer.o)


def rotate_into_cache_reference(
    qkv_THD: Tensor, cos_T1D: Tensor, sin_T1D: Tensor, rows_TG: Tensor, k_cache: Tensor, v_cache: Tensor
) -> Tensor:
    """Rotates queries and keys, and puts keys and values into their rows of the cache. -> the queries, [T, A, D].

    qkv_THD float32: A query heads, G of keys, G of values; rows_TG of `KVCache.rows`; caches as for
    `paged_attention_reference`.
    """
    num_kv_heads, head_dim = rows_TG.shape[1], qkv_THD.shape[2]
    qk_THD = rotate(qkv_THD[:, :-num_kv_heads], cos_T1D, sin_T1D)
    write_keys(k_cache, rows_TG, qk_THD[:, -num_kv_heads:])
    v_cache.view(-1, head_dim)[rows_TG] = qkv_THD[:, -num_kv_heads:].to(v_cache.dtype)
    return qk_THD[:, :-num_kv_heads].contiguous()


def paged_attention_reference(
    q_TAD: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_ids_SB: Tensor,
    query_starts: Tensor,
    context_lens_S: Tensor,
    window: int | None,
    scale: float,
) -> Tensor:
    """Causal attention of each sequence's new tokens over all its keys. -> [T, A, D] float32.

    q_TAD float32; v_cache [num_blocks, G, block_size, D] float32 or bfloat16, k_cache the same laid out by
    `lay_out_keys`, both already holding this step's; block_ids_SB int32; query_starts int32 [S + 1]; context_lens_S
    int32, this step's tokens included: the n new tokens of a sequence are its last n. A token sees the last `window`
    keys up to its own (None: all). Query heads a * A/G ... (a + 1) * A/G - 1 share key-value head a. Blocks wholly
    outside the window are never read.

    Cost of one decoded token and layer: 2 * G * D * itemsize bytes read and 4 * A * D operations for each token of its
    context (at most `window`), so linear in the context and bound by memory. The kernels read the blocks in place;
    this reference copies them first, once a sequence and step. `python -m tests.bench.attention_cost`, microseconds per
    token and layer with A = G = 16, D = 128, float32, one AVX-512 core:

        context        128   256   512  1024   2048   4096    8192   16384
        kernel          51   222   415   850   1680   3830    7898   15690    17 to 20 GB/s of keys and values
        reference      727  1611  3627  7716  17348  83442  172158  357225
        window 1024     46   173   371   830    840    865     825     829
    """
    num_heads, head_dim = q_TAD.shape[1:]
    num_kv_heads, block_size = v_cache.shape[1:3]
    out_TAD = torch.empty_like(q_TAD)
    starts, context_lens = query_starts.tolist(), context_lens_S.tolist()
    for seq, context_len in enumerate(context_lens):
        begin, end = starts[seq], starts[seq + 1]
        num_queries = end - begin
        first_query = context_len - num_queries
        first_key = 0 if window is None else max(0, first_query - window + 1)
        first_block = first_key // block_size
        blocks = block_ids_SB[seq, first_block : -(-context_len // block_size)].long()
        keys = slice(first_key - first_block * block_size, context_len - first_block * block_size)
        k_GKD = keys_of_blocks(k_cache, blocks).transpose(0, 1).flatten(1, 2)[:, keys].float()
        v_GKD = v_cache[blocks].transpose(0, 1).flatten(1, 2)[:, keys].float()
        q_GMD = q_TAD[begin:end].view(num_queries, num_kv_heads, -1, head_dim).permute(1, 2, 0, 3).flatten(1, 2)
        scores_GMK = (q_GMD @ k_GKD.transpose(1, 2)).mul_(scale)
        if num_queries > 1:
            query_pos = torch.arange(first_query, context_len, device=q_TAD.device)[:, None]
            key_pos = torch.arange(first_key, context_len, device=q_TAD.device)
            hidden = key_pos > query_pos
            if window is not None:
                hidden |= key_pos <= query_pos - window
            scores_GMK.masked_fill_(hidden.repeat(num_heads // num_kv_heads, 1), float("-inf"))
        out_GMD = scores_GMK.softmax(dim=-1) @ v_GKD
        out_GRTD = out_GMD.view(num_kv_heads, -1, num_queries, head_dim)
        out_TAD[begin:end] = out_GRTD.permute(2, 0, 1, 3).reshape(num_queries, num_heads, head_dim)
    return out_TAD
