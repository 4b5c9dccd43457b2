"""The sampler against a slow plain reference: a full sort in float64, one row at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.logit_edits import edit_logits
from model.random_bits import uniforms
from model.sampler_state import SamplerState, SamplingRow
from model.sampling import SampleOutput, draw_from_all, sample
from model.sampling_params import SamplingParams

END = 2


def row(params: SamplingParams, output_ids: Sequence[int] = (), prompt_ids: Sequence[int] = (3, 4)) -> SamplingRow:
    return SamplingRow(state=SamplerState(params, prompt_ids, output_ids, eos_token_ids=[END]))


def draw(logits_RV: Tensor, rows: Sequence[SamplingRow]) -> SampleOutput:
    return sample(logits_RV.clone(), rows)


def draw_one(logits: Sequence[float], params: SamplingParams, output_ids: Sequence[int] = ()) -> int:
    output = sample(torch.tensor([logits], dtype=torch.float32), [row(params, output_ids)])
    assert output.errors == [None]
    return output.token_ids[0]


def drawn_set(logits: Sequence[float], params: SamplingParams, output_ids: Sequence[int] = ()) -> set[int]:
    """All tokens that 300 seeds draw."""
    rows = [row(replace(params, seed=seed), output_ids) for seed in range(300)]
    return set(sample(torch.tensor([logits] * 300, dtype=torch.float32), rows).token_ids)


def reference_distribution(logits: Sequence[float], params: SamplingParams) -> tuple[list[int], list[float]]:
    """The kept tokens in order and their probabilities; plain Python floats and sums."""
    order = sorted(
        (token for token, x in enumerate(logits) if x > -math.inf), key=lambda token: (-logits[token], token)
    )
    weights = [math.exp((logits[token] - logits[order[0]]) / params.temperature) for token in order]
    count = sum(weight >= params.min_p for weight in weights)
    count = min(count, params.top_k or count)
    if params.top_p < 1:
        total, cumulated = math.fsum(weights[:count]), 0.0
        for at in range(count):
            if cumulated >= params.top_p * total:
                count = at
                break
            cumulated += weights[at]
    total = math.fsum(weights[:count])
    return order[:count], [weight / total for weight in weights[:count]]


def reference_token(logits: Sequence[float], params: SamplingParams, position: int) -> int:
    """The first kept token whose cumulated probability exceeds the sampler's own random number."""
    if params.is_greedy:
        return max(range(len(logits)), key=lambda token: (logits[token], -token))
    tokens, probabilities = reference_distribution(logits, params)
    uniform = float(uniforms([params.seed], [position], torch.device("cpu")))
    return tokens[int(np.searchsorted(np.cumsum(probabilities), uniform, side="right"))]


def assert_frequencies(tokens: list[int], ids: list[int], probabilities: list[float]) -> None:
    """Chi-square: no further from its mean than six standard deviations; and nothing else is drawn."""
    assert set(tokens) <= set(ids)
    counts = np.bincount(tokens, minlength=max(ids) + 1)[ids]
    expected = np.array(probabilities) * len(tokens)
    large = expected >= 5  # pool the rare ones
    observed = np.append(counts[large], counts[~large].sum())
    expected = np.append(expected[large], expected[~large].sum() + 1e-9)
    statistic = float(((observed - expected) ** 2 / np.maximum(expected, 1)).sum())
    degrees = len(observed)
    assert statistic < degrees + 6 * math.sqrt(2 * degrees)


random_params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.3, 0.8, 1.0, 2.0]),
    top_k=st.sampled_from([None, None, 1, 5, 40, 300]),
    top_p=st.sampled_from([1.0, 0.999, 0.9, 0.3, 1e-9]),
    min_p=st.sampled_from([0.0, 0.0, 0.01, 0.2, 1.0]),
    seed=st.integers(0, 2**64 - 1),
)
edited_params = st.builds(
    lambda params, **edits: replace(params, **edits),
    random_params,
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.7]),
    frequency_penalty=st.sampled_from([0.0, 0.5]),
    presence_penalty=st.sampled_from([0.0, -0.5]),
    logit_bias=st.sampled_from([{}, {1: 5.0, 6: -100.0}]),
    allowed_token_ids=st.sampled_from([None, (0, 1, 3, 6)]),
    bad_words_ids=st.sampled_from([(), ((1,), (4, 3))]),
    min_tokens=st.sampled_from([0, 10]),
    logprobs=st.sampled_from([None, 0, 3]),
)


