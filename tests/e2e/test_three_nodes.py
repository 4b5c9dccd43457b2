"""A Ray cluster of three nodes: every shard on a node of its own, and a node that goes away with its shard."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import httpx
import pytest
import ray
from ray import serve
from ray.cluster_utils import Cluster

from deploy.app import bind
from deploy.settings import load
from tests.ports import free_port
from tests.tiny import load_oracle, oracle_greedy
from tests.waiting import wait_until


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """The head has no room for shards; three further nodes have a slot for one each."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 8, "include_dashboard": False})
    with ExitStack() as afterwards:
        afterwards.callback(cluster.shutdown)
        for _ in range(3):
            cluster.add_node(num_cpus=0, resources={"expert": 2})
        afterwards.callback(ray.shutdown)
        ray.init(address=cluster.address, log_to_driver=False)
        afterwards.callback(serve.shutdown)
        yield cluster


@pytest.fixture(scope="module")
def url(cluster: Cluster, served_model) -> str:
    port = free_port()
    settings = load(
        flags={
            "model.path": str(served_model),
            "mesh.shards": 3,
            "mesh.spread": "strict",
            "mesh.shard_cpus": 0.0,
            "mesh.shard_resources": {"expert": 1},
            "server.port": port,
            "server.ingress_cpus": 1,  # only the head has CPUs: the nodes that go away hold shards alone
        }
    ).settings
    serve.start(proxy_location="HeadOnly", http_options={"port": port})
    serve.run(bind(settings), name="expertmesh", route_prefix="/")
    address = f"http://127.0.0.1:{port}"
    wait_until(lambda: httpx.get(f"{address}/ready").status_code == 200)
    wait_until(lambda: httpx.get(f"{address}/mesh").json()["complete"])
    return address


def complete(url: str, prompt: list[int], count: int) -> list[int]:
    body = {"prompt": prompt, "max_tokens": count, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=120)
    assert answer.status_code == 200, answer.text
    return list(answer.json()["choices"][0]["token_ids"])


def serving_nodes(mesh: dict) -> set[str]:
    return {shard["node_id"] for shard in mesh["shards"] if shard["state"] == "serving"}


def test_every_shard_has_a_node_of_its_own_and_answers_are_right(url, served_model):
    mesh = httpx.get(f"{url}/mesh").json()
    assert len(mesh["shards"]) == 3
    assert len({shard["node_id"] for shard in mesh["shards"]}) == 3
    prompt = list(range(10, 40))
    assert complete(url, prompt, 32) == oracle_greedy(load_oracle(served_model), prompt, 32)
    assert all(shard["tokens"] > 0 for shard in httpx.get(f"{url}/mesh").json()["shards"])


def test_a_lost_node_is_survived_and_a_new_one_is_used(url, cluster, served_model):
    prompt = list(range(50, 70))
    expected = oracle_greedy(load_oracle(served_model), prompt, 32)
    lost = cluster.list_all_nodes()[-1]
    cluster.remove_node(lost, allow_graceful=False)
    assert complete(url, prompt, 32) == expected
    wait_until(lambda: lost.node_id not in serving_nodes(httpx.get(f"{url}/mesh").json()))  # it dies in its time
    assert complete(url, prompt, 32) == expected
    assert httpx.get(f"{url}/mesh").json()["complete"]
    added = cluster.add_node(num_cpus=0, resources={"expert": 2})
    wait_until(lambda: added.node_id in serving_nodes(httpx.get(f"{url}/mesh").json()), 120)
    assert complete(url, prompt, 32) == expected
