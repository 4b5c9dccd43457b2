"""The one seam for matmuls with weights, in plain torch."""

from __future__ import annotations

import pytest
import torch

from model.linear import DenseWeight, Int8Weight, Weight, linear
from model.quantize import quantize_int4, quantize_int8


def _weights(num_outputs: int, num_inputs: int) -> dict[str, Weight]:
    matrix = torch.randn(num_outputs, num_inputs, generator=torch.Generator().manual_seed(0))
    return {
        "float32": DenseWeight(matrix),
        "bfloat16": DenseWeight(matrix.bfloat16()),
        "float16": DenseWeight(matrix.half()),
        "int8": quantize_int8(matrix),
        "int4": quantize_int4(matrix, 32),
    }


@pytest.mark.parametrize("storage", ["float32", "bfloat16", "float16", "int8", "int4"])
def test_a_matmul_uses_the_dequantized_matrix_and_adds_the_bias(storage: str) -> None:
    weight = _weights(50, 72)[storage]
    x_TK, bias = torch.randn(9, 72), torch.randn(50)
    expected = x_TK.double() @ weight.dequantize().double().T + bias
    torch.testing.assert_close(linear(x_TK, weight, bias), expected.float(), rtol=1e-5, atol=1e-5)
    assert weight.shape == (50, 72)


@pytest.mark.parametrize("storage", ["float32", "bfloat16", "int8", "int4"])
def test_a_row_has_the_same_bits_alone_and_in_any_batch(storage: str) -> None:
    weight = _weights(64, 96)[storage]
    x_TK = torch.randn(33, 96)
    together = linear(x_TK, weight)
    for size in (1, 2, 3, 7, 32):
        assert torch.equal(linear(x_TK[:size], weight), together[:size])


def test_no_rows_give_no_rows() -> None:
    assert linear(torch.empty(0, 96), _weights(64, 96)["float32"]).shape == (0, 64)


def test_bytes_are_those_of_the_storage() -> None:
    weights = _weights(64, 96)
    assert weights["float32"].num_bytes == 64 * 96 * 4
    assert weights["bfloat16"].num_bytes == 64 * 96 * 2
    assert weights["int8"].num_bytes == 64 * 96 + 64 * 4
    assert weights["int4"].num_bytes == 64 * 96 // 2 + 64 * 3 * (2 + 1)


def test_an_embedding_looks_up_rows_in_any_storage() -> None:
    ids = torch.tensor([3, 0, 3, 63])
    weights = _weights(64, 96)
    for storage in ("float32", "bfloat16", "int8"):
        weight = weights[storage]
        assert isinstance(weight, DenseWeight | Int8Weight)
        assert torch.equal(weight.rows(ids), weight.dequantize()[ids])
