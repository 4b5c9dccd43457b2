"""The pieces of which the kernels make a layer, one at a time, to hold each against its reference and to measure it."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from model.native.kernels import NativeKernels
from model.native.shared_object import AttentionStruct, RotateStruct, pointer


class NativePieces(NativeKernels):
    """The kernels, with methods for their pieces: signatures as their references have them."""

    __slots__ = ()

    def paged_attention(
        self,
        q_TAD: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        block_ids_SB: Tensor,
        query_starts: Tensor,
        context_lens_S: Tensor,
        window: int | None,
        scale: float,
    ) -> Tensor:
        q_TAD, block_ids_SB, query_starts, context_lens_S = (
            tensor.contiguous() for tensor in (q_TAD, block_ids_SB, query_starts, context_lens_S)
        )
        out_TAD = torch.empty_like(q_TAD)
        num_kv_heads, block_size = k_cache.shape[1:3]
        call = AttentionStruct(
            *map(pointer, (out_TAD, q_TAD, k_cache, v_cache, block_ids_SB, query_starts, context_lens_S)),
            len(context_lens_S),
            q_TAD.shape[1],
            num_kv_heads,
            q_TAD.shape[2],
            block_size,
            block_ids_SB.shape[1],
            window or 0,
            k_cache.dtype == torch.bfloat16,
            scale,
        )
        self.shared_object.paged_attention(ctypes.addressof(call), self.shared_object.num_threads)
        return out_TAD

    def rotate_into_cache(
        self, qkv_THD: Tensor, cos_T1D: Tensor, sin_T1D: Tensor, rows_TG: Tensor, k_cache: Tensor, v_cache: Tensor
    ) -> Tensor:
        num_tokens, num_heads, head_dim = qkv_THD.shape
        num_kv_heads = rows_TG.shape[1]
        q_TAD = torch.empty(num_tokens, num_heads - 2 * num_kv_heads, head_dim)
        call = RotateStruct(
            *map(pointer, (q_TAD, qkv_THD, cos_T1D, sin_T1D, rows_TG, k_cache, v_cache)),
            q_TAD.shape[1],
            num_kv_heads,
            head_dim,
            k_cache.dtype == torch.bfloat16,
        )
        self.shared_object.rotate_into_cache(ctypes.addressof(call), num_tokens, self.shared_object.num_threads)
        return q_TAD

    def topk_softmax(self, logits_TE: Tensor, k: int, normalize: bool) -> tuple[Tensor, Tensor, Tensor]:
        """logits_TE with the shared expert's last; -> ids, weights and that one, as `Gate.forward`."""
        num_tokens, num_logits = logits_TE.shape
        ids_TK, weights_TK = torch.empty(num_tokens, k, dtype=torch.int64), torch.empty(num_tokens, k)
        shared_T1 = torch.empty(num_tokens, 1)
        self.shared_object.topk_softmax(
            *(pointer(logits_TE), num_tokens, num_logits - 1, k, normalize),
            *map(pointer, (ids_TK, weights_TK, shared_T1)),
            self.shared_object.num_threads,
        )
        return ids_TK, weights_TK, shared_T1

    def swiglu(self, gate_up_T2I: Tensor) -> Tensor:
        num_tokens, width = gate_up_T2I.shape
        out_TI = torch.empty(num_tokens, width // 2)
        self.shared_object.swiglu(
            pointer(gate_up_T2I), num_tokens, width // 2, pointer(out_TI), self.shared_object.num_threads
        )
        return out_TI
