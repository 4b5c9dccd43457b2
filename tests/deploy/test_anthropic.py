"""Anthropic's Messages API, checked event by event: their client is not a dependency."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from deploy.served_model import ServedModel
from deploy.settings import Settings
from tests.deploy.fakes import FakeRouter, RunningApi, running_api
from tests.deploy.test_completions import post, post_and_leave, prompt_of, scripts, wait_for_aborts

MESSAGES = "/v1/messages"
HELLO = [{"role": "user", "content": "hello"}]
ADD = {"name": "add", "input_schema": {"type": "object", "properties": {"a": {"type": "integer"}}}}
CALL = 'I add.\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'


@pytest.fixture(autouse=True)
def _fresh(api: RunningApi) -> None:
    api.router.script = lambda _: None
    api.router.token_s = 0.0


def ask(api: RunningApi, **body: Any) -> httpx.Response:
    return post(api, {"max_tokens": 150, "messages": HELLO, **body}, MESSAGES)


def events(api: RunningApi, **body: Any) -> list[dict[str, Any]]:
    found = []
    for block in ask(api, stream=True, **body).text.strip().split("\n\n"):
        name, data = block.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    return found


def test_a_message_has_anthropics_shape(api: RunningApi, served: ServedModel) -> None:
    scripts(api, served, "hi there")
    answer = ask(api, system=[{"type": "text", "text": "be brief"}], model="tiny").json()
    assert answer["id"].startswith("msg_") and (answer["type"], answer["role"]) == ("message", "assistant")
    assert answer["content"] == [{"type": "text", "text": "hi there"}]
    assert (answer["stop_reason"], answer["stop_sequence"]) == ("end_turn", None)
    total = len(api.router.requests[-1]["prompt_ids"])
    assert answer["usage"]["input_tokens"] + answer["usage"]["cache_read_input_tokens"] == total
    assert answer["usage"]["output_tokens"] == 9
    assert prompt_of(api, served).startswith("<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nhello")
    counted = post(api, {"messages": HELLO, "system": "be brief"}, MESSAGES + "/count_tokens").json()
    assert counted == {"input_tokens": total}


def test_tokens_are_counted_beyond_the_context_and_free_of_limits(served: ServedModel) -> None:
    limits = {"requests_per_minute_per_key": 1}
    settings = Settings.model_validate({"server": {"api_keys": ["k"]}, "limits": limits})
    long = [{"role": "user", "content": "many words " * served.max_model_len}]
    with running_api(served, settings) as keyed:
        for _ in range(3):
            url = keyed.url + MESSAGES + "/count_tokens"
            counted = httpx.post(url, json={"messages": long}, headers={"x-api-key": "k"}, timeout=30)
            assert counted.status_code == 200 and counted.json()["input_tokens"] > served.max_model_len


def test_the_reasons_to_stop_are_told(api: RunningApi, served: ServedModel) -> None:
    scripts(api, served, "one two END three")
    cut = ask(api, stop_sequences=["END"]).json()
    assert (cut["stop_reason"], cut["stop_sequence"], cut["content"][0]["text"]) == ("stop_sequence", "END", "one two ")
    assert ask(api, max_tokens=3).json()["stop_reason"] == "max_tokens"


def test_a_stream_is_blocks_of_text_and_of_tool_use(api: RunningApi, served: ServedModel) -> None:
    scripts(api, served, CALL)
    found = events(api, tools=[ADD])
    kinds = [one["type"] for one in found if one["type"] != "content_block_delta"]
    block = ["content_block_start", "content_block_stop"]
    assert kinds == ["message_start", *block, *block, "message_delta", "message_stop"]
    assert found[0]["message"]["content"] == [] and found[0]["message"]["usage"]["input_tokens"] > 0
    starts = [one for one in found if one["type"] == "content_block_start"]
    assert [one["index"] for one in starts] == [0, 1]
    assert starts[1]["content_block"]["name"] == "add" and starts[1]["content_block"]["input"] == {}
    deltas = [one["delta"] for one in found if one["type"] == "content_block_delta"]
    assert "".join(one.get("text", "") for one in deltas) == "I add."
    assert json.loads("".join(one.get("partial_json", "") for one in deltas)) == {"a": 1}
    assert found[-2]["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}
    assert found[-2]["usage"]["output_tokens"] > 20


def test_tools_are_used_demanded_and_answered(api: RunningApi, served: ServedModel) -> None:
    scripts(api, served, CALL)
    answer = ask(api, tools=[ADD]).json()
    assert [block["type"] for block in answer["content"]] == ["text", "tool_use"]
    assert answer["content"][1]["input"] == {"a": 1} and answer["stop_reason"] == "tool_use"
    scripts(api, served, '{"a": 2}')
    named = ask(api, tools=[ADD], tool_choice={"type": "tool", "name": "add"}).json()
    assert named["content"][0]["input"] == {"a": 2} and named["stop_reason"] == "tool_use"
    call = answer["content"][1]
    result = {"type": "tool_result", "tool_use_id": call["id"], "content": [{"type": "text", "text": "two"}]}
    turns = [
        *HELLO,
        {"role": "assistant", "content": answer["content"]},
        {"role": "user", "content": [{**result, "is_error": True}, {"type": "text", "text": "so?"}]},
    ]
    assert ask(api, messages=turns, tools=[ADD]).status_code == 200
    prompt = prompt_of(api, served)
    assert '{"name": "add", "arguments": {"a": 1}}' in prompt
    assert "<|im_start|>tool\nError: two<|im_end|>\n<|im_start|>user\nso?" in prompt


def test_earlier_thoughts_are_left_out_and_a_system_message_may_come_later(
    api: RunningApi, served: ServedModel
) -> None:
    thoughts = [{"type": "thinking", "thinking": "hm", "signature": "s"}, {"type": "text", "text": "Yes."}]
    turns = [*HELLO, {"role": "assistant", "content": thoughts}, {"role": "system", "content": "Be brief."}, *HELLO]
    assert ask(api, messages=turns).status_code == 200
    prompt = prompt_of(api, served)
    assert "<|im_start|>assistant\nYes.<|im_end|>\n<|im_start|>system\nBe brief.<|im_end|>" in prompt
    assert ask(api).headers["request-id"]


def test_an_assistants_last_message_is_continued(api: RunningApi, served: ServedModel) -> None:
    ask(api, messages=[*HELLO, {"role": "assistant", "content": "Once"}])
    assert prompt_of(api, served).endswith("<|im_start|>assistant\nOnce")


def test_json_output_is_constrained(api: RunningApi) -> None:
    ask(api, output_config={"format": {"type": "json_schema", "schema": {"type": "object"}}})
    assert api.router.requests[-1]["sampling"]["structured"]["kind"] == "json_schema"


@pytest.mark.parametrize(
    "body",
    [
        {"max_tokens": None},
        {"messages": [{"role": "tool", "content": "x"}]},
        {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
        {"tools": [{"type": "web_search_20250305", "name": "web_search"}]},
        {"tool_choice": {"type": "any"}},
        {"tool_choice": {"type": []}},
        {"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a", "content": 5}]}]},
        {"thinking": {"type": "enabled", "budget_tokens": 1024}},
        {"temperature": 2},
        {"max_tokns": 1},
    ],
)
def test_errors_have_anthropics_shape(api: RunningApi, body: dict[str, Any]) -> None:
    response = ask(api, **body)
    assert response.status_code == 400
    assert response.json()["type"] == "error" and response.json()["error"]["type"] == "invalid_request_error"


def test_other_errors_too_also_in_streams(api: RunningApi, served: ServedModel) -> None:
    assert ask(api, model="none").json()["error"]["type"] == "not_found_error"
    settings = Settings.model_validate({"server": {"api_keys": ["k"]}, "limits": {"request_timeout_s": 0.6}})
    with running_api(served, settings, FakeRouter(token_s=0.02, dies_after=5)) as keyed:
        assert ask(keyed).json()["error"]["type"] == "authentication_error"
        body = {"max_tokens": 99, "messages": HELLO, "stream": True}
        late = httpx.post(keyed.url + MESSAGES, json=body, headers={"x-api-key": "k"}, timeout=60)
        assert late.text.strip().split("\n\n")[-1].startswith('event: error\ndata: {"type":"error"')


def test_a_client_that_leaves_aborts_its_message(api: RunningApi) -> None:
    wait_for_aborts(api, post_and_leave(api, {"max_tokens": 100, "messages": HELLO}, MESSAGES))
