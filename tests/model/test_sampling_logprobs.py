"""Log-probabilities and ranks, candidates and random bits, against their plain definitions."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.candidates import chunk_maxima, first_argmax, top_candidates
from model.logprobs import row_mass, token_logprobs
from model.random_bits import philox2x32, uniforms
from model.sampler_state import SamplerState, SamplingRow
from model.sampling import sample
from model.sampling_params import SamplingParams

CPU = torch.device("cpu")


def random_logits(seed: int, num_rows: int, vocab_size: int, with_ties: bool = False) -> torch.Tensor:
    logits = torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * 3
    return logits.round() if with_ties else logits


def in_order(logits: torch.Tensor) -> list[int]:
    """Token ids by falling logit, then by rising id."""
    values = logits.tolist()
    return sorted((t for t, x in enumerate(values) if x > -math.inf), key=lambda t: (-values[t], t))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9000), st.integers(1, 700), st.integers(0, 2**31), st.booleans(), st.floats(0, 1))
def test_candidates_are_the_beginning_of_the_full_order(
    vocab_size: int, num: int, seed: int, with_ties: bool, forbidden: float
) -> None:
    logits = random_logits(seed, 3, vocab_size, with_ties)
    logits[1, torch.rand(vocab_size, generator=torch.Generator().manual_seed(seed)) < forbidden] = -math.inf
    found = top_candidates(logits, chunk_maxima(logits), num)
    for at in range(3):
        count = int(found.counts_R[at])
        order = in_order(logits[at])
        assert count >= min(num, len(order))
        assert found.ids_RW[at, :count].tolist() == order[:count]
        assert found.logits_RW[at, count:].eq(-math.inf).all()
        assert bool(found.has_rest_R[at]) or count == len(order)


@given(st.integers(1, 3000), st.integers(0, 2**31))
def test_the_first_of_the_largest_is_found(vocab_size: int, seed: int) -> None:
    logits = random_logits(seed, 2, vocab_size, with_ties=True)
    assert first_argmax(logits, chunk_maxima(logits)).tolist() == [in_order(row)[0] for row in logits]


def test_a_negative_zero_is_a_zero() -> None:
    logits = torch.tensor([[-0.0, 0.0, -0.0, -1.0]])
    assert top_candidates(logits, chunk_maxima(logits), 4).ids_RW[0, :4].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("vocab_size", [1, 127, 128, 1000, 50_001])
def test_the_mass_of_a_row_is_that_of_double_precision(vocab_size: int) -> None:
    logits = random_logits(0, 11, vocab_size)
    maxima, inverse = logits.amax(1), torch.linspace(0.5, 2, 11)
    expected = ((logits.double() - maxima[:, None].double()) * inverse[:, None].double()).exp().sum(1)
    torch.testing.assert_close(row_mass(logits, maxima, inverse), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("with_ties", [False, True])
@pytest.mark.parametrize("vocab_size", [5, 1000, 40_000])
def test_logprobs_and_ranks_are_those_of_a_full_sort(vocab_size: int, with_ties: bool) -> None:
    logits = random_logits(4, 4, vocab_size, with_ties)
    chosen = [0, vocab_size - 1, vocab_size // 2, int(logits[3].argmax())]
    wanted = [0, 1, 4, 20]
    result = token_logprobs(logits, chosen, wanted)
    expected = logits.double().log_softmax(1)
    for at, entries in enumerate(result):
        order = in_order(logits[at])
        assert [token for token, _, _ in entries] == [chosen[at], *order[: wanted[at]]]
        assert [rank for _, _, rank in entries] == [order.index(token) + 1 for token, _, _ in entries]
        for token, logprob, _ in entries:
            assert logprob == pytest.approx(float(expected[at, token]), abs=1e-6)


def test_logprobs_are_of_the_logits_before_any_option() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]] * 2)
    expected = logits[0].double().log_softmax(0).tolist()
    params = SamplingParams(temperature=0.1, allowed_token_ids=(2,), logit_bias={0: -50.0}, logprobs=2)
    plain = SamplingParams(temperature=0, frequency_penalty=1.0)
    rows = [SamplingRow(state=SamplerState(item, [1], [0])) for item in (params, plain)]
    output = sample(logits, rows)
    assert output.token_ids == [2, 0]
    assert output.logprobs[1] is None
    assert output.logprobs[0] is not None
    assert [(token, rank) for token, _, rank in output.logprobs[0]] == [(2, 3), (0, 1), (1, 2)]
    assert [logprob for _, logprob, _ in output.logprobs[0]] == pytest.approx([expected[2], expected[0], expected[1]])


def test_a_broken_row_has_no_logprobs_and_leaves_the_others_theirs() -> None:
    logits = random_logits(0, 3, 50)
    expected = token_logprobs(logits, [1, 2, 3], [2, 2, 2])
    logits[1, 7] = math.nan
    assert token_logprobs(logits, [1, 2, 3], [2, 2, 2]) == [expected[0], [], expected[2]]
    assert token_logprobs(logits[1:2], [1], [2]) == [[]]


def test_broken_logits_that_an_option_hides_are_still_an_error_where_logprobs_need_them() -> None:
    logits = torch.zeros(1, 4)
    logits[0, 1] = math.nan
    params = SamplingParams(bad_words_ids=((1,),), logprobs=1)
    output = sample(logits, [SamplingRow(state=SamplerState(params, []))])
    assert "must be finite" in str(output.errors[0])


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0x00000000, 0x00000000), 0x00000000, (0xFF1DAE59, 0x6CD10DF2)),
        ((0xFFFFFFFF, 0xFFFFFFFF), 0xFFFFFFFF, (0x2C3F628B, 0xAB4FD7AD)),
        ((0x243F6A88, 0x85A308D3), 0x13198A2E, (0xDD7CE038, 0xF62A4C12)),
    ],
)
def test_philox_gives_the_published_answers(counter: tuple[int, int], key: int, expected: tuple[int, int]) -> None:
    """Random123's known answers for philox2x32-10."""
    first, second = philox2x32(*(torch.tensor([value]) for value in (*counter, key)))
    assert (int(first), int(second)) == expected


def test_a_number_depends_on_seed_and_position_only() -> None:
    numbers = uniforms([7, 7, -1, 2**32 + 7], [0, 1, 0, 0], CPU).tolist()
    assert len(set(numbers)) == 4
    assert uniforms([2**64 - 1], [0], CPU).tolist() == numbers[2:3]


def test_uniforms_are_uniform_over_seeds_and_positions() -> None:
    numbers = uniforms(list(range(100)) * 1000, [at // 100 for at in range(100_000)], CPU)
    assert 0 < float(numbers.min()) < float(numbers.max()) < 1
    counts = numbers.mul(50).long().bincount(minlength=50).double()
    assert float(((counts - 2000) ** 2 / 2000).sum()) < 50 + 6 * 10
