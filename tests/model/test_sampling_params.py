"""What sampling parameters accept, what they say otherwise, and that JSON carries them unchanged."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.sampling_params import SamplingParams, StructuredSpec

token_ids = st.integers(0, 200_000)
all_params = st.builds(
    SamplingParams,
    temperature=st.floats(0, 5),
    top_k=st.none() | st.integers(1, 10**6),
    top_p=st.floats(0, 1, exclude_min=True),
    min_p=st.floats(0, 1),
    repetition_penalty=st.floats(0.01, 10),
    frequency_penalty=st.floats(-2, 2),
    presence_penalty=st.floats(-2, 2),
    logit_bias=st.dictionaries(token_ids, st.floats(-100, 100), max_size=4),
    bad_words_ids=st.lists(st.lists(token_ids, min_size=1, max_size=3).map(tuple), max_size=3).map(tuple),
    allowed_token_ids=st.none() | st.lists(token_ids, min_size=1, max_size=4).map(tuple),
    min_tokens=st.integers(0, 5),
    max_tokens=st.none() | st.integers(5, 100),
    stop_token_ids=st.lists(token_ids, max_size=3).map(tuple),
    ignore_eos=st.booleans(),
    seed=st.integers(-(2**63), 2**64 - 1),
    logprobs=st.none() | st.integers(0, 20),
    prompt_logprobs=st.none() | st.integers(0, 20),
    structured=st.none() | st.builds(StructuredSpec, st.sampled_from(["regex", "choice"]), st.text(min_size=1)),
)


@given(all_params)
def test_json_carries_the_parameters_unchanged(params: SamplingParams) -> None:
    assert SamplingParams.from_dict(json.loads(json.dumps(params.to_dict()))) == params


def test_defaults_need_no_words() -> None:
    assert SamplingParams().to_dict() == {}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -1.0}, "temperature must be non-negative, got -1.0."),
        ({"temperature": float("nan")}, "temperature must be a finite number, got nan."),
        ({"temperature": "hot"}, "temperature must be a finite number, got hot."),
        ({"temperature": True}, "temperature must be a finite number, got True."),
        ({"top_p": 0.0}, "top_p must be in (0, 1], got 0.0."),
        ({"top_p": 1.5}, "top_p must be in (0, 1], got 1.5."),
        (
            {"top_k": 0},
            "top_k must be an integer of at least 1, got 0. Leave it out to consider every token.",
        ),
        ({"min_p": 1.1}, "min_p must be in [0, 1], got 1.1."),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be greater than zero, got 0.0."),
        ({"frequency_penalty": 2.5}, "frequency_penalty must be in [-2, 2], got 2.5."),
        ({"presence_penalty": -3.0}, "presence_penalty must be in [-2, 2], got -3.0."),
        ({"logit_bias": {"5": 101.0}}, "logit_bias[5] must be in [-100, 100], got 101.0."),
        ({"logit_bias": {"five": 1.0}}, "logit_bias must have token ids as keys, got ['five']."),
        ({"logit_bias": [1]}, "logit_bias must be an object of token id to bias, got [1]."),
        ({"bad_words_ids": [[]]}, "bad_words_ids must be sequences of at least one token id, got ()."),
        ({"bad_words_ids": [5]}, "bad_words_ids must be a list, got 5."),
        ({"allowed_token_ids": []}, "allowed_token_ids must be non-empty when given, got []."),
        ({"stop_token_ids": [-1]}, "stop_token_ids must be made of token ids (0 or more), got -1."),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens must be less than or equal to max_tokens=8, got 9."),
        ({"min_tokens": None}, "min_tokens must be an integer of at least 0, got None."),
        ({"max_tokens": 0}, "max_tokens must be an integer of at least 1, got 0."),
        ({"logprobs": -1}, "logprobs must be an integer of at least 0, got -1."),
        ({"logprobs": 1.5}, "logprobs must be an integer of at least 0, got 1.5."),
        ({"seed": 2**64}, "seed must be a 64-bit integer, got 18446744073709551616."),
        ({"ignore_eos": "yes"}, "ignore_eos must be true or false, got yes."),
        ({"structured": {"kind": "xml", "payload": "x"}}, "structured.kind must be one of json_schema, json_object,"),
        ({"structured": {"kind": "regex"}}, "structured.payload must not be empty for kind 'regex'."),
        ({"structured": "json"}, "structured must be an object with kind and payload, got 'json'."),
        ({"beams": 4}, "unknown sampling parameter 'beams'; known: allowed_token_ids,"),
    ],
)
def test_a_value_out_of_its_rule_is_refused_by_name(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        SamplingParams.from_dict(values)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(logit_bias={100: 1.0}),
        SamplingParams(stop_token_ids=(100,)),
        SamplingParams(allowed_token_ids=(5, 100)),
        SamplingParams(bad_words_ids=((5,), (6, 100))),
    ],
)
def test_token_ids_are_held_against_the_vocabulary(params: SamplingParams) -> None:
    params.check_vocabulary(101)
    with pytest.raises(ValueError, match="token ids below the vocabulary size 100, got 100"):
        params.check_vocabulary(100)


def test_parameters_need_no_torch() -> None:
    code = "import sys, model.sampling_params; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
