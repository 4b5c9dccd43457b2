"""Properties of the gate, the experts and the exchange: nothing lost, nothing twice, the same bits for any split."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.experts import ExpertWeights, run_experts
from model.linear import DenseWeight
from model.moe import Gate, LocalExchange

HIDDEN, INNER = 16, 16


def random_experts(num_experts: int, seed: int) -> dict[int, ExpertWeights]:
    generator = torch.Generator().manual_seed(seed)
    return {
        expert_id: ExpertWeights(
            DenseWeight(torch.randn(2 * INNER, HIDDEN, generator=generator)),
            DenseWeight(torch.randn(HIDDEN, INNER, generator=generator)),
        )
        for expert_id in range(num_experts)
    }


def scaling_expert(factor: float) -> ExpertWeights:
    """Maps x = [1, n, 0, ...] with n of at least 0 to about factor * n in every output: silu(20) is 20."""
    gate_up = torch.zeros(2 * INNER, HIDDEN)
    gate_up[0, 0] = 20.0
    gate_up[INNER, 1] = factor / 20
    down = torch.zeros(HIDDEN, INNER)
    down[:, 0] = 1.0
    return ExpertWeights(DenseWeight(gate_up), DenseWeight(down))


def exact_sum(x_NH: Tensor, ids_NK: Tensor, weights_NK: Tensor, experts: dict[int, ExpertWeights]) -> Tensor:
    """Token by token, pick by pick, in float64."""
    y_NH = torch.zeros(x_NH.shape, dtype=torch.float64)
    for row in range(x_NH.shape[0]):
        for expert_id, weight in zip(ids_NK[row].tolist(), weights_NK[row].double(), strict=True):
            gate, up = (experts[expert_id].gate_up.dequantize().double() @ x_NH[row].double()).chunk(2)
            out = experts[expert_id].down.dequantize().double() @ (torch.nn.functional.silu(gate) * up)
            y_NH[row] += weight * out
    return y_NH


batches = st.tuples(st.integers(1, 9), st.integers(1, 12), st.integers(0, 2**31)).flatmap(
    lambda sizes: st.tuples(st.just(sizes), st.integers(1, sizes[1]))
)


@given(batches, st.booleans())
@settings(deadline=None, max_examples=40)
def test_the_gate_picks_the_k_most_probable_experts_once_each(
    batch: tuple[tuple[int, int, int], int], normalized: bool
) -> None:
    (num_tokens, num_experts, seed), k = batch
    generator = torch.Generator().manual_seed(seed)
    x_TH = torch.randn(num_tokens, HIDDEN, generator=generator)
    gate = Gate(DenseWeight(torch.randn(num_experts + 1, HIDDEN, generator=generator)), k, normalized)

    ids_TK, weights_TK, shared_T1 = gate.forward(x_TH)

    logits_TE = x_TH @ gate.weight.dequantize().T
    torch.testing.assert_close(shared_T1, logits_TE[:, -1:])
    share_TE = logits_TE[:, :-1].softmax(-1)
    assert all(len(set(row)) == k for row in ids_TK.tolist())
    torch.testing.assert_close(share_TE.topk(k).values, share_TE.gather(1, ids_TK))
    sums_T = weights_TK.sum(-1)
    torch.testing.assert_close(sums_T, torch.ones(num_tokens) if normalized else share_TE.topk(k).values.sum(-1))


def test_equal_probabilities_are_settled_by_the_row_alone() -> None:
    gate = Gate(DenseWeight(torch.zeros(8, HIDDEN)), 3, False)
    x_TH = torch.randn(40, HIDDEN)
    together = gate.forward(x_TH)[0]
    assert all(torch.equal(gate.forward(x_TH[row : row + 1])[0][0], together[row]) for row in range(40))


@given(batches)
@settings(deadline=None, max_examples=40)
def test_experts_sum_every_pair_once(batch: tuple[tuple[int, int, int], int]) -> None:
    (num_tokens, num_experts, seed), k = batch
    generator = torch.Generator().manual_seed(seed)
    experts = random_experts(num_experts, seed)
    x_TH = torch.randn(num_tokens, HIDDEN, generator=generator)
    ids_TK = torch.rand(num_tokens, num_experts, generator=generator).topk(k).indices
    weights_TK = torch.rand(num_tokens, k, generator=generator)
    exchange = LocalExchange({(5, expert_id): expert for expert_id, expert in experts.items()})

    out_TH = exchange.combine(exchange.dispatch(5, x_TH, ids_TK, weights_TK))

    assert out_TH.dtype == torch.float32
    expected = exact_sum(x_TH, ids_TK, weights_TK, experts)
    torch.testing.assert_close(out_TH.double(), expected, atol=1e-4, rtol=1e-5)


def test_a_pair_lost_or_doubled_would_show() -> None:
    experts = {expert_id: scaling_expert(10.0**expert_id) for expert_id in range(4)}
    x_NH = torch.zeros(3, HIDDEN)
    x_NH[:, 0] = 1
    x_NH[:, 1] = torch.tensor([1.0, 2.0, 3.0])
    rows = torch.tensor([0, 0, 1, 1])
    expert_ids = torch.tensor([3, 0, 1, 2])

    y_NH = run_experts(x_NH, rows, expert_ids, torch.ones(4), experts)

    assert y_NH.dtype == torch.float64
    assert y_NH[:, 0].round().tolist() == [1001, 220, 0]


@given(batches, st.integers(1, 5), st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=60)
def test_any_split_over_shards_sums_to_the_same_bits(
    batch: tuple[tuple[int, int, int], int], num_shards: int, rng: random.Random
) -> None:
    (num_tokens, num_experts, seed), k = batch
    generator = torch.Generator().manual_seed(seed)
    experts = random_experts(num_experts, seed)
    x_TH = torch.randn(num_tokens, HIDDEN, generator=generator)
    expert_ids = torch.rand(num_tokens, num_experts, generator=generator).topk(k).indices.flatten()
    weights = torch.rand(num_tokens * k, generator=generator)
    rows = torch.arange(num_tokens).repeat_interleave(k)
    shard_of = torch.tensor([rng.randrange(num_shards) for _ in range(num_experts)])

    partial_sums = torch.zeros(num_tokens, HIDDEN, dtype=torch.float64)
    for shard in range(num_shards):
        pairs = (shard_of[expert_ids] == shard).nonzero().flatten()
        pairs = pairs[torch.randperm(len(pairs), generator=generator)]
        held = {expert_id: experts[expert_id] for expert_id in range(num_experts) if shard_of[expert_id] == shard}
        partial_sums += run_experts(x_TH, rows[pairs], expert_ids[pairs], weights[pairs], held)

    whole = run_experts(x_TH, rows, expert_ids, weights, experts)
    assert torch.equal(partial_sums, whole)  # already in float64: the sums are exact


def test_no_pairs_give_zeros() -> None:
    nothing = torch.empty(0, dtype=torch.int64)
    y_NH = run_experts(torch.ones(2, HIDDEN), nothing, nothing, torch.empty(0), {})
    assert torch.equal(y_NH, torch.zeros(2, HIDDEN, dtype=torch.float64))


def test_an_expert_that_is_not_held_is_an_error() -> None:
    one = torch.tensor([1])
    with pytest.raises(KeyError):
        run_experts(torch.ones(2, HIDDEN), torch.tensor([0]), one, torch.ones(1), random_experts(1, 0))
