"""The pieces of which the kernels make a layer, one at a time, to hold each against its reference and to measure it."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from model.native.build import shared_object_path
from model.native.kernels import NativeKernels
from model.native.shared_object import pointer, struct_fields


class AttentionStruct(ctypes.Structure):
    """`struct attention_call` of layer.h."""

    _fields_ = struct_fields(
        "out q k v block_ids query_starts context_lens",
        "num_sequences num_heads num_kv_heads head_dim block_size max_blocks window kv_is_bfloat16",
        "scale",
    )


class RotateStruct(ctypes.Structure):
    """`struct rotate_call` of layer.h."""

    _fields_ = struct_fields(
        "q qkv cos sin cache_rows k v", "num_heads num_kv_heads head_dim block_size kv_is_bfloat16"
    )


@functools.cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL(str(shared_object_path()))


class NativePieces(NativeKernels):
    """The kernels, with methods for their pieces: signatures as their references have them."""

    __slots__ = ()

    def _call(self, name: str, *arguments: int | None) -> None:
        """The C function of this name at this level, on this many threads; addresses don't fit ctypes' default int."""
        function = _library()[f"{name}_{self.shared_object.level}"]
        function(*(ctypes.c_int64(argument or 0) for argument in (*arguments, self.shared_object.num_threads)))

    def paged_attention(self, *arguments: Any) -> Tensor:
        """What `paged_attention_reference` takes."""
        *tensors, window, scale = arguments
        q_TAD, k_cache, v_cache, block_ids_SB, query_starts, context_lens_S = (one.contiguous() for one in tensors)
        out_TAD = torch.empty_like(q_TAD)
        num_kv_heads, block_size = v_cache.shape[1:3]
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
        self._call("paged_attention", ctypes.addressof(call))
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
            v_cache.shape[2],
            k_cache.dtype == torch.bfloat16,
        )
        self._call("rotate_into_cache", ctypes.addressof(call), num_tokens)
        return q_TAD

    def topk_softmax(self, logits_TE: Tensor, k: int, normalize: bool) -> tuple[Tensor, Tensor, Tensor]:
        """logits_TE with the shared expert's last; -> ids, weights and that one, as `Gate.forward`."""
        num_tokens, num_logits = logits_TE.shape
        ids_TK, weights_TK = torch.empty(num_tokens, k, dtype=torch.int64), torch.empty(num_tokens, k)
        shared_T1 = torch.empty(num_tokens, 1)
        results = map(pointer, (ids_TK, weights_TK, shared_T1))
        self._call("topk_softmax", pointer(logits_TE), num_tokens, num_logits - 1, k, normalize, *results)
        return ids_TK, weights_TK, shared_T1

    def swiglu(self, gate_up_T2I: Tensor) -> Tensor:
        num_tokens, width = gate_up_T2I.shape
        out_TI = torch.empty(num_tokens, width // 2)
        self._call("swiglu", pointer(gate_up_T2I), num_tokens, width // 2, pointer(out_TI))
        return out_TI
