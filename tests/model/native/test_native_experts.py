"""The grouped expert kernel against the plain loop over experts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model.experts import ExpertWeights, run_experts
from model.linear import DenseWeight, Weight
from model.native.kernels import NativeKernels
from model.quantize import quantize_int4, quantize_int8

HIDDEN, INNER, NUM_EXPERTS, TOP_K = 72, 44, 6, 3
STORAGES = ["float32", "bfloat16", "bfloat16_inputs", "float16", "int8", "int4"]


def _experts(storage: str) -> dict[int, ExpertWeights]:
    generator = torch.Generator().manual_seed(0)

    def weight(num_outputs: int, num_inputs: int) -> Weight:
        matrix = torch.randn(num_outputs, num_inputs, generator=generator) * num_inputs**-0.5
        if storage == "int8":
            return quantize_int8(matrix)
        if storage == "int4":
            return quantize_int4(matrix, 32)
        if storage == "bfloat16_inputs":
            return DenseWeight(matrix.bfloat16(), bfloat16_inputs=True)
        return DenseWeight(matrix.to(getattr(torch, storage)))

    return {e: ExpertWeights(weight(2 * INNER, HIDDEN), weight(HIDDEN, INNER)) for e in range(NUM_EXPERTS)}


def _packed(native: NativeKernels, experts: dict[int, ExpertWeights]) -> dict[int, ExpertWeights]:
    return {
        e: ExpertWeights(native.pack_weight(expert.gate_up), native.pack_weight(expert.down))
        for e, expert in experts.items()
    }


def _routed(num_rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x_NH and, for each row, pairs with TOP_K different experts."""
    experts_NK = torch.stack([torch.randperm(NUM_EXPERTS)[:TOP_K] for _ in range(num_rows)])
    rows_P = torch.arange(num_rows).repeat_interleave(TOP_K)
    return torch.randn(num_rows, HIDDEN), rows_P, experts_NK.flatten(), torch.rand(num_rows * TOP_K)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("num_rows", [1, 2, 9, 70])
def test_experts_give_the_weighted_sum_of_the_plain_loop(native: NativeKernels, storage: str, num_rows: int) -> None:
    experts = _experts(storage)
    routed = _routed(num_rows)
    expected = run_experts(*routed, experts)
    found = native.run_experts(*routed, _packed(native, experts))
    error = (found - expected).abs().max() / expected.abs().max()
    assert found.dtype == torch.float64
    if storage == "bfloat16_inputs":  # sums between two bf16 numbers may become either
        assert error < 1e-3
    else:
        assert error < (0.03 if storage.startswith("int") else 1e-6)


@pytest.mark.parametrize("storage", STORAGES)
def test_a_row_has_the_same_bits_alone_and_in_any_batch(native: NativeKernels, storage: str) -> None:
    experts = _packed(native, _experts(storage))
    x_NH, rows_P, experts_P, weights_P = _routed(40)
    together = native.run_experts(x_NH, rows_P, experts_P, weights_P, experts)
    for row in (0, 17, 39):
        mine = rows_P == row
        alone = native.run_experts(
            x_NH[row : row + 1], torch.zeros(TOP_K, dtype=torch.int64), experts_P[mine], weights_P[mine], experts
        )
        assert torch.equal(alone[0], together[row])


@pytest.mark.parametrize("storage", STORAGES)
def test_any_split_over_shards_rounds_to_the_same_bits(native: NativeKernels, storage: str) -> None:
    experts = _packed(native, _experts(storage))
    x_NH, rows_P, experts_P, weights_P = _routed(40)
    whole = native.run_experts(x_NH, rows_P, experts_P, weights_P, experts).float()
    parts = torch.zeros(x_NH.shape, dtype=torch.float64)
    for shard in ({0, 4}, {1, 2, 3}, {5}):
        mine = torch.tensor([e in shard for e in experts_P.tolist()])
        held = {e: experts[e] for e in shard}
        parts += native.run_experts(x_NH, rows_P[mine], experts_P[mine], weights_P[mine], held)
    assert torch.equal(parts.float(), whole)


def test_rows_without_pairs_are_zero_and_no_pairs_are_fine(native: NativeKernels) -> None:
    experts = _packed(native, _experts("float32"))
    x_NH, rows_P, experts_P, weights_P = _routed(3)
    found = native.run_experts(x_NH, rows_P[TOP_K:], experts_P[TOP_K:], weights_P[TOP_K:], experts)
    assert (found[0] == 0).all() and (found[1:] != 0).all()
    nothing = native.run_experts(x_NH, rows_P[:0], experts_P[:0], weights_P[:0], experts)
    assert nothing.shape == x_NH.shape and (nothing == 0).all()


def test_both_vector_widths_give_the_same_bits(levels: list[NativeKernels]) -> None:
    routed = _routed(20)
    for storage in STORAGES:
        first, *others = (kernels.run_experts(*routed, _packed(kernels, _experts(storage))) for kernels in levels)
        assert all(torch.equal(first, other) for other in others), storage


def test_two_threads_give_the_same_bits(native: NativeKernels, two_threads: NativeKernels) -> None:
    routed = _routed(50)
    experts = _packed(native, _experts("bfloat16"))
    one = native.run_experts(*routed, experts)
    for _ in range(20):
        assert torch.equal(two_threads.run_experts(*routed, experts), one)


@pytest.mark.parametrize("num_rows", [1, 30])
def test_sums_are_rounded_where_float32_is_wanted(native: NativeKernels, num_rows: int) -> None:
    experts, routed = _packed(native, _experts("float32")), _routed(num_rows)
    out_NH = torch.full((num_rows, HIDDEN), float("nan"))
    assert native.run_experts(*routed, experts, out_NH) is out_NH
    assert torch.equal(out_NH, native.run_experts(*routed, experts).float())


def test_large_gate_values_neither_overflow_nor_turn_into_nan(native: NativeKernels) -> None:
    experts = _experts("float32")
    x_NH, rows_P, experts_P, weights_P = _routed(8)
    routed = (x_NH * 1e4, rows_P, experts_P, weights_P)
    found = native.run_experts(*routed, _packed(native, experts))
    expected = run_experts(*routed, experts)
    assert (found - expected).abs().max() < 1e-6 * expected.abs().max()


def test_a_pair_with_an_expert_that_is_not_held_is_refused(native: NativeKernels) -> None:
    experts = _packed(native, _experts("float32"))
    x_NH, rows_P, experts_P, weights_P = _routed(2)
    del experts[0]
    for ids_P in (experts_P + NUM_EXPERTS, experts_P - NUM_EXPERTS, torch.zeros_like(experts_P)):
        with pytest.raises(KeyError):
            native.run_experts(x_NH, rows_P, ids_P, weights_P, native.expert_table(experts))


def test_experts_that_are_not_packed_take_the_plain_loop(native: NativeKernels) -> None:
    experts, routed = _experts("float32"), _routed(5)
    assert torch.equal(native.run_experts(*routed, experts), run_experts(*routed, experts))
