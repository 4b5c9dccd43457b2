"""What is logged, in which form, and what never is."""

from __future__ import annotations

import io
import json
import logging
import threading
from pathlib import Path

import httpx
import pytest

from actors.logs import REQUEST_ID, start_logging
from deploy.log_tail import WithoutRay, followed
from deploy.served_model import ServedModel
from deploy.settings import Settings
from tests.deploy.fakes import FakeRouter, running_api
from tests.waiting import wait_until

SECRET = "zebra"


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """Where JSON is logged; the root logger is as before afterwards."""
    text, root = io.StringIO(), logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    start_logging("ingress", "json", text)
    monkeypatch.setattr(root, "level", logging.DEBUG)  # everything of everybody
    return text


def parsed(text: io.StringIO) -> list[dict[str, object]]:
    return [json.loads(line) for line in text.getvalue().splitlines()]


def test_a_line_is_one_object_with_the_requests_id_and_an_error_keeps_its_message_to_itself(lines: io.StringIO) -> None:
    token = REQUEST_ID.set("abc-1")
    try:
        int(SECRET)
    except ValueError:
        logging.getLogger("expertmesh.test").exception("it failed\nbadly")
    REQUEST_ID.reset(token)
    (line,) = parsed(lines)
    assert line["level"] == "error" and line["part"] == "ingress" and line["message"] == "it failed\nbadly"
    assert line["request_id"] == "abc-1" and str(line["time"]).endswith("Z")
    assert "test_logs.py" in str(line["error"]) and str(line["error"]).endswith("ValueError")
    assert SECRET not in lines.getvalue()


def test_text_says_the_same_for_people(lines: io.StringIO) -> None:
    start_logging("shard-1", "text", lines)
    logging.getLogger("expertmesh.test").warning("epoch %d", 4)
    assert lines.getvalue().rstrip().endswith("WARNING shard-1 expertmesh.test: epoch 4")


def test_no_prompt_and_no_answer_is_ever_logged(served: ServedModel, lines: io.StringIO) -> None:
    answer = [3 + ord(c) - ord("!") for c in SECRET]
    good = {"messages": [{"role": "user", "content": SECRET}], "max_tokens": 5}
    with running_api(served, router=FakeRouter(script=lambda _: answer)) as api:
        url = api.url + "/v1/chat/completions"
        assert SECRET in httpx.post(url, json=good, headers={"x-request-id": "one"}).text
        assert httpx.post(url, json={**good, "stream": True}).status_code == 200
        assert httpx.post(url, json={**good, "temperature": SECRET}).status_code == 400
        assert httpx.post(url, content=b'{"messages": "' + SECRET.encode()).status_code == 400
        assert httpx.post(api.url + "/classify", json={"input": SECRET}).status_code == 400
    with running_api(served, router=FakeRouter(script=lambda _: [2**70])) as api:  # nothing a tokenizer can take
        crash = httpx.post(api.url + "/v1/completions", json={"prompt": SECRET}, headers={"x-request-id": "two"})
        assert crash.status_code == 500 and "two" in crash.json()["error"]["message"]
    hasty = Settings.model_validate({"limits": {"request_timeout_s": 1.0}})
    with running_api(served, hasty, FakeRouter(dies_after=3)) as api:
        lost = httpx.post(api.url + "/v1/completions", json={"prompt": SECRET, "max_tokens": 9}, timeout=30)
        assert lost.status_code in (503, 504)
    assert SECRET not in lines.getvalue()
    found = parsed(lines)
    (access,) = [line for line in found if line.get("request_id") == "one" and line["logger"] == "expertmesh.access"]
    assert (access["method"], access["path"], access["status"]) == ("POST", "/v1/chat/completions", 200)
    assert access["output_tokens"] == 5 and access["finish_reasons"] == ["stop"]
    assert any(line.get("request_id") == "two" and "error" in line for line in found)
    assert any("lost router" in str(line["message"]) for line in found)


def test_routers_know_a_request_by_its_id_and_more(served: ServedModel) -> None:
    with running_api(served) as api:
        body = {"prompt": "x", "max_tokens": 1, "n": 2}
        httpx.post(api.url + "/v1/completions", json=body, headers={"x-request-id": "mine"})
        ids = [request["request_id"] for request in api.router.requests]
    assert len(set(ids)) == 2 and all(one.startswith("mine-") and len(one) > 32 for one in ids)


def test_the_lines_of_all_parts_come_out_on_one_stream(tmp_path: Path, lines: io.StringIO) -> None:
    one, two = tmp_path / "worker-1.err", tmp_path / "worker-2.err"
    one.write_text('{"time": 1}\nnoise of a library\n{"time": 2')
    with followed(tmp_path, lines):
        two.write_text('{"time": 3}\n')
        wait_until(lambda: all(one in lines.getvalue() for one in ('{"time": 1}', '{"time": 3}')))
        with one.open("a") as file:
            file.write(', "x": 1}\n')
    assert sorted(lines.getvalue().splitlines()) == ['{"time": 1}', '{"time": 2, "x": 1}', '{"time": 3}']


def test_what_rays_threads_print_goes_to_the_log_and_not_to_the_screen(lines: io.StringIO) -> None:
    screen = io.StringIO()
    ours = WithoutRay(screen)
    print("stopping", file=ours)
    ray = threading.Thread(target=print, args=("(raylet) A worker died",), kwargs={"file": ours}, name="ray_listen")
    ray.start()
    ray.join()
    assert screen.getvalue() == "stopping\n"
    assert [line["message"] for line in parsed(lines)] == ["Ray: (raylet) A worker died"]
