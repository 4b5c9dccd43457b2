"""The native kernels behind the seams of `model.kernels`. Each falls back to its torch reference where it must."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.attention import Attention, AttentionInputs, attention_reference
from model.experts import ExpertWeights, run_experts
from model.kv_cache import KVCache
from model.layers import MLP
from model.linear import DenseWeight, Int4Weight, Int8Weight, Weight
from model.moe import MoeBlock, Routed, route_reference
from model.native.packed_weight import FORMATS, PANEL, PackedExperts, PackedWeight
from model.native.shared_object import AttentionLayerStruct, RouteStruct, SharedObject, pointer
from model.quantize import INT4_GROUP_SIZE
from model.sampler_state import SamplingRow

# Inputs of an int8 weight that share one activation scale: an outlier coarsens 128 neighbours, not the whole row.
INT8_ACTIVATION_BLOCK = 128
MAX_HEAD_DIM, MAX_HEADS_PER_KV = 256, 192
_DRAW = struct.Struct("=4d2Q")
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

    def compact(self, weight: Weight) -> Weight:
        """See `PackedWeight.compacted`."""
        return weight.compacted() if isinstance(weight, PackedWeight) else weight

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

    def expert_table(self, experts: Mapping[int, ExpertWeights]) -> Mapping[int, ExpertWeights]:
        """See `Kernels.expert_table`."""
        matrices = [matrix for expert in experts.values() for matrix in (expert.gate_up, expert.down)]
        is_packed = all(isinstance(matrix, PackedWeight) for matrix in matrices)
        return PackedExperts(experts) if is_packed else dict(experts)

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
        table = experts if isinstance(experts, PackedExperts) else self.expert_table(experts)
        if not isinstance(table, PackedExperts):
            return run_experts(x_NH, pair_rows_P, pair_experts_P, pair_weights_P, experts, out_NH)
        x_NH = x_NH.contiguous()
        pair_rows_P, pair_experts_P = pair_rows_P.contiguous(), pair_experts_P.contiguous()
        pair_weights_P = pair_weights_P.contiguous()
        y_NH = torch.empty(x_NH.shape, dtype=torch.float64) if out_NH is None else out_NH
        missing = self.shared_object.run_experts(
            table.matrices,
            table.num_experts,
            pointer(x_NH),
            *x_NH.shape,
            pointer(pair_rows_P),
            pointer(pair_experts_P),
            pointer(pair_weights_P),
            len(pair_rows_P),
            pointer(y_NH),
            y_NH.dtype == torch.float32,
            self.shared_object.num_threads,
        )
        if missing >= 0:
            raise KeyError(int(pair_experts_P[missing]))
        return y_NH

    def attention(
        self, layer: Attention, x_TH: Tensor, delta_TH: Tensor | None, inputs: AttentionInputs, kv_cache: KVCache
    ) -> Tensor:
        """See `model.attention.attention_reference`; a token's bits don't depend on batch or chunking."""
        k_cache, v_cache = kv_cache.keys[layer.layer_idx], kv_cache.values[layer.layer_idx]
        block_size, (qkv, o) = v_cache.shape[2], (layer.qkv, layer.o)
        is_supported = (
            layer.head_dim % 16 == 0
            and layer.head_dim <= MAX_HEAD_DIM
            and block_size % 16 == 0
            and layer.num_heads // layer.num_kv_heads <= MAX_HEADS_PER_KV
            and k_cache.dtype in (torch.float32, torch.bfloat16)
        )
        if not (is_supported and isinstance(qkv, PackedWeight) and isinstance(o, PackedWeight)):
            return attention_reference(layer, x_TH, delta_TH, inputs, kv_cache)
        assert x_TH.is_contiguous() and (delta_TH is None or delta_TH.is_contiguous())
        (cos_T1D, sin_T1D), batch = inputs.cos_sin_T1D, inputs.batch
        assert inputs.block_ids_SB.is_contiguous() and inputs.write_rows_TG.is_contiguous()
        y_TH = torch.empty_like(x_TH)
        call = AttentionLayerStruct(
            *map(pointer, (x_TH, delta_TH, layer.norm.weight_H)),
            qkv.address,
            pointer(layer.qkv_bias),
            o.address,
            *map(pointer, (cos_T1D, sin_T1D, inputs.write_rows_TG, k_cache, v_cache, inputs.block_ids_SB)),
            *map(pointer, (batch.query_starts, batch.context_lens_S, y_TH)),
            len(x_TH),
            len(batch.context_lens_S),
            layer.num_heads,
            layer.num_kv_heads,
            layer.head_dim,
            block_size,
            inputs.block_ids_SB.shape[1],
            layer.window or 0,
            k_cache.dtype == torch.bfloat16,
            layer.norm.eps,
            layer.head_dim**-0.5,
        )
        self.shared_object.attention_layer(ctypes.addressof(call), self.shared_object.num_threads)
        return y_TH

    def route(self, block: MoeBlock, x_TH: Tensor, delta_TH: Tensor | None) -> Routed:
        """See `model.moe.route_reference`."""
        gate = block.gate
        if not isinstance(gate.weight, PackedWeight):
            return route_reference(block, x_TH, delta_TH)
        assert x_TH.is_contiguous() and (delta_TH is None or delta_TH.is_contiguous())
        num_tokens, top_k = len(x_TH), gate.num_experts_per_tok
        normed_TH, shared_gate_T1 = torch.empty_like(x_TH), torch.empty(num_tokens, 1)
        topk_ids_TK, topk_weights_TK = torch.empty(num_tokens, top_k, dtype=torch.int64), torch.empty(num_tokens, top_k)
        call = RouteStruct(
            *map(pointer, (x_TH, delta_TH, block.norm.weight_H)),
            gate.weight.address,
            *map(pointer, (normed_TH, topk_ids_TK, topk_weights_TK, shared_gate_T1)),
            num_tokens,
            top_k,
            gate.norm_topk_prob,
            block.norm.eps,
        )
        self.shared_object.route(ctypes.addressof(call), self.shared_object.num_threads)
        return Routed(normed_TH, topk_ids_TK, topk_weights_TK, shared_gate_T1)

    def mlp(self, mlp: MLP, x_TH: Tensor) -> Tensor:
        """See `model.layers.MLP.forward`."""
        if not (isinstance(mlp.gate_up, PackedWeight) and isinstance(mlp.down, PackedWeight)):
            return mlp.forward(x_TH)
        assert x_TH.is_contiguous()
        y_TH = torch.empty_like(x_TH)
        self.shared_object.mlp(
            mlp.gate_up.address,
            mlp.down.address,
            pointer(x_TH),
            len(x_TH),
            pointer(y_TH),
            self.shared_object.num_threads,
        )
        return y_TH

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

    def add_gated(self, y_TH: Tensor, x_TH: Tensor, gate_T1: Tensor) -> Tensor:
        """See `model.layers.add_gated`."""
        assert y_TH.is_contiguous()
        self.shared_object.add_gated(
            pointer(y_TH), pointer(x_TH), pointer(gate_T1), *y_TH.shape, self.shared_object.num_threads
        )
        return y_TH

    def draw_tokens(self, logits_RV: Tensor, rows: Sequence[SamplingRow]) -> tuple[list[int], list[float]]:
        """See `model.sampling.draw_tokens_reference`."""
        draws = b"".join(map(_packed_draw, rows))
        logits_RV = logits_RV.contiguous()
        tokens_R, largest_R = np.empty(len(rows), np.int64), np.empty(len(rows), np.float32)
        self.shared_object.draw_tokens(
            pointer(logits_RV),
            *logits_RV.shape,
            draws,
            tokens_R.ctypes.data,
            largest_R.ctypes.data,
            self.shared_object.num_threads,
        )
        return tokens_R.tolist(), largest_R.tolist()


def _packed_draw(row: SamplingRow) -> bytes:
    """`struct draw` of sampling.c."""
    p = row.state.params
    inverse_temperature = 0.0 if p.is_greedy else 1 / p.temperature
    return _DRAW.pack(
        inverse_temperature, p.top_k or 0, p.top_p, p.min_p, p.seed & 2**64 - 1, row.state.position & 2**32 - 1
    )


def _pad_rows(tensor: Tensor, num_panels: int) -> Tensor:
    padded = tensor.new_zeros(num_panels * PANEL, *tensor.shape[1:])
    padded[: len(tensor)] = tensor
    return padded