def random_logits(seed: int, num_rows: int, vocab_size: int, with_ties: bool) -> Tensor:
    logits = torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * 3
    return logits.round() if with_ties else logits


@settings(max_examples=200, deadline=None)
@given(st.lists(random_params, min_size=1, max_size=4), st.integers(1, 250), st.integers(0, 2**31), st.booleans())
def test_tokens_are_those_of_the_reference(
    params: list[SamplingParams], vocab_size: int, seed: int, with_ties: bool
) -> None:
    logits = random_logits(seed, len(params), vocab_size, with_ties)
    rows = [row(item, output_ids=[1] * at) for at, item in enumerate(params)]
    expected = [reference_token(logits[at].tolist(), item, 2 + at) for at, item in enumerate(params)]
    assert draw(logits, rows).token_ids == expected


@settings(max_examples=40, deadline=None)
@given(st.integers(300, 20_000), st.integers(0, 2**31), st.sampled_from([1, 20, 200]), st.booleans())
def test_top_k_of_a_large_vocabulary_is_that_of_a_full_sort(
    vocab_size: int, seed: int, top_k: int, with_ties: bool
) -> None:
    logits = random_logits(seed, 3, vocab_size, with_ties)
    params = [SamplingParams(top_k=top_k, top_p=0.9, seed=seed + at) for at in range(3)]
    expected = [reference_token(logits[at].tolist(), item, 2) for at, item in enumerate(params)]
    assert draw(logits, [row(item) for item in params]).token_ids == expected


@settings(max_examples=60, deadline=None)
@given(
    st.lists(edited_params, min_size=2, max_size=6),
    st.sampled_from([7, 100, 300, 1000, 5001]),
    st.integers(0, 2**31),
    st.booleans(),
)
def test_a_row_alone_draws_what_it_draws_in_a_batch(
    params: list[SamplingParams], vocab_size: int, seed: int, with_ties: bool
) -> None:
    logits = random_logits(seed, len(params), vocab_size, with_ties)
    rows = [row(item, output_ids=[1, 4][:at]) for at, item in enumerate(params)]
    together = draw(logits, rows)
    turned = draw(logits.flip(0), rows[::-1])
    assert turned.token_ids[::-1] == together.token_ids
    for at, single in enumerate(rows):
        alone = draw(logits[at : at + 1], [single])
        assert alone.token_ids[0] == together.token_ids[at]
        assert alone.logprobs[0] == together.logprobs[at]
        assert alone.errors[0] == together.errors[at]


def test_a_real_vocabulary_gives_the_same_bits_alone_in_a_batch_and_with_two_threads() -> None:
    logits = random_logits(0, 9, 151_937, with_ties=False)  # an odd width: rows start at every alignment
    params = [
        SamplingParams(temperature=0.9, top_p=0.9, seed=at, logprobs=5, repetition_penalty=1 + at % 2)
        for at in range(9)
    ]
    rows = [row(item) for item in params]
    together = draw(logits, rows)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert draw(logits, rows) == together
        for at in range(9):
            alone = draw(logits[at : at + 1], rows[at : at + 1])
            assert (alone.token_ids[0], alone.logprobs[0]) == (together.token_ids[at], together.logprobs[at])
    finally:
        torch.set_num_threads(num_threads)


TAIL_PARAMS = [
    SamplingParams(),
    SamplingParams(temperature=0.7, top_p=0.95),
    SamplingParams(top_p=0.5),
    SamplingParams(min_p=0.001),
    SamplingParams(top_k=400),
    SamplingParams(top_k=400, top_p=0.9),
    SamplingParams(min_p=0.01, top_p=0.8),
]


@pytest.mark.parametrize("params", [SamplingParams(top_k=10), *TAIL_PARAMS])
def test_frequencies_are_those_of_the_distribution(params: SamplingParams) -> None:
    """1,000 tokens of which the head holds some 256: most of these draws need the tail."""
    logits = random_logits(1, 1, 1000, with_ties=False) * 0.5
    rows = [row(replace(params, seed=seed)) for seed in range(2500)]
    tokens = draw(logits.expand(2500, -1), rows).token_ids
    assert_frequencies(tokens, *reference_distribution(logits[0].tolist(), params))


