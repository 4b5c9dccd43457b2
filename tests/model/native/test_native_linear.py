"""The packed matmul against plain torch, and its promise of the same bits in any batch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model.linear import DenseWeight, Int4Weight, Weight, linear
from model.native.kernels import NativeKernels
from model.native.packed_weight import PackedWeight
from model.quantize import quantize_int4, quantize_int8

SHAPES = [(1, 8), (32, 16), (33, 20), (96, 64), (130, 257), (200, 130), (7, 384), (50, 320)]
STORAGES = ["float32", "bfloat16", "bfloat16_inputs", "float16", "int8", "int4", "int4_act_order"]
INTEGERS = ["int8", "int4", "int4_act_order"]


def _weight(storage: str, num_outputs: int, num_inputs: int, seed: int = 0) -> Weight:
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(num_outputs, num_inputs, generator=generator)
    if storage == "int8":
        return quantize_int8(matrix)
    if storage == "int4":
        return quantize_int4(matrix, 64)
    if storage == "int4_act_order":
        plain = quantize_int4(matrix, 32)
        order = torch.randperm(num_inputs, generator=generator).int()
        return Int4Weight(
            num_inputs=num_inputs,
            values=plain.values,
            scales=plain.scales,
            zeros=plain.zeros,
            group_size=32,
            input_order=order,
        )
    if storage == "bfloat16_inputs":
        return DenseWeight(matrix.bfloat16(), bfloat16_inputs=True)
    return DenseWeight(matrix.to(getattr(torch, storage)))


def _round_activations(x_TK: Tensor, weight: Weight) -> Tensor:
    """What the integer kernels make of their inputs: 8 bits with one scale for each row and block of inputs."""
    order = weight.input_order if isinstance(weight, Int4Weight) else None
    block_size = weight.group_size if isinstance(weight, Int4Weight) else 128
    columns = torch.arange(x_TK.shape[1]) if order is None else order.long()
    rounded_TK = torch.empty_like(x_TK)
    for block in columns.split(block_size):
        largest = x_TK[:, block].abs().amax(dim=1, keepdim=True)
        rounded_TK[:, block] = (x_TK[:, block] * (127 / largest)).round() * (largest / 127)
    return rounded_TK


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("storage", STORAGES)
def test_packing_keeps_every_weight(native: NativeKernels, storage: str, shape: tuple[int, int]) -> None:
    weight = _weight(storage, *shape)
    packed = native.pack_weight(weight)
    assert packed is not weight and packed.shape == shape
    assert torch.equal(packed.dequantize(), weight.dequantize())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("storage", ["float32", "bfloat16", "float16", "int8"])
def test_a_packed_embedding_looks_up_its_rows(native: NativeKernels, storage: str, shape: tuple[int, int]) -> None:
    weight = _weight(storage, *shape)
    packed = native.pack_weight(weight)
    ids_T = torch.randint(0, shape[0], (9,))
    assert isinstance(packed, PackedWeight)
    assert torch.equal(packed.rows(ids_T), weight.dequantize()[ids_T])


def test_packing_takes_no_more_memory_when_panels_are_full(native: NativeKernels) -> None:
    for storage in STORAGES:
        weight = _weight(storage, 64, 128)
        assert native.pack_weight(weight).num_bytes == weight.num_bytes


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("storage", ["float32", "bfloat16", "bfloat16_inputs", "float16"])
@pytest.mark.parametrize("way", ["native", "vectors", "torch"])
def test_float_weights_give_the_float32_product(
    native: NativeKernels, levels: list[NativeKernels], storage: str, shape: tuple[int, int], way: str
) -> None:
    weight = _weight(storage, *shape)
    kernels = {"native": native, "vectors": levels[0]}.get(way)
    packed, bias = kernels.pack_weight(weight) if kernels else weight, torch.randn(shape[0])
    for num_rows in (1, 5, 30):
        x_TK = torch.randn(num_rows, shape[1])
        used_TK = x_TK.bfloat16() if storage == "bfloat16_inputs" else x_TK
        exact = used_TK.double() @ weight.dequantize().double().T + bias
        rounding = 1e-6 + 2**-18 * (storage == "bfloat16")  # with AMX an input keeps 16 bits
        bound = (x_TK.abs() @ weight.dequantize().abs().T + bias.abs()) * rounding
        assert ((linear(x_TK, packed, bias) - exact).abs() <= bound).all()


def test_inputs_beyond_bfloat16_stay_what_they_are(levels: list[NativeKernels]) -> None:
    """Infinity, NaN, and what rounds to infinity; 1.00390625 lies between two numbers, of which the even one is 1."""
    x_TK = torch.tensor([[float("inf"), 0.0], [float("nan"), 0.0], [3.4e38, 0.0], [1.00390625, 0.0]])
    weight = DenseWeight(torch.ones(1, 2).bfloat16(), bfloat16_inputs=True)
    expected = linear(x_TK, weight)
    assert expected.flatten().tolist()[2:] == [float("inf"), 1.0]
    for kernels in levels:
        assert torch.equal(linear(x_TK, kernels.pack_weight(weight)).nan_to_num(5.0), expected.nan_to_num(5.0))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("storage", INTEGERS)
def test_integer_weights_give_the_product_with_rounded_inputs(
    native: NativeKernels, storage: str, shape: tuple[int, int]
) -> None:
    weight = _weight(storage, *shape)
    x_TK = torch.randn(13, shape[1])
    exact = _round_activations(x_TK, weight).double() @ weight.dequantize().double().T
    bound = (x_TK.abs() @ weight.dequantize().abs().T) * 1e-6
    assert ((linear(x_TK, native.pack_weight(weight)) - exact).abs() <= bound).all()


@pytest.mark.parametrize("storage", INTEGERS)
def test_rounding_the_inputs_costs_about_a_percent(native: NativeKernels, storage: str) -> None:
    weight = _weight(storage, 256, 512)
    x_TK = torch.randn(40, 512)
    exact = x_TK @ weight.dequantize().T
    error = (linear(x_TK, native.pack_weight(weight)) - exact).pow(2).mean().sqrt() / exact.pow(2).mean().sqrt()
    assert error < 0.01


@pytest.mark.parametrize("storage", INTEGERS)
@pytest.mark.parametrize("way", ["native", "avx2", "avx512"])
def test_an_input_that_is_nan_makes_its_row_nan_and_no_other(
    native: NativeKernels, levels: list[NativeKernels], storage: str, way: str
) -> None:
    weight = _weight(storage, 40, 320)
    packed = {"native": native, "avx2": levels[0], "avx512": levels[1]}[way].pack_weight(weight)
    for input_idx in (0, 1, 7, 8, 15, 16, 63, 100, 319):
        x_TK = torch.randn(7, 320)
        x_TK[2, input_idx] = float("nan")
        assert torch.equal(linear(x_TK, packed).isnan(), linear(x_TK, weight).isnan()), input_idx


@pytest.mark.parametrize("storage", ["int8", "int4"])
def test_an_outlier_input_does_not_drown_the_rest_of_its_row(native: NativeKernels, storage: str) -> None:
    weight = _weight(storage, 64, 1024)
    x_TK = torch.randn(4, 1024)
    x_TK[:, 5] = 1000.0
    without_rest = x_TK.clone()
    without_rest[:, 512:] = 0
    packed = native.pack_weight(weight)
    rest = linear(x_TK, packed) - linear(without_rest, packed)
    exact = x_TK[:, 512:] @ weight.dequantize()[:, 512:].T
    assert (rest - exact).pow(2).mean().sqrt() < 0.02 * exact.pow(2).mean().sqrt()


@pytest.mark.parametrize("storage", STORAGES)
def test_a_row_has_the_same_bits_alone_and_in_any_batch(native: NativeKernels, storage: str) -> None:
    packed = native.pack_weight(_weight(storage, 170, 200))
    x_TK = torch.randn(64, 200)
    together = linear(x_TK, packed)
    for size in (1, 2, 3, 4, 5, 7, 8, 11, 12, 13, 25, 48):
        assert torch.equal(linear(x_TK[:size], packed), together[:size]), size
        assert torch.equal(linear(x_TK[64 - size :], packed), together[64 - size :]), size


@pytest.mark.parametrize("storage", STORAGES)
def test_both_vector_widths_give_the_same_bits(levels: list[NativeKernels], storage: str) -> None:
    weight, bias = _weight(storage, 170, 200), torch.randn(170)
    x_TK = torch.randn(17, 200)
    first, *others = (linear(x_TK, kernels.pack_weight(weight), bias) for kernels in levels)
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("storage", [*INTEGERS, "float32", "float16"])
@pytest.mark.parametrize("num_rows", [1, 5, 40])
def test_tiles_give_the_bits_of_vectors(
    native: NativeKernels, levels: list[NativeKernels], storage: str, num_rows: int
) -> None:
    weight, x_TK = _weight(storage, 70, 384), torch.randn(num_rows, 384)
    first, second = (linear(x_TK, kernels.pack_weight(weight)) for kernels in (native, levels[-1]))
    assert torch.equal(first, second)


@pytest.mark.parametrize("storage", STORAGES)
def test_rows_beyond_the_cache_have_the_same_bits(native: NativeKernels, storage: str) -> None:
    packed, x_TK = native.pack_weight(_weight(storage, 34, 5632)), torch.randn(300, 5632)
    together = linear(x_TK, packed)
    for first in (0, 100, 299):
        assert torch.equal(linear(x_TK[first : first + 7], packed), together[first : first + 7])


@pytest.mark.parametrize("storage", STORAGES)
def test_two_threads_give_the_same_bits(native: NativeKernels, two_threads: NativeKernels, storage: str) -> None:
    weight = _weight(storage, 900, 72)
    for num_rows in (1, 20):
        x_TK = torch.randn(num_rows, 72)
        one, two = (linear(x_TK, kernels.pack_weight(weight)) for kernels in (native, two_threads))
        assert torch.equal(one, two)


def test_rows_of_zeros_and_no_rows_are_fine(native: NativeKernels) -> None:
    for storage in STORAGES:
        packed = native.pack_weight(_weight(storage, 40, 64))
        assert (linear(torch.zeros(3, 64), packed) == 0).all()
        assert linear(torch.empty(0, 64), packed).shape == (0, 40)


def test_inputs_that_are_not_contiguous_are_read_right(native: NativeKernels) -> None:
    weight = _weight("float32", 40, 64)
    x_TK = torch.randn(64, 6).T
    torch.testing.assert_close(linear(x_TK, native.pack_weight(weight)), linear(x_TK, weight))


def test_an_input_of_the_wrong_width_is_refused_before_memory_is_read(native: NativeKernels) -> None:
    packed = native.pack_weight(_weight("bfloat16", 40, 64))
    with pytest.raises(ValueError, match=r"\[2, 60\], expected torch.float32 \[T, 64\]"):
        linear(torch.randn(2, 60), packed)
