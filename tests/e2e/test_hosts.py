"""Shards on hosts of their own, each with an address, in network namespaces."""

from __future__ import annotations

import os

import httpx

from tests.e2e import hosts as network
from tests.tiny import load_oracle, oracle_greedy
from tests.waiting import wait_until


def test_three_shards_on_three_hosts_answer_as_transformers_does(served_model, make_hosts):
    assert os.environ["RAY_AUTH_TOKEN"]
    with make_hosts(4) as everyone, network.ray_on(everyone):
        url = network.deploy(
            everyone[0],
            **{
                "model.path": str(served_model),
                "mesh.shards": 3,
                "mesh.spread": "strict",
                "mesh.shard_cpus": 0,
                "mesh.shard_resources": {"expert": 1},
            },
        )
        prompt = list(range(20, 50))
        body = {"prompt": prompt, "max_tokens": 32, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
        answer = httpx.post(f"{url}/v1/completions", json=body, timeout=120).json()
        assert answer["choices"][0]["token_ids"] == oracle_greedy(load_oracle(served_model), prompt, 32)
        wait_until(lambda: httpx.get(f"{url}/mesh").json()["settled"], 90)
        mesh = httpx.get(f"{url}/mesh").json()
        assert sorted(s["host"] for s in mesh["shards"]) == [host.address for host in everyone[1:]]
        assert all(shard["tokens"] > 0 and shard["epoch"] >= 1 for shard in mesh["shards"])
