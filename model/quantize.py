"""Smaller storage for weights: int8 by output channel, int4 in groups of inputs, and GPTQ checkpoints as they are."""

from __future__ import annotations

import torch
from torch import Tensor

from model.linear import Int4Weight, Int8Weight

INT4_GROUP_SIZE = 64
_FLOAT16 = torch.finfo(torch.float16)


def quantize(matrix_NK: Tensor, quantization: str) -> Int8Weight | Int4Weight:
    """A float32, bfloat16 or float16 matrix as "int8" or "int4". The reference for the native kernel."""
    return quantize_int8(matrix_NK) if quantization == "int8" else quantize_int4(matrix_NK)


def quantize_int8(matrix_NK: Tensor) -> Int8Weight:
    """Symmetric, one scale for each output channel: the largest weight of a row becomes +-127."""
    matrix_NK = matrix_NK.float()
    scales_N = matrix_NK.abs().amax(dim=1) / 127
    return Int8Weight((matrix_NK / scales_N[:, None].clamp_min(1e-30)).round_().to(torch.int8), scales_N)


def quantize_int4(matrix_NK: Tensor, group_size: int = INT4_GROUP_SIZE) -> Int4Weight:
    """Asymmetric, 16 steps from the least to the greatest weight of each group of inputs (or to 0).

    Scales are rounded to float16 first, as GPTQ stores them: with groups of 64, float32 would be a tenth of the bytes.

    group_size is a multiple of 4; the last group may be shorter.
    """
    num_outputs, num_inputs = matrix_NK.shape
    if group_size < 4 or group_size % 4:
        raise ValueError(f"group_size {group_size} must be a positive multiple of 4: use 32, 64 or 128")
    num_groups = -(-num_inputs // group_size)
    padded = torch.nn.functional.pad(matrix_NK.float(), (0, num_groups * group_size - num_inputs))
    groups = padded.view(num_outputs, num_groups, group_size)
    low, high = groups.amin(dim=2).clamp_max_(0), groups.amax(dim=2).clamp_min_(0)
    scales = ((high - low) / 15).clamp_(_FLOAT16.smallest_normal, _FLOAT16.max).half()
    zeros = (-low / scales.float()).round_().clamp_(0, 15)
    steps = (groups / scales.float()[..., None]).add_(zeros[..., None]).round_().clamp_(0, 15)
    values = _two_to_a_byte(steps.to(torch.uint8).flatten(1)[:, :num_inputs])
    return Int4Weight(
        num_inputs=num_inputs, values=values, scales=scales, zeros=zeros.to(torch.uint8), group_size=group_size
    )


def from_gptq(
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    g_idx: Tensor | None,
    *,
    group_size: int,
    zero_point_offset: int = 1,
) -> Int4Weight:
    """A matrix of a 4-bit GPTQ checkpoint: bit by bit the same weights.

    qweight int32 [K / 8, N]: input 8i + j in bits 4j..4j + 3. qzeros int32 [groups, N / 8]: zero points minus
    zero_point_offset, packed likewise over outputs. scales float16 [groups, N]. g_idx int32 [K]: the group of each
    input; with act-order they are not consecutive, and the inputs are sorted into their groups here. group_size inputs
    are a group, fewer the last: a multiple of 4, or K.
    """
    num_inputs, num_outputs = qweight.shape[0] * 8, qweight.shape[1]
    num_groups = -(-num_inputs // group_size)
    if scales.shape != (num_groups, num_outputs) or qzeros.shape != (num_groups, num_outputs / 8):
        raise ValueError(
            f"GPTQ tensors disagree: qweight {list(qweight.shape)}, qzeros {list(qzeros.shape)}, scales "
            f"{list(scales.shape)}; expected [K / 8, N], [groups, N / 8], [groups, N] with groups of {group_size}; "
            "fetch the checkpoint again"
        )
    if group_size % 4:  # the kernels read four inputs at a time
        raise ValueError(f"GPTQ group_size {group_size} must be a multiple of 4: quantize the model again with 128")
    zeros = _nibbles_of_int32(qzeros).T + zero_point_offset
    input_order = _group_order(g_idx, num_inputs, num_groups, group_size)
    if input_order is None:
        # A little-endian word is four of our bytes: only their order changes.
        values = qweight.contiguous().view(torch.uint8).view(-1, num_outputs, 4).transpose(0, 1).flatten(1)
    else:
        values = _two_to_a_byte(_nibbles_of_int32(qweight.T)[:, input_order.long()])
    return Int4Weight(
        num_inputs=num_inputs,
        values=values,
        scales=scales.T.half().contiguous(),
        zeros=zeros.contiguous(),
        group_size=group_size,
        input_order=input_order,
    )


def check_same_groups(first: Int4Weight, other: Int4Weight) -> None:
    """Raises ValueError unless both have the same inputs in the same groups."""
    same_order = (other.input_order is None) == (first.input_order is None) and (
        first.input_order is None or other.input_order is None or torch.equal(first.input_order, other.input_order)
    )
    if (other.shape[1], other.group_size) != (first.shape[1], first.group_size) or not same_order:
        raise ValueError(
            "GPTQ matrices with the same input have different groups (g_idx), which can't be run as one: "
            "quantize the model again without act-order (desc_act=False)"
        )


def _two_to_a_byte(nibbles_NK: Tensor) -> Tensor:
    """uint8 [N, K] of 0..15 -> [N, ceil(K / 2)], the even input in the low nibble."""
    nibbles_NK = torch.nn.functional.pad(nibbles_NK, (0, nibbles_NK.shape[1] % 2))
    return nibbles_NK[:, 0::2] | (nibbles_NK[:, 1::2] << 4)


def _nibbles_of_int32(packed: Tensor) -> Tensor:
    """int32 [R, C] -> uint8 [R, 8 C], the lowest four bits first."""
    octets = packed.contiguous().view(torch.uint8)
    return torch.stack((octets & 15, octets >> 4), dim=2).flatten(1)


def _group_order(g_idx: Tensor | None, num_inputs: int, num_groups: int, group_size: int) -> Tensor | None:
    """The inputs sorted by group, None when they are already in order."""
    in_order = torch.arange(num_inputs) // group_size
    if g_idx is None or torch.equal(g_idx.long().cpu(), in_order):
        return None
    order = g_idx.long().argsort(stable=True)
    if not torch.equal(g_idx.long()[order].cpu(), in_order):
        raise ValueError(
            f"GPTQ g_idx does not put {group_size} of {num_inputs} inputs into each of {num_groups} groups, "
            "fewer into the last; fetch the checkpoint again"
        )
    return order.to(torch.int32)
