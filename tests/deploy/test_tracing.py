"""Traces of requests over real routers, as an OTLP collector receives them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from deploy.served_model import ServedModel
from deploy.settings import Settings, load
from tests.deploy.fakes import FakeRouter, RunningApi, running_api
from tests.deploy.otlp import Receiver, attributes, receiver
from tests.deploy.real_routers import RealRouters
from tests.tiny import write_tiny_model

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


@pytest.fixture(scope="module")
def collector() -> Iterator[Receiver]:
    with pytest.MonkeyPatch.context() as patch, receiver() as received:
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")  # a standard setting: send soon
        yield received


@pytest.fixture(scope="module")
def api(collector: Receiver, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningApi]:
    directory = write_tiny_model(tmp_path_factory.mktemp("traced") / "tiny", max_position_embeddings=2048)
    served = ServedModel.from_directory(directory, names=("tiny",))
    settings = Settings.model_validate({"mesh": {"token": "t"}, "server": {"otlp_traces_endpoint": collector.url}})
    with running_api(served, settings, RealRouters(directory)) as running:
        yield running


def seconds_in(api: RunningApi, part: str) -> float:
    """Spent by all requests so far, as routers told it."""
    return api.pool.metrics.registry.get_sample_value(f"expertmesh_request_{part}_time_seconds_sum") or 0.0


def test_a_request_is_one_span_with_its_queue_prefill_and_decode_in_the_callers_trace(
    api: RunningApi, collector: Receiver
) -> None:
    body = {"prompt": "SECRETPROMPT", "max_tokens": 9, "seed": 4, "ignore_eos": True, "n": 2, "stream": True}
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "x-request-id": "mine"}
    before = {name: seconds_in(api, name) for name in ("queue", "prefill")}
    assert httpx.post(api.url + "/v1/completions", json=body, headers=headers, timeout=60).status_code == 200
    spans = collector.wait_for(lambda spans: any(s.name == "text_completion tiny" for s in spans))
    (root,) = [span for span in spans if span.name == "text_completion tiny"]
    assert (root.trace_id.hex(), root.parent_span_id.hex()) == (TRACE, PARENT)
    about = attributes(root)
    assert about["gen_ai.operation.name"] == "text_completion" and about["gen_ai.provider.name"] == "expertmesh"
    assert about["gen_ai.request.model"] == "tiny" and about["gen_ai.request.max_tokens"] == 9
    assert about["gen_ai.request.seed"] == 4 and about["expertmesh.request_id"] == "mine"
    assert about["gen_ai.usage.output_tokens"] == 18 and about["gen_ai.response.finish_reasons"] == ["length"] * 2
    assert about["http.response.status_code"] == 200
    for idx in (0, 1):
        own = [s for s in spans if s.parent_span_id == root.span_id and attributes(s)["expertmesh.sequence"] == idx]
        assert sorted(span.name for span in own) == ["decode", "prefill", "queue"]
        queue, prefill, decode = (next(s for s in own if s.name == name) for name in ("queue", "prefill", "decode"))
        assert queue.start_time_unix_nano < queue.end_time_unix_nano == prefill.start_time_unix_nano
        assert root.start_time_unix_nano < prefill.end_time_unix_nano
        assert prefill.end_time_unix_nano == decode.start_time_unix_nano < decode.end_time_unix_nano
        assert decode.end_time_unix_nano <= root.end_time_unix_nano
    for name, seconds in before.items():
        lasted = [s.end_time_unix_nano - s.start_time_unix_nano for s in spans if s.name == name]
        assert sum(lasted) / 1e9 == pytest.approx(seconds_in(api, name) - seconds, abs=1e-6), "as the router says"
    assert b"SECRETPROMPT" not in collector.payload


def test_a_lost_router_is_an_event_and_the_replay_queues_and_prefills_again(
    api: RunningApi, collector: Receiver
) -> None:
    body = {"prompt": "x", "max_tokens": 1500, "ignore_eos": True, "stream": True}
    headers = {"traceparent": f"00-{'5' * 32}-{PARENT}-01"}
    with httpx.stream("POST", api.url + "/v1/completions", json=body, headers=headers, timeout=60) as answer:
        events = answer.iter_lines()
        next(events)
        busy = next(name for name, one in api.router.routers.items() if one.engine.scheduler.running)
        api.router.stop(busy)
        assert [line for line in events if line][-1] == "data: [DONE]"
    ours = [s for s in collector.wait_for(lambda ss: any(s.events for s in ss)) if s.trace_id.hex() == "5" * 32]
    (root,) = [span for span in ours if span.parent_span_id.hex() == PARENT]
    assert [event.name for event in root.events] == ["router lost"]
    assert [span.name for span in ours].count("queue") == 2 == [span.name for span in ours].count("prefill")
    assert [span.name for span in ours].count("decode") == 1 and attributes(root)["gen_ai.usage.output_tokens"] == 1500


def test_what_is_refused_or_fails_is_a_span_with_its_error(collector: Receiver, served: ServedModel) -> None:
    settings = Settings.model_validate({"server": {"otlp_traces_endpoint": collector.url}})
    with running_api(served, settings, FakeRouter(max_running=0)) as api:
        answer = httpx.post(api.url + "/v1/chat/completions", json={"messages": [{"role": "user", "content": "x"}]})
        assert answer.status_code == 503
        httpx.get(api.url + "/v1/models")
        (span,) = [s for s in collector.wait_for(lambda ss: any(s.name == "chat tiny" for s in ss)) if "chat" in s.name]
    assert attributes(span)["error.type"] == "queue_full" and span.status.code == 2


def test_an_endpoint_must_be_a_url(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"server.otlp_traces_endpoint = 'collector:4318' \(flag\)"):
        load(flags={"server.otlp_traces_endpoint": "collector:4318"})
    assert json.loads(Settings().model_dump_json())["server"]["otlp_traces_endpoint"] is None, "off by default"