@pytest.mark.parametrize("params", TAIL_PARAMS)
def test_bounds_on_the_tail_never_change_a_draw(params: SamplingParams) -> None:
    logits = random_logits(4, 1, 1000, with_ties=False) * 0.7  # no cut lies within float32 rounding of a token
    rows = [row(replace(params, seed=seed)) for seed in range(300)]
    expected = [draw_from_all(logits[0], params, uniforms([seed], [2])) for seed in range(300)]
    assert draw(logits.expand(300, -1), rows).token_ids == expected


def test_a_nucleus_one_token_wider_than_the_head_reaches_that_token() -> None:
    rows = [row(SamplingParams(seed=seed, top_p=256.5 / 1100)) for seed in range(1500)]
    tokens = sample(torch.zeros(1500, 1100), rows).token_ids  # so many equals: the head is the first 256 ids
    assert max(tokens) == 256


def test_positions_of_one_seed_draw_independently() -> None:
    rows = [row(SamplingParams(seed=7), output_ids=[0] * position) for position in range(2000)]
    tokens = sample(torch.zeros(2000, 4), rows).token_ids
    assert_frequencies(tokens, [0, 1, 2, 3], [0.25] * 4)
    pairs = [first * 4 + second for first, second in pairwise(tokens)]
    assert_frequencies(pairs, list(range(16)), [1 / 16] * 16)


def test_a_replayed_request_goes_on_with_the_same_tokens() -> None:
    params = SamplingParams(seed=5, repetition_penalty=1.2, frequency_penalty=0.3)
    steps = random_logits(3, 12, 600, with_ties=False)
    state = SamplerState(params, [9, 9])
    for step in steps:
        state.append(sample(step[None].clone(), [SamplingRow(state=state)]).token_ids[0])
    replayed = SamplerState(params, [9, 9], state.output_ids[:5])
    for step in steps[5:]:
        replayed.append(sample(step[None].clone(), [SamplingRow(state=replayed)]).token_ids[0])
    assert replayed.output_ids == state.output_ids


