"""The native kernels behind the seams of `model.kernels`. Each falls back to its torch reference where it must."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.attention import paged_attention_reference
from model.experts import ExpertWeights, run_experts
from model.linear import DenseWeight, Int4Weight, Int8Weight, Weight
from model.native.packed_weight import FORMATS, PANEL, PackedWeight
from model.native.shared_object import AttentionStruct, RotateStruct, SharedObject, pointer
from model.quantize import INT4_GROUP_SIZE
from model.random_bits import uniforms
from model.sampler_state import SamplingRow

# Inputs of an int8 weight that share one activation scale: an outlier coarsens 128 neighbours, not the whole row.
INT8_ACTIVATION_BLOCK = 128
MAX_HEAD_DIM, MAX_HEADS_PER_KV = 256, 192
_FORMAT_OF_DTYPE = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


@dataclass(frozen=True, slots=True)
class NativeKernels:
    """Methods with the signatures of `Kernels`."""

    shared_object: SharedObject

    def pack_weight(self, weight: Weight) -> Weight:
        """The weight in the kernels' layout, about the same bytes; the original may be dropped."""
        num_outputs, num_inputs = weight.shape
        num_panels, num_quads = -(-num_outputs // PANEL), -(-num_inputs // 4)
        packed: dict[str, Any]
        if isinstance(weight, DenseWeight):
            matrix, name = weight.tensor, _FORMAT_OF_DTYPE[weight.tensor.dtype]
            together = 2 if name == "bfloat16" else 1
            panels = torch.empty(num_panels, -(-num_inputs // together), together * PANEL, dtype=matrix.dtype)
            packed = {"bfloat16_inputs": weight.bfloat16_inputs}
        elif isinstance(weight, Int8Weight):
            matrix, name = weight.values, "int8"
            panels = torch.empty(num_panels, num_quads, 4 * PANEL, dtype=torch.uint8)
            packed = {"scales": _pad_rows(weight.scales, num_panels), "block_size": INT8_ACTIVATION_BLOCK}
        elif isinstance(weight, Int4Weight):
            matrix, name = weight.values, "int4"
            panels = torch.empty(num_panels, num_quads, 2 * PANEL, dtype=torch.uint8)
            scales, zeros = (
                _pad_rows(t, num_panels).view(num_panels, PANEL, -1).transpose(1, 2).contiguous()
                for t in (weight.scales, weight.zeros)
            )
            packed = {"scales": scales, "zeros": zeros, "block_size": min(weight.group_size, 4 * num_quads)}
            packed["input_order"] = weight.input_order
        else:
            return weight
        matrix = matrix.contiguous()
        self.shared_object.pack(pointer(matrix), *weight.shape, FORMATS.index(name), pointer(panels))
        return PackedWeight(shared_object=self.shared_object, format=name, shape=weight.shape, panels=panels, **packed)

    def quantize(self, matrix_NK: Tensor, quantization: str) -> Weight:
        """See `model.quantize.quantize`: the same bits."""
        num_outputs, num_inputs = matrix_NK.shape
        matrix_NK, name = matrix_NK.contiguous(), FORMATS.index(_FORMAT_OF_DTYPE[matrix_NK.dtype])
        if quantization == "int8":
            values, scales = torch.empty(num_outputs, num_inputs, dtype=torch.int8), torch.empty(num_outputs)
            self.shared_object.quantize_int8(
                pointer(matrix_NK), num_outputs, num_inputs, name, pointer(values), pointer(scales)
            )
            return Int8Weight(values, scales)
        num_groups = -(-num_inputs // INT4_GROUP_SIZE)
        weight = Int4Weight(
            num_inputs=num_inputs,
            values=torch.empty(num_outputs, -(-num_inputs // 2), dtype=torch.uint8),
            scales=torch.empty(num_outputs, num_groups, dtype=torch.float16),
            zeros=torch.empty(num_outputs, num_groups, dtype=torch.uint8),
            group_size=INT4_GROUP_SIZE,
        )
        self.shared_object.quantize_int4(
            pointer(matrix_NK),
            num_outputs,
            num_inputs,
            name,
            INT4_GROUP_SIZE,
            pointer(weight.values),
            pointer(weight.scales),
            pointer(weight.zeros),
        )
        return weight

    def run_experts(
        self,
        x_NH: Tensor,
        pair_rows_P: Tensor,
        pair_experts_P: Tensor,
        pair_weights_P: Tensor,
        experts: Mapping[int, ExpertWeights],
        out_NH: Tensor | None = None,
    ) -> Tensor:
        """See `model.experts.run_experts`; a row's bits don't depend on the other rows."""
        used = set(pair_experts_P.tolist())
        num_experts = max(used, default=-1) + 1
        matrices = (ctypes.c_void_p * (2 * num_experts))()
        for expert_id in used:
            expert = experts[expert_id]
            if not isinstance(expert.gate_up, PackedWeight) or not isinstance(expert.down, PackedWeight):
                return run_experts(x_NH, pair_rows_P, pair_experts_P, pair_weights_P, experts, out_NH)
            matrices[2 * expert_id] = expert.gate_up.address
            matrices[2 * expert_id + 1] = expert.down.address
        x_NH = x_NH.contiguous()
        pair_rows_P, pair_experts_P = pair_rows_P.contiguous(), pair_experts_P.contiguous()
        pair_weights_P = pair_weights_P.contiguous()
        y_NH = torch.empty(x_NH.shape, dtype=torch.float64) if out_NH is None else out_NH
        self.shared_object.run_experts(
            matrices,
            num_experts,
            pointer(x_NH),
            *x_NH.shape,
            pointer(pair_rows_P),
            pointer(pair_experts_P),
            pointer(pair_weights_P),
            len(pair_rows_P),
            pointer(y_NH),
            self.shared_object.num_threads,
        )
        return y_NH

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
        """See `model.attention.paged_attention_reference`; a token's bits don't depend on batch or chunking."""
        num_heads, head_dim = q_TAD.shape[1:]
        num_kv_heads, block_size = k_cache.shape[1:3]
        supported = (
            head_dim % 16 == 0
            and head_dim <= MAX_HEAD_DIM
            and block_size % 16 == 0
            and num_heads // num_kv_heads <= MAX_HEADS_PER_KV
            and k_cache.dtype in (torch.float32, torch.bfloat16)
        )
        if not supported:
            return paged_attention_reference(
                q_TAD, k_cache, v_cache, block_ids_SB, query_starts, context_lens_S, window, scale
            )
        q_TAD, block_ids_SB = q_TAD.contiguous(), block_ids_SB.contiguous()
        query_starts, context_lens_S = query_starts.contiguous(), context_lens_S.contiguous()
        out_TAD = torch.empty_like(q_TAD)
        call = AttentionStruct(
            pointer(out_TAD),
            pointer(q_TAD),
            pointer(k_cache),
            pointer(v_cache),
            pointer(block_ids_SB),
            pointer(query_starts),
            pointer(context_lens_S),
            len(context_lens_S),
            num_heads,
            num_kv_heads,
            head_dim,
            block_size,
            block_ids_SB.shape[1],
            window or 0,
            k_cache.dtype == torch.bfloat16,
            scale,
        )
        self.shared_object.paged_attention(ctypes.addressof(call), self.shared_object.num_threads)
        return out_TAD

    def add_norm(self, x_TH: Tensor, delta_TH: Tensor | None, weight_H: Tensor, eps: float) -> Tensor:
        """See `model.layers.add_norm`."""
        assert x_TH.is_contiguous() and (delta_TH is None or delta_TH.is_contiguous())
        y_TH = torch.empty_like(x_TH)
        self.shared_object.add_norm(
            pointer(x_TH),
            pointer(delta_TH),
            pointer(weight_H),
            eps,
            *x_TH.shape,
            pointer(y_TH),
            self.shared_object.num_threads,
        )
        return y_TH

    def rotate_into_cache(
        self, qkv_THD: Tensor, cos_T1D: Tensor, sin_T1D: Tensor, rows_TG: Tensor, k_cache: Tensor, v_cache: Tensor
    ) -> Tensor:
        """See `model.attention.rotate_into_cache_reference`."""
        num_tokens, num_heads, head_dim = qkv_THD.shape
        num_kv_heads = rows_TG.shape[1]
        q_TAD = torch.empty(num_tokens, num_heads - 2 * num_kv_heads, head_dim)
        call = RotateStruct(
            pointer(q_TAD),
            pointer(qkv_THD),
            pointer(cos_T1D),
            pointer(sin_T1D),
            pointer(rows_TG),
            pointer(k_cache),
            pointer(v_cache),
            q_TAD.shape[1],
            num_kv_heads,
            head_dim,
            k_cache.dtype == torch.bfloat16,
        )
        self.shared_object.rotate_into_cache(ctypes.addressof(call), num_tokens, self.shared_object.num_threads)
        return q_TAD

    def swiglu(self, gate_up_T2I: Tensor) -> Tensor:
        """See `model.layers.swiglu`."""
        num_tokens, width = gate_up_T2I.shape
        out_TI = torch.empty(num_tokens, width // 2)
        self.shared_object.swiglu(
            pointer(gate_up_T2I), num_tokens, width // 2, pointer(out_TI), self.shared_object.num_threads
        )
        return out_TI

    def add_gated(self, y_TH: Tensor, x_TH: Tensor, gate_T1: Tensor) -> Tensor:
        """See `model.layers.add_gated`."""
        assert y_TH.is_contiguous()
        self.shared_object.add_gated(
            pointer(y_TH), pointer(x_TH), pointer(gate_T1), *y_TH.shape, self.shared_object.num_threads
        )
        return y_TH

    def draw_tokens(self, logits_RV: Tensor, rows: Sequence[SamplingRow]) -> tuple[list[int], list[float]]:
        """See `model.sampling.draw_tokens_reference`."""
        random_R = uniforms([row.state.params.seed for row in rows], [row.state.position for row in rows])
        draws = np.array(
            [
                (0 if p.is_greedy else 1 / p.temperature, p.top_k or 0, p.top_p, p.min_p, uniform)
                for p, uniform in zip((row.state.params for row in rows), random_R.tolist(), strict=True)
            ]
        )
        logits_RV = logits_RV.contiguous()
        tokens_R, largest_R = np.empty(len(rows), np.int64), np.empty(len(rows), np.float32)
        self.shared_object.draw_tokens(
            pointer(logits_RV),
            *logits_RV.shape,
            draws.ctypes.data,
            tokens_R.ctypes.data,
            largest_R.ctypes.data,
            self.shared_object.num_threads,
        )
        return tokens_R.tolist(), largest_R.tolist()


def _pad_rows(tensor: Tensor, num_panels: int) -> Tensor:
    padded = tensor.new_zeros(num_panels * PANEL, *tensor.shape[1:])
    padded[: len(tensor)] = tensor
    return padded
