"""One service for all of these: answers, load, disconnects, a killed shard."""

from __future__ import annotations

import http.client
import json
import os
import signal
import urllib.error
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlparse

import pytest

from tests.e2e.conftest import CONTEXT, LONG, Service
from tests.tiny import load_oracle, oracle_greedy, prompt_of
from tests.waiting import wait_until


def router_figures(service: Service) -> dict:
    return service.get("/mesh")["routers"][0]


def test_greedy_answers_over_http_equal_transformers(service, served_model):
    oracle = load_oracle(served_model)
    for seed in range(3):
        prompt = prompt_of(seed, 10 + 20 * seed)
        assert service.complete(prompt, 64) == oracle_greedy(oracle, prompt, 64)


def test_32_streams_at_once_each_equal_their_answer_alone(service):
    prompts = [prompt_of(i, 4 + i) for i in range(32)]
    options = [{} if i % 2 else {"temperature": 0.8, "seed": i} for i in range(32)]
    alone = [service.complete(prompt, 24, **option) for prompt, option in zip(prompts, options, strict=True)]
    with ThreadPoolExecutor(32) as pool:
        together = list(pool.map(lambda i: service.complete(prompts[i], 24, **options[i]), range(32)))
    assert together == alone


def test_chat_streams_text_and_ends_with_done(service):
    address = urlparse(service.url)
    connection = http.client.HTTPConnection(address.hostname, address.port, timeout=60)
    body = {"messages": [{"role": "user", "content": "the whale"}], "max_tokens": 8, "stream": True}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    answer = connection.getresponse()
    assert answer.status == 200 and answer.getheader("content-type").startswith("text/event-stream")
    events = [line[6:] for line in answer.read().decode().splitlines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    assert json.loads(events[0])["choices"][0]["delta"]["role"] == "assistant"


def test_mesh_names_every_shard_with_pid_node_epoch_and_tokens(service):
    service.complete([5, 6, 7], 4)
    mesh = service.get("/mesh")
    assert mesh["complete"] and len(mesh["shards"]) >= 2
    for shard in mesh["shards"]:
        if shard["state"] == "serving":
            assert shard["pid"] > 0 and shard["node_id"] and shard["epoch"] >= 1 and shard["tokens"] > 0


def aborted(service: Service) -> float:
    text = service.text("/metrics")
    return float(text.split('request_success_total{finished_reason="abort"} ')[1].split()[0])


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_blocks(service, stream):
    address, before = urlparse(service.url), aborted(service)
    connection = http.client.HTTPConnection(address.hostname, address.port, timeout=60)
    body = {"prompt": prompt_of(1, 20), "max_tokens": LONG, "ignore_eos": True, "stream": stream}
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    wait_until(lambda: router_figures(service)["kv_blocks_used"][0] > 0)
    connection.sock.close()
    connection.close()
    wait_until(lambda: router_figures(service)["kv_blocks_used"] == [0, 0])
    wait_until(lambda: aborted(service) == before + 1)  # it would not be one that came to its end


def test_a_prompt_too_long_is_refused_with_both_numbers(service):
    with pytest.raises(urllib.error.HTTPError) as caught:
        service.complete([5] * 5000, 4)
    error = json.load(caught.value)["error"]
    assert caught.value.code == 400 and error["code"] == "context_length_exceeded"
    assert "5000" in error["message"] and str(CONTEXT) in error["message"]


def test_a_shard_killed_in_mid_stream_costs_no_token(service):
    prompts = [prompt_of(i, 12) for i in range(8)]
    options = [{} if i % 2 else {"temperature": 0.8, "seed": i} for i in range(8)]

    def ask(i: int) -> list[int]:
        return service.complete(prompts[i], 800, **options[i])

    with ThreadPoolExecutor(8) as pool:
        expected = list(pool.map(ask, range(8)))
        before = service.get("/mesh")
        answers = [pool.submit(ask, i) for i in range(8)]
        wait_until(lambda: router_figures(service)["running"] >= 4)
        os.kill(before["shards"][0]["pid"], signal.SIGKILL)
        assert [answer.result() for answer in answers] == expected
    wait_until(lambda: len(service.get("/mesh")["shards"]) == 2 and service.get("/mesh")["complete"])
    after = service.get("/mesh")
    assert after["epoch"] > before["epoch"]
    assert after["routers"][0]["num_recoveries"] > before["routers"][0]["num_recoveries"], "nothing was under way"
    assert before["shards"][0]["pid"] not in [shard["pid"] for shard in after["shards"]]
    assert ask(0) == expected[0]


def test_ctrl_c_leaves_no_process_behind(service):
    """Last in this file: it ends the service."""
    service.stop()
    assert service.process.returncode == 0
    assert len(service.below) > 5
    assert not [process for process in service.below if process.is_alive]
