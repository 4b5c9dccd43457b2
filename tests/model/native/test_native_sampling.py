"""The native draw against the plain definition: all tokens of a row in order, in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.native.kernels import NativeKernels
from model.random_bits import uniforms
from model.sampler_state import SamplerState, SamplingRow
from model.sampling import draw_from_all, draw_tokens_reference, sample
from model.sampling_params import SamplingParams

any_params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 1.1e-5, 0.01, 0.3, 0.8, 1.0, 2.0, 50.0, 1e30]),
    top_k=st.sampled_from([None, None, 1, 2, 5, 40, 300, 2000, 2**31]),
    top_p=st.sampled_from([1.0, 1.0, 0.999, 0.95, 0.9, 0.3, 1e-9]),
    min_p=st.sampled_from([0.0, 0.0, 1e-5, 0.01, 0.2, 1.0]),
    seed=st.integers(0, 2**64 - 1),
)


@st.composite
def any_logits(draw: st.DrawFn, num_rows: int) -> Tensor:
    """Peaked, flat, tied and masked rows of any width."""
    size = draw(st.one_of(st.integers(1, 300), st.integers(1, 9000)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    logits = torch.randn(num_rows, size, generator=generator) * draw(st.sampled_from([0.0, 1e-6, 0.05, 1, 3, 30, 1e37]))
    if draw(st.booleans()):
        logits = logits.round()
    forbidden = draw(st.sampled_from([0, 0, 0.3, 0.999]))
    logits[torch.rand(logits.shape, generator=generator) < forbidden] = -math.inf
    return logits + draw(st.sampled_from([0.0, 20.0, -1000.0]))


def _rows(params: Sequence[SamplingParams]) -> list[SamplingRow]:
    return [SamplingRow(state=SamplerState(item, [3, 4])) for item in params]


def _expected(logits_V: Tensor, params: SamplingParams) -> int:
    if params.is_greedy:
        return int((logits_V == logits_V.max()).nonzero()[0])
    return draw_from_all(logits_V, params, uniforms([params.seed], [2]))


@settings(max_examples=1500, deadline=None, derandomize=True)
@given(st.lists(any_params, min_size=1, max_size=3), st.data())
def test_tokens_are_those_of_the_plain_definition(
    levels: list[NativeKernels], params: list[SamplingParams], data: st.DataObject
) -> None:
    logits = data.draw(any_logits(len(params)))
    if (logits.amax(1) == -math.inf).any():
        logits[:, 0] = 0.0
    expected = [_expected(row, item) for row, item in zip(logits, params, strict=True)]
    for kernels in levels:
        tokens, largest = kernels.draw_tokens(logits, _rows(params))
        assert tokens == expected
        assert largest == logits.amax(1).tolist()


SEVERAL = [
    SamplingParams(),
    SamplingParams(temperature=0.7, top_p=0.95),
    SamplingParams(top_k=50),
    SamplingParams(top_k=3000, top_p=0.9),
    SamplingParams(min_p=0.01, top_p=0.8),
    SamplingParams(temperature=1.3, min_p=0.001),
]


@pytest.mark.parametrize("spread", [0.3, 2.5])
def test_a_real_vocabulary_gives_the_same_tokens_at_both_widths_alone_and_with_two_threads(
    levels: list[NativeKernels], two_threads: NativeKernels, spread: float
) -> None:
    logits = torch.randn(18, 151_937) * spread  # an odd width: rows start at every alignment
    params = [replace(SEVERAL[at % len(SEVERAL)], seed=at) for at in range(18)]
    expected = [_expected(row, item) for row, item in zip(logits, params, strict=True)]
    for kernels in (*levels, two_threads):
        assert kernels.draw_tokens(logits, _rows(params))[0] == expected
    for at in range(18):
        assert levels[-1].draw_tokens(logits[at : at + 1], _rows(params[at : at + 1]))[0] == expected[at : at + 1]


@pytest.mark.parametrize("params", SEVERAL)
def test_the_sampler_in_torch_draws_the_same(native: NativeKernels, params: SamplingParams) -> None:
    """Its mass of the tail is summed in float32: too little to matter among 1,000 tokens."""
    logits = (torch.randn(1, 1000) * 0.7).expand(300, -1)
    rows = _rows([replace(params, seed=seed) for seed in range(300)])
    assert native.draw_tokens(logits, rows) == draw_tokens_reference(logits, rows)


def test_a_bucket_of_equals_is_one_order_too(native: NativeKernels) -> None:
    logits = torch.zeros(200, 70_000)
    logits[:, 5::7] = 1.0
    rows = _rows([SamplingParams(top_k=9000 + seed, top_p=0.999, seed=seed) for seed in range(200)])
    tokens = native.draw_tokens(logits, rows)[0]
    assert all(token % 7 == 5 for token in tokens) and max(tokens) > 60_000


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("size", [1, 40, 5000])
def test_a_broken_row_is_told_by_its_largest_logit(native: NativeKernels, size: int, temperature: float) -> None:
    logits = torch.randn(5, size)
    logits[1, size // 2], logits[2, size - 1] = math.nan, math.inf
    logits[3] = -math.inf
    rows = _rows([SamplingParams(temperature=temperature)] * 5)
    tokens, largest = native.draw_tokens(logits, rows)
    assert math.isnan(largest[1]) and largest[2:4] == [math.inf, -math.inf]
    assert sample(logits.clone(), rows, native.draw_tokens).errors == sample(logits.clone(), rows).errors
    assert [tokens[0], tokens[4]] == [native.draw_tokens(logits[at : at + 1], rows[:1])[0][0] for at in (0, 4)]


@pytest.mark.parametrize("num_nans", [1, 2])
def test_a_nan_is_never_lost_among_larger_numbers(native: NativeKernels, num_nans: int) -> None:
    for at in range(300 - num_nans):
        logits = torch.arange(300.0)[None].clone()
        logits[0, at : at + num_nans] = math.nan
        assert math.isnan(native.draw_tokens(logits, _rows([SamplingParams(temperature=0)]))[1][0])


def test_min_p_keeps_weights_that_round_to_it(native: NativeKernels) -> None:
    """At this temperature all weights are 1."""
    rows = _rows([SamplingParams(temperature=1e30, min_p=1.0, seed=seed) for seed in range(200)])
    assert set(native.draw_tokens(torch.arange(4.0).expand(200, -1), rows)[0]) == {0, 1, 2, 3}


def test_equals_are_kept_by_lower_id_and_a_negative_zero_is_a_zero(native: NativeKernels) -> None:
    logits = torch.tensor([[1.0, -0.0, 0.0, -0.0, 5.0, 5.0]]).expand(300, -1)
    rows = _rows([SamplingParams(temperature=50, top_k=4, seed=seed) for seed in range(300)])
    assert set(native.draw_tokens(logits, rows)[0]) == {4, 5, 0, 1}
