"""Each answer under load is the answer alone: 200 of them, greedy and seeded, with every kind of sampling."""

from __future__ import annotations

import random
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from deploy.served_model import ServedModel
from deploy.settings import Settings
from tests.deploy.fakes import running_api
from tests.deploy.real_routers import RealRouters
from tests.e2e.conftest import start_service
from tests.tiny import write_tiny_model

KINDS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 1.0},
    {"temperature": 0.8, "top_k": 20, "top_p": 0.9},
    {"temperature": 1.2, "min_p": 0.02, "repetition_penalty": 1.1},
    {"temperature": 0, "presence_penalty": 0.5, "frequency_penalty": 0.3},
    {"temperature": 1.0, "logprobs": 3},
]


def bodies(count: int) -> list[dict[str, Any]]:
    rng = random.Random(5)
    shared = [rng.randrange(3, 320) for _ in range(64)]  # so that some meet in the prefix cache
    return [
        {
            "prompt": (shared if i % 3 == 0 else []) + [rng.randrange(3, 320) for _ in range(rng.randint(1, 150))],
            "max_tokens": rng.randint(8, 48),
            "ignore_eos": True,
            "return_token_ids": True,
            "seed": i,
            **KINDS[i % len(KINDS)],
        }
        for i in range(count)
    ]


def compare(url: str, count: int, at_once: int) -> None:
    def ask(body: dict[str, Any]) -> list[int]:
        answer = httpx.post(url + "/v1/completions", json=body, timeout=300)
        assert answer.status_code == 200, answer.text
        return list(answer.json()["choices"][0]["token_ids"])

    asked = bodies(count)
    alone = [ask(body) for body in asked]
    with ThreadPoolExecutor(at_once) as pool:
        together = list(pool.map(ask, reversed(asked)))[::-1]
    different = [i for i in range(count) if alone[i] != together[i]]
    print(f"\n{count - len(different)} of {count} answers under load equal theirs alone")
    assert not different


def test_forty_answers_under_load_equal_theirs_alone_also_when_blocks_run_out(tmp_path):
    directory = write_tiny_model(tmp_path / "tiny")
    served = ServedModel.from_directory(directory, names=("tiny",))
    router = RealRouters(directory, "a", num_kv_blocks=60)
    with running_api(served, Settings.model_validate({"mesh": {"token": "t"}}), router) as api:
        engine = router.routers["a"].engine
        compare(api.url, 40, 40)
        assert engine.scheduler.num_preemptions > 0


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_two_hundred_answers_under_load_equal_theirs_alone(tmp_path):
    directory = write_tiny_model(tmp_path / "tiny")
    with tempfile.TemporaryDirectory() as folder:
        service = start_service([str(directory), "--shards", "2"], Path(folder, "log"))
        try:
            compare(service.url, 200, 64)
        finally:
            service.stop()
