"""Quantizing weights, and reading GPTQ's."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.quantize import check_same_groups, from_gptq, quantize_int4, quantize_int8


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(1, 150), st.sampled_from([torch.float32, torch.bfloat16]), st.integers(0, 99))
def test_int8_is_off_by_at_most_half_a_step_of_its_row(n: int, k: int, dtype: torch.dtype, seed: int) -> None:
    matrix = torch.randn(n, k, generator=torch.Generator().manual_seed(seed)).to(dtype)
    weight = quantize_int8(matrix)
    half_step = matrix.float().abs().amax(dim=1) / 254
    assert ((weight.dequantize() - matrix.float()).abs() <= half_step[:, None] * 1.0001).all()
    assert weight.values.min() >= -127


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(1, 150), st.sampled_from([4, 32, 64, 128]), st.integers(0, 99))
def test_int4_is_off_by_at_most_one_step_of_its_group(n: int, k: int, group_size: int, seed: int) -> None:
    matrix = torch.randn(n, k, generator=torch.Generator().manual_seed(seed))
    weight = quantize_int4(matrix, group_size)
    steps = weight.scales.repeat_interleave(group_size, dim=1)[:, :k].float()
    # Half a step of rounding, and as much again at the ends because the zero point is rounded to a step, a little more
    # because the scale is rounded to float16.
    assert ((weight.dequantize() - matrix).abs() <= steps * 1.01).all()


def test_rows_and_groups_of_zeros_stay_zeros() -> None:
    matrix = torch.randn(6, 64)
    matrix[2] = 0
    matrix[3, :32] = 0
    assert (quantize_int8(matrix).dequantize()[2] == 0).all()
    int4 = quantize_int4(matrix, 32).dequantize()
    assert (int4[2] == 0).all() and (int4[3, :32] == 0).all()


def test_a_matrix_of_many_row_blocks_is_quantized_like_its_rows() -> None:
    matrix = torch.randn(600, 4096).bfloat16()
    whole = quantize_int8(matrix).dequantize()
    assert torch.equal(quantize_int8(matrix[590:]).dequantize(), whole[590:])
    assert torch.equal(quantize_int4(matrix[590:]).dequantize(), quantize_int4(matrix).dequantize()[590:])


def test_int8_takes_at_most_55_and_int4_32_percent_of_bfloat16() -> None:
    matrix = torch.randn(256, 1024).bfloat16()
    assert quantize_int8(matrix).num_bytes <= 0.55 * matrix.nbytes
    assert quantize_int4(matrix).num_bytes <= 0.32 * matrix.nbytes


def test_a_group_size_that_kernels_cannot_use_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="group_size 6 must be a positive multiple of 4"):
        quantize_int4(torch.randn(4, 12), 6)


def _pack_int32(nibbles: Tensor) -> Tensor:
    """[R, 8 C] of 0..15 -> int32 [R, C], the lowest bits first, as AutoGPTQ writes them."""
    words = nibbles.long().view(len(nibbles), -1, 8) << torch.arange(0, 32, 4)
    return words.sum(dim=2).to(torch.int64).where(words.sum(dim=2) < 2**31, words.sum(dim=2) - 2**32).to(torch.int32)


def _gptq_matrix(
    g_idx: Tensor, num_outputs: int, group_size: int, zero_point_offset: int = 1
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """(qweight, qzeros, scales) of random weights, and the matrix [N, K] that they mean."""
    generator = torch.Generator().manual_seed(3)
    num_groups = -(-len(g_idx) // group_size)
    nibbles_KN = torch.randint(0, 16, (len(g_idx), num_outputs), generator=generator)
    stored_zeros = torch.randint(0, 16, (num_groups, num_outputs), generator=generator)
    scales = torch.rand(num_groups, num_outputs, generator=generator).half()
    matrix_KN = (nibbles_KN - stored_zeros[g_idx] - zero_point_offset) * scales[g_idx].float()
    return (_pack_int32(nibbles_KN.T).T.contiguous(), _pack_int32(stored_zeros), scales), matrix_KN.T


@pytest.mark.parametrize("zero_point_offset", [1, 0])
def test_gptq_weights_are_read_as_they_are(zero_point_offset: int) -> None:
    g_idx = torch.arange(64) // 32
    tensors, expected = _gptq_matrix(g_idx, 16, 32, zero_point_offset)
    weight = from_gptq(*tensors, g_idx.int(), group_size=32, zero_point_offset=zero_point_offset)
    assert torch.equal(weight.dequantize(), expected)
    assert weight.group_size == 32 and weight.input_order is None


def test_gptq_without_g_idx_has_consecutive_groups() -> None:
    tensors, expected = _gptq_matrix(torch.arange(64) // 16, 8, 16)
    assert torch.equal(from_gptq(*tensors, None, group_size=16).dequantize(), expected)


@pytest.mark.parametrize("act_order", [False, True])
def test_gptqs_last_group_may_be_shorter(act_order: bool) -> None:
    g_idx = torch.arange(176) // 128
    if act_order:
        g_idx = g_idx[torch.randperm(176)]
    tensors, expected = _gptq_matrix(g_idx, 8, 128)
    assert torch.equal(from_gptq(*tensors, g_idx.int(), group_size=128).dequantize(), expected)


def test_gptq_with_act_order_keeps_each_input_in_its_group() -> None:
    g_idx = (torch.arange(64) // 16)[torch.randperm(64, generator=torch.Generator().manual_seed(1))]
    tensors, expected = _gptq_matrix(g_idx, 8, 16)
    weight = from_gptq(*tensors, g_idx.int(), group_size=16)
    assert weight.input_order is not None
    assert torch.equal(weight.dequantize(), expected)


def test_gptq_tensors_that_disagree_are_refused() -> None:
    g_idx = torch.arange(64) // 32
    (qweight, qzeros, scales), _ = _gptq_matrix(g_idx, 16, 32)
    with pytest.raises(ValueError, match=r"qzeros \[2, 1\]"):
        from_gptq(qweight, qzeros[:, :1], scales, g_idx.int(), group_size=32)
    with pytest.raises(ValueError, match=r"qweight \[8, 12\], qzeros \[2, 1\]"):  # zero points of four outputs lack
        from_gptq(qweight[:, :12], qzeros[:, :1], scales[:, :12], g_idx.int(), group_size=32)
    with pytest.raises(ValueError, match=r"scales \[2, 16\].* with groups of 16"):
        from_gptq(qweight, qzeros, scales, None, group_size=16)
    with pytest.raises(ValueError, match="g_idx does not put 32 of 64 inputs"):
        from_gptq(qweight, qzeros, scales, torch.zeros(64, dtype=torch.int32), group_size=32)


def test_matrices_with_different_groups_are_not_joined() -> None:
    first = quantize_int4(torch.randn(4, 64), 32)
    check_same_groups(first, quantize_int4(torch.randn(3, 64), 32))
    with pytest.raises(ValueError, match="different groups"):
        check_same_groups(first, quantize_int4(torch.randn(4, 64), 64))