@pytest.mark.parametrize("vocab_size", [3, 700, 70_001])
def test_greedy_takes_the_lowest_id_of_equals(vocab_size: int) -> None:
    logits = torch.zeros(2, vocab_size)
    logits[1, [vocab_size - 1, vocab_size // 2]] = 1
    rows = [row(SamplingParams(temperature=0)), row(SamplingParams(temperature=1e-6))]
    assert sample(logits, rows).token_ids == [0, vocab_size // 2]


def test_a_uniform_distribution_over_a_large_vocabulary_reaches_all_of_it() -> None:
    rows = [row(SamplingParams(seed=seed)) for seed in range(400)]
    tokens = sample(torch.zeros(400, 5000), rows).token_ids
    assert_frequencies([token // 500 for token in tokens], list(range(10)), [0.1] * 10)


def test_equal_logits_are_kept_by_lower_id_under_top_k() -> None:
    assert drawn_set([1.0, 5.0, 5.0, 5.0, 0.0], SamplingParams(top_k=2)) == {1, 2}


def test_top_p_keeps_the_token_that_reaches_it() -> None:
    logits = [math.log(p) for p in (0.5, 0.3, 0.15, 0.05)]
    assert drawn_set(logits, SamplingParams(top_p=0.45)) == {0}
    assert drawn_set(logits, SamplingParams(top_p=0.6)) == {0, 1}
    assert drawn_set(logits, SamplingParams(top_p=0.9)) == {0, 1, 2}
    assert drawn_set(logits, SamplingParams(top_p=1e-12)) == {0}


def test_top_p_is_a_share_of_what_top_k_left() -> None:
    logits = [math.log(p) for p in (0.4, 0.3, 0.2, 0.1)]
    assert drawn_set(logits, SamplingParams(top_k=2, top_p=0.55)) == {0}  # 0.4 / 0.7 reaches it


def test_min_p_is_a_share_of_the_likeliest() -> None:
    logits = [math.log(p) for p in (0.5, 0.26, 0.2, 0.04)]
    assert drawn_set(logits, SamplingParams(min_p=0.5)) == {0, 1}
    assert drawn_set(logits, SamplingParams(min_p=1.0)) == {0}


def test_a_low_temperature_sharpens() -> None:
    assert drawn_set([1.0, 0.0], SamplingParams(temperature=0.01)) == {0}
    assert drawn_set([1.0, 0.0], SamplingParams(temperature=1.0)) == {0, 1}


GREEDY = SamplingParams(temperature=0)


def test_repetition_penalty_lowers_tokens_of_prompt_and_output_whatever_their_sign() -> None:
    params = replace(GREEDY, repetition_penalty=2.0)
    assert draw_one([0, 0, 0, 4.0, 3.9, 2.1], params) == 5  # 3 and 4 are in the prompt: 2.0 and 1.95
    assert draw_one([-9, -9, -9, -1.0, -1.0, -1.9], params) == 5  # -2, -2
    assert draw_one([0, 0, 0, 4.0, 3.9, 2.1], params, output_ids=[5]) == 3


def test_frequency_penalty_counts_the_output_only() -> None:
    params = replace(GREEDY, frequency_penalty=1.0)
    assert draw_one([0, 0, 0, 5.0, 0, 2.9], params, output_ids=[3, 3]) == 3
    assert draw_one([0, 0, 0, 5.0, 0, 2.9], params, output_ids=[3, 3, 3]) == 5
    assert draw_one([0, 0, 0, 0.1, 0, 0], params) == 3  # in the prompt


def test_presence_penalty_is_the_same_for_any_number_of_times() -> None:
    params = replace(GREEDY, presence_penalty=1.0)
    assert draw_one([0, 0, 0, 5.0, 0, 3.9], params, output_ids=[3, 3, 3]) == 3
    assert draw_one([0, 0, 0, 5.0, 0, 4.1], params, output_ids=[3]) == 5


def test_penalties_follow_a_history_that_outgrows_its_buffer() -> None:
    state = SamplerState(replace(GREEDY, presence_penalty=2.0), [])
    for token in range(500):
        state.append(token)
    assert sample(torch.ones(1, 501) + torch.eye(1, 501), [SamplingRow(state=state)]).token_ids == [500]


def test_logit_bias_is_added_before_penalties() -> None:
    assert draw_one([0, 0, 0, 0, 0, 0], replace(GREEDY, logit_bias={5: 1.0})) == 5
    assert draw_one([0, 0, 2.0, 0, 0, 0], replace(GREEDY, logit_bias={2: -100.0})) == 0
    params = replace(GREEDY, logit_bias={3: 4.0}, repetition_penalty=2.0)
    assert draw_one([2.5, 0, 0, 0, 0, 0], params) == 0  # 4 / 2


def test_allowed_token_ids_are_the_only_ones() -> None:
    assert drawn_set([9.0, 0, 0, 0, 0, 0], SamplingParams(allowed_token_ids=(1, 4))) == {1, 4}


def test_a_bad_word_of_one_token_never_comes() -> None:
    assert draw_one([5.0, 4.0, 0], replace(GREEDY, bad_words_ids=((0,),))) == 1


def test_a_bad_word_of_several_tokens_is_not_completed() -> None:
    params = replace(GREEDY, bad_words_ids=((3, 4, 0),))
    logits = [5.0, 4.0, 0, 0, 0]
    assert draw_one(logits, params, output_ids=[3, 4]) == 1
    assert draw_one(logits, params, output_ids=[4, 4]) == 0
    assert draw_one(logits, params, output_ids=[4]) == 0
    assert draw_one(logits, params) == 0  # the prompt ends with 3, 4, but only the output counts


def test_min_tokens_holds_back_end_and_stop_tokens() -> None:
    params = replace(GREEDY, min_tokens=2, stop_token_ids=(1,))
    logits = [0.0, 4.0, 5.0, 3.0]
    assert draw_one(logits, params) == 3
    assert draw_one(logits, params, output_ids=[3]) == 3
    assert draw_one(logits, params, output_ids=[3, 3]) == 2


@settings(max_examples=100, deadline=None)
@given(st.data(), st.sampled_from([7, 31, 32, 33, 100]))
def test_min_tokens_under_a_mask_leaves_what_a_loop_over_the_tokens_leaves(
    data: st.DataObject, vocab_size: int
) -> None:
    tokens = st.lists(st.integers(0, vocab_size + 40), max_size=2 * vocab_size)
    stops, bad, allowed = data.draw(tokens), data.draw(tokens), data.draw(tokens)
    bad, allowed = [one for one in bad if one < vocab_size], [one for one in allowed if one < vocab_size] or [0]
    params = replace(
        GREEDY,
        min_tokens=1,
        stop_token_ids=tuple(stops),
        bad_words_ids=tuple((one,) for one in bad),
        allowed_token_ids=tuple(allowed) if data.draw(st.booleans()) else None,
    )
    expected = {one for one in range(vocab_size) if params.allowed_token_ids is None or one in allowed}
    if params.allowed_token_ids is None or expected - {END, *stops}:
        expected -= {END, *stops}
    expected -= set(bad)
    logits = torch.zeros(3, vocab_size)
    edit_logits(logits, [row(GREEDY), row(params), row(GREEDY)])
    assert set(torch.nonzero(logits[1] == 0).flatten().tolist()) == expected
    assert not logits[::2].any()


def test_stop_tokens_are_read_once_and_banned_as_one_array() -> None:
    """Any number of them: as Python numbers, 150,000 took a quarter of a second in each step."""
    state = row(replace(GREEDY, min_tokens=1, stop_token_ids=(5, 1, 5, END))).state
    assert state.early_stop_ids().dtype == np.int64 and state.early_stop_ids().tolist() == [1, END, 5]
    assert state.early_stop_ids() is state.early_stop_ids()
    assert state.stop_token_ids == {5, 1, END}
    state.append(3)
    assert state.early_stop_ids().tolist() == []


@pytest.mark.parametrize("vocab_size", [31, 32, 33, 1000])
def test_a_bitmask_restricts_its_row_alone(vocab_size: int) -> None:
    bits = np.zeros((vocab_size + 31) // 32 * 32, dtype=np.uint8)
    bits[[1, vocab_size - 1]] = 1
    mask = torch.from_numpy(np.packbits(bits, bitorder="little").view(np.int32))
    free = row(GREEDY)
    masked = SamplingRow(state=free.state, bitmask=mask)
    logits = torch.zeros(3, vocab_size)
    logits[:, 0] = 9
    logits[:, vocab_size - 1] = 5
    assert draw(logits, [free, masked, free]).token_ids == [0, vocab_size - 1, 0]
    assert draw(logits[:1], [masked]).token_ids == [vocab_size - 1]


def test_a_bitmask_and_allowed_token_ids_both_hold() -> None:
    masked = SamplingRow(
        state=SamplerState(replace(GREEDY, allowed_token_ids=(1, 2)), []),
        bitmask=torch.tensor([0b1101], dtype=torch.int32),
    )
    assert sample(torch.tensor([[9.0, 8.0, 1.0, 7.0]]), [masked]).token_ids == [2]


def test_a_bitmask_of_the_wrong_width_is_refused() -> None:
    masked = SamplingRow(state=row(GREEDY).state, bitmask=torch.zeros(2, dtype=torch.int32))
    with pytest.raises(ValueError, match="bitmask must have 1 words for a vocabulary of 8, got 2"):
        sample(torch.zeros(1, 8), [masked])


def test_logits_and_rows_must_be_as_many() -> None:
    with pytest.raises(ValueError, match="2 rows for 1 requests"):
        sample(torch.zeros(2, 8), [row(GREEDY)])


def test_no_rows_give_no_tokens() -> None:
    assert sample(torch.zeros(0, 8), []).token_ids == []


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    ("broken", "message"),
    [(math.nan, "must be finite, got nan"), (math.inf, "must be finite, got inf"), (-math.inf, "no token is allowed")],
)
def test_a_broken_row_is_an_error_of_its_own(temperature: float, broken: float, message: str) -> None:
    params = SamplingParams(temperature=temperature, seed=3, logprobs=2)
    logits = random_logits(0, 3, 1000, with_ties=False)
    expected = draw(logits, [row(params)] * 3)
    logits[1, :] = -math.inf
    logits[1, 500] = broken
    output = draw(logits, [row(params)] * 3)
    assert output.errors[0] is None and output.errors[2] is None
    assert message in str(output.errors[1])
    assert (output.token_ids[0], output.token_ids[2]) == (expected.token_ids[0], expected.token_ids[2])
    assert (output.logprobs[0], output.logprobs[1]) == (expected.logprobs[0], None)


def test_options_that_forbid_every_token_are_an_error() -> None:
    params = SamplingParams(allowed_token_ids=(1,), bad_words_ids=((1,),))
    assert "no token is allowed" in str(sample(torch.zeros(1, 4), [row(params)]).errors[0])


def test_a_mask_that_leaves_few_tokens_gives_those() -> None:
    allowed = tuple(range(5000, 5400))
    rows = [row(SamplingParams(seed=seed, allowed_token_ids=allowed)) for seed in range(300)]
    tokens = sample(random_logits(0, 300, 6000, with_ties=False), rows).token_ids
    assert set(tokens) <= set(allowed)
    assert len(set(tokens)) > 50
