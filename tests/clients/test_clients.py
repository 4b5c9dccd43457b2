"""Clients that people use, each in an environment of its own, against the service as it is started."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from model.tokenizer import Tokenizer
from tests.tiny import load_oracle

pytestmark = [pytest.mark.clients, pytest.mark.timeout(900)]
PROGRAMS = Path(__file__).parent / "programs"
ALONE = {"lm_eval_harness"}  # has a test of its own


@pytest.mark.parametrize("name", sorted(path.stem for path in PROGRAMS.glob("*.py") if path.stem not in ALONE))
def test_client(run_client, name):
    run_client(name)


def test_log_probabilities_by_echo_score_an_lm_eval_task_as_transformers_would(run_client, directory):
    found = json.loads(run_client("lm_eval_harness", str(directory)).splitlines()[-1])
    tokenizer, oracle = Tokenizer.from_directory(directory), load_oracle(directory)
    for sample in found["samples"][:3] + found["samples"][-3:]:
        for choice, logprob in zip(sample["choices"], sample["logprobs"], strict=True):
            num_context = len(tokenizer.encode(sample["question"], add_special_tokens=False))
            ids = tokenizer.encode(sample["question"] + choice, add_special_tokens=False)
            with torch.no_grad():
                scores = oracle(torch.tensor([ids])).logits[0].log_softmax(-1)
            expected = sum(float(scores[i - 1, ids[i]]) for i in range(num_context, len(ids)))
            assert logprob == pytest.approx(expected, abs=1e-3)
    best = [max(range(len(s["logprobs"])), key=s["logprobs"].__getitem__) for s in found["samples"]]
    right = [answer == sample["answer"] for answer, sample in zip(best, found["samples"], strict=True)]
    assert found["accuracy"] == pytest.approx(sum(right) / len(right))
