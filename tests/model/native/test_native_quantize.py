"""Quantizing while loading: the bits of the plain reference, at every vector width."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model.linear import tensors_of
from model.native.kernels import NativeKernels
from model.quantize import quantize

SHAPES = [(1, 8), (33, 20), (7, 257), (64, 192), (130, 1408)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def assert_same_bits(kernels: NativeKernels, matrix_NK: Tensor, quantization: str) -> None:
    expected, found = quantize(matrix_NK, quantization), kernels.quantize(matrix_NK, quantization)
    assert found.shape == expected.shape
    for name, tensor in tensors_of(expected).items():
        assert torch.equal(tensors_of(found)[name].nan_to_num(7.0), tensor.nan_to_num(7.0)), name


@pytest.mark.parametrize("quantization", ["int8", "int4"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_quantizing_gives_the_bits_of_the_reference(
    levels: list[NativeKernels], shape: tuple[int, int], dtype: torch.dtype, quantization: str
) -> None:
    for scale in (1e-7, 0.02, 1.0, 1e4):
        matrix_NK = (torch.randn(shape) * scale).to(dtype)
        matrix_NK[0, :5] = 0
        for kernels in levels:
            assert_same_bits(kernels, matrix_NK, quantization)


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_zeros_halves_and_rows_that_are_not_contiguous(levels: list[NativeKernels], quantization: str) -> None:
    zeros = torch.zeros(3, 64)
    halves = torch.arange(-127, 128).float().repeat(2, 1) / 2  # steps that lie between two whole ones
    for kernels in levels:
        for matrix_NK in (zeros, halves, torch.randn(64, 40).T):
            assert_same_bits(kernels, matrix_NK, quantization)


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_a_weight_that_is_no_number_is_not_lost(levels: list[NativeKernels], quantization: str) -> None:
    for place in (0, 17, 63):
        matrix_NK = torch.randn(2, 64)
        matrix_NK[1, place] = float("nan")
        for kernels in levels:
            rows = kernels.quantize(matrix_NK, quantization).dequantize()
            assert rows[0].isfinite().all() and rows[1].isnan().any(), place
