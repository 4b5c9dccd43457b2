from __future__ import annotations

import asyncio
import http.client
import itertools
import json
from collections.abc import Iterable
from typing import Any
from urllib.parse import urlparse

import httpx
import openai
import pytest

from deploy.served_model import ServedModel
from tests.deploy.fakes import FakeRouter, RunningApi, num_in_flight, running_api, token_at
from tests.waiting import wait_until


@pytest.fixture
def client(api: RunningApi) -> openai.OpenAI:
    return openai.OpenAI(base_url=api.url + "/v1", api_key="any", max_retries=0)


def post(api: RunningApi, body: Any, path: str = "/v1/completions") -> httpx.Response:
    return httpx.post(api.url + path, json=body, timeout=60)


def events(api: RunningApi, body: dict[str, Any], path: str = "/v1/completions") -> list[dict[str, Any]]:
    response = post(api, {**body, "stream": True}, path)
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line[6:] for line in response.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def post_and_leave(api: RunningApi, body: dict[str, Any], path: str = "/v1/completions") -> list[str]:
    """Hang up when a router has the request, which it does not answer; returns the ids that the router knows it by."""
    api.router.token_s = 600.0
    num_before = len(api.router.requests)
    address = urlparse(api.url)
    connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=60)
    connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
    wait_until(lambda: len(api.router.requests) == num_before + body.get("n", 1))
    connection.close()
    return [one["request_id"] for one in api.router.requests[num_before:]]


def wait_for_aborts(api: RunningApi, request_ids: Iterable[str]) -> None:
    wait_until(lambda: set(request_ids) <= set(api.router.aborted))


def expected_ids(seed: int, start: int, num: int) -> list[int]:
    return [token_at(seed, start + i) for i in range(num)]


def scripts(api: RunningApi, served: ServedModel, text: str, *, ends: bool = True) -> None:
    """The next requests' output is this text, in single-character tokens."""
    ids = [token for char in text for token in served.tokenizer.encode(char)]
    api.router.script = lambda _: [*ids, 2] if ends else ids


def prompt_of(api: RunningApi, served: ServedModel) -> str:
    """The text of the last request's prompt."""
    return served.tokenizer.decode(api.router.requests[-1]["prompt_ids"])


@pytest.fixture(autouse=True)
def _fresh(api: RunningApi) -> None:
    api.router.script = lambda _: None
    api.router.token_s = 0.0


def test_a_completion_has_openai_shape(client: openai.OpenAI, served: ServedModel) -> None:
    prompt = "the expert"
    start = len(served.tokenizer.encode(prompt))
    answer = client.completions.create(model="tiny", prompt=prompt, max_tokens=8, seed=3)
    assert answer.id.startswith("cmpl-") and answer.object == "text_completion" and answer.system_fingerprint
    assert answer.choices[0].text == served.tokenizer.decode(expected_ids(3, start, 8))
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (start, 8)


def test_a_stream_joins_to_the_same_text(client: openai.OpenAI) -> None:
    whole = client.completions.create(model="tiny", prompt="the shard", max_tokens=30, seed=3)
    chunks = list(
        client.completions.create(
            model="tiny", prompt="the shard", max_tokens=30, seed=3, stream=True, stream_options={"include_usage": True}
        )
    )
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == whole.choices[0].text
    assert chunks[-1].usage == whole.usage
    assert not chunks[-1].choices


def test_every_shape_of_prompt_and_n_gives_choices_prompt_by_prompt(api: RunningApi, served: ServedModel) -> None:
    ids = served.tokenizer.encode("the expert")
    for prompt in (["the expert", "the shard"], [ids, ids[:2]]):
        answer = post(api, {"prompt": prompt, "n": 2, "seed": 7, "max_tokens": 3, "return_token_ids": True}).json()
        lens = [len(served.tokenizer.encode(one)) if isinstance(one, str) else len(one) for one in prompt]
        assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
        for choice, (start, seed) in zip(answer["choices"], itertools.product(lens, (7, 8)), strict=True):
            assert choice["token_ids"] == expected_ids(seed, start, 3)
        assert answer["usage"]["prompt_tokens"] == sum(lens)
        assert answer["usage"]["completion_tokens"] == 12
        assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 2}
    single = post(api, {"prompt": ids, "max_tokens": 1, "return_token_ids": True}).json()
    assert single["choices"][0]["prompt_token_ids"] == ids


def test_streamed_choices_join_to_the_whole_ones(api: RunningApi) -> None:
    body = {"prompt": ["a", "bb"], "n": 2, "seed": 1, "max_tokens": 9, "logprobs": 2, "return_token_ids": True}
    whole = post(api, body).json()["choices"]
    joined = [{"text": "", "token_ids": [], "tokens": [], "text_offset": []} for _ in whole]
    for event in events(api, body):
        for choice in event["choices"]:
            into = joined[choice["index"]]
            into["text"] += choice["text"]
            into["token_ids"] += choice["token_ids"]
            if choice["logprobs"]:
                into["tokens"] += choice["logprobs"]["tokens"]
                into["text_offset"] += choice["logprobs"]["text_offset"]
            if choice["prompt_token_ids"]:
                into["prompt_token_ids"] = choice["prompt_token_ids"]
    for choice, into in zip(whole, joined, strict=True):
        for name in ("text", "token_ids", "prompt_token_ids"):
            assert choice[name] == into[name]
        assert choice["logprobs"]["tokens"] == into["tokens"]
        assert choice["logprobs"]["text_offset"] == into["text_offset"]


def test_no_part_of_a_stop_string_is_streamed_and_the_router_is_told_to_stop(
    api: RunningApi, served: ServedModel
) -> None:
    scripts(api, served, "one ENE two END three", ends=False)
    num_before = len(api.router.requests)
    chunks = events(api, {"prompt": "x", "max_tokens": 100, "stop": ["END", "nope"]})
    texts = [choice["text"] for chunk in chunks for choice in chunk["choices"]]
    assert "".join(texts) == "one ENE two "
    last = chunks[-1]["choices"][0]
    assert (last["finish_reason"], last["stop_reason"]) == ("stop", "END")
    kept = post(api, {"prompt": "x", "max_tokens": 100, "stop": "END", "include_stop_str_in_output": True}).json()
    assert kept["choices"][0]["text"] == "one ENE two END"
    late = post(api, {"prompt": "x", "max_tokens": 100, "stop": "E", "min_tokens": 7}).json()
    assert late["choices"][0]["text"] == "one ENE two "
    across = post(api, {"prompt": "x", "max_tokens": 100, "stop": "NE two", "min_tokens": 7}).json()
    assert across["choices"][0]["text"] == "one E"
    assert len(api.router.requests) == num_before + 4
    wait_for_aborts(api, (one["request_id"] for one in api.router.requests[num_before:]))


def test_the_tokens_of_a_stop_string_are_held_back_with_their_text(api: RunningApi, served: ServedModel) -> None:
    scripts(api, served, "a EN b END c", ends=False)
    body = {"prompt": "x", "max_tokens": 100, "stop": "END", "logprobs": 0, "return_token_ids": True}
    chunks = [chunk["choices"][0] for chunk in events(api, body)]
    shown = ""
    for chunk in chunks[:-1]:
        shown += chunk["text"]
        assert all(shown.startswith(token, at) for token, at in _placed(chunk))
    assert shown + chunks[-1]["text"] == "a EN b "
    whole = post(api, body).json()["choices"][0]
    assert [token for chunk in chunks for token in chunk["token_ids"]] == whole["token_ids"]
    assert served.tokenizer.decode(whole["token_ids"]) == "a EN b END"  # all that was drawn, as vLLM has it


def _placed(chunk: dict[str, Any]) -> list[tuple[str, int]]:
    logprobs = chunk["logprobs"] or {"tokens": [], "text_offset": []}
    return list(zip(logprobs["tokens"], logprobs["text_offset"], strict=True))


def test_experts_of_tokens_that_are_held_back_are_streamed_all_the_same(served: ServedModel) -> None:
    class Telling(FakeRouter):
        def _chunk(self, writer: asyncio.StreamWriter, request_id: str, token_ids: list[int], **extra: Any) -> None:
            super()._chunk(writer, request_id, token_ids, **extra, routed_experts=[[[token]] for token in token_ids])

    ids = [token for char in "abcxyz" for token in served.tokenizer.encode(char)]
    options = {"max_tokens": 50, "stop": ["abcd"], "return_routed_experts": True}
    asked: dict[str, dict[str, Any]] = {
        "/v1/completions": {"prompt": "x"},
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}]},
    }
    with running_api(served, router=Telling(script=lambda _: ids)) as api:
        for path, body in asked.items():
            chunks = events(api, {**body, **options}, path)
            told = [expert for chunk in chunks for expert in chunk["choices"][0].get("routed_experts") or ()]
            assert told == [[[token]] for token in ids], path


def test_held_back_text_comes_out_when_no_stop_string_came_of_it(api: RunningApi, served: ServedModel) -> None:
    scripts(api, served, "abc EN")
    assert post(api, {"prompt": "x", "max_tokens": 100, "stop": "END"}).json()["choices"][0]["text"] == "abc EN"
    chunks = events(api, {"prompt": "x", "max_tokens": 100, "stop": "END"})
    assert "".join(choice["text"] for chunk in chunks for choice in chunk["choices"]) == "abc EN"


def test_stop_tokens_end_the_text_without_being_in_it(api: RunningApi, served: ServedModel) -> None:
    scripts(api, served, "abcXdef")
    stop_id = served.tokenizer.encode("X")[0]
    choice = post(api, {"prompt": "x", "max_tokens": 99, "stop_token_ids": [stop_id], "return_token_ids": True}).json()[
        "choices"
    ][0]
    assert (choice["text"], choice["stop_reason"], choice["token_ids"][-1]) == ("abc", stop_id, stop_id)
    ended = post(api, {"prompt": "x", "max_tokens": 99}).json()["choices"][0]
    assert (ended["text"], ended["finish_reason"], ended["stop_reason"]) == ("abcXdef", "stop", None)


def test_characters_cut_between_tokens_come_whole(api: RunningApi, served: ServedModel) -> None:
    text = "naïve 你好 🙂!"
    scripts(api, served, text)
    chunks = events(api, {"prompt": "x", "max_tokens": 100})
    pieces = [choice["text"] for chunk in chunks for choice in chunk["choices"]]
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_logprobs_are_in_the_shape_of_completions(api: RunningApi, served: ServedModel) -> None:
    scripts(api, served, "abc", ends=False)
    logprobs = post(api, {"prompt": "x", "max_tokens": 3, "logprobs": 2}).json()["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["a", "b", "c"]
    assert logprobs["text_offset"] == [0, 1, 2]
    assert logprobs["token_logprobs"] == [-0.5] * 3
    assert [len(top) for top in logprobs["top_logprobs"]] == [2, 2, 2]
    named = post(api, {"prompt": "x", "max_tokens": 1, "logprobs": 0, "return_tokens_as_token_ids": True}).json()
    token_id = served.tokenizer.encode("a")[0]
    assert named["choices"][0]["logprobs"]["tokens"] == [f"token_id:{token_id}"]


def test_echo_puts_the_prompt_before_text_and_logprobs(api: RunningApi, served: ServedModel) -> None:
    scripts(api, served, "abc", ends=False)
    body = {"prompt": "the router", "max_tokens": 3, "echo": True, "logprobs": 1}
    choice = post(api, body).json()["choices"][0]
    assert choice["text"] == "the routerabc"
    joined = "".join(choice["logprobs"]["tokens"])
    assert joined == choice["text"]
    for token, offset in zip(choice["logprobs"]["tokens"], choice["logprobs"]["text_offset"], strict=True):
        assert choice["text"].startswith(token, offset)
    assert choice["logprobs"]["token_logprobs"][0] is None
    chunks = events(api, body)
    assert "".join(one["choices"][0]["text"] for one in chunks) == choice["text"]
    only = post(api, {**body, "max_tokens": 0}).json()
    assert only["choices"][0]["text"] == "the router"
    assert only["usage"]["completion_tokens"] == 0
    assert len(only["choices"][0]["logprobs"]["tokens"]) == only["usage"]["prompt_tokens"]


def test_prompt_logprobs_are_in_vllm_shape(api: RunningApi) -> None:
    answer = post(api, {"prompt": [10, 11, 12], "max_tokens": 1, "prompt_logprobs": 1}).json()
    first, second, _ = answer["choices"][0]["prompt_logprobs"]
    assert first is None
    assert second["11"]["rank"] == 1 and second["11"]["logprob"] == -0.5
    refused = post(api, {"prompt": "x", "prompt_logprobs": 1, "stream": True})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "prompt_logprobs"


def test_every_sampling_field_reaches_the_router(api: RunningApi, served: ServedModel) -> None:
    body = {
        "prompt": "x",
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "repetition_penalty": 1.2,
        "frequency_penalty": 0.3,
        "presence_penalty": -0.4,
        "logit_bias": {"5": 2.5},
        "min_tokens": 2,
        "max_tokens": 4,
        "stop_token_ids": [9],
        "ignore_eos": True,
        "seed": -1,
        "bad_words": ["no"],
        "allowed_token_ids": [1, 2, 3],
        "priority": 3,
        "cache_salt": "tenant",
        "return_routed_experts": True,
        "structured_outputs": {"choice": ["a", "b"]},
    }
    assert post(api, body).status_code == 200
    message = api.router.requests[-1]
    sampling = message["sampling"]
    words = [served.tokenizer.encode("no"), served.tokenizer.encode(" no")]
    assert sampling.pop("bad_words_ids") == words
    assert sampling.pop("seed") == 2**63 - 1
    assert sampling == {
        **{name: body[name] for name in sampling if name not in ("structured",)},
        "structured": {"kind": "choice", "payload": '["a", "b"]'},
    }
    assert set(sampling) >= {"temperature", "top_p", "top_k", "min_p", "logit_bias", "ignore_eos", "allowed_token_ids"}
    assert (message["priority"], message["cache_salt"], message["return_routed_experts"]) == (3, "tenant", True)


def test_more_least_tokens_than_fit_are_refused_by_name(api: RunningApi) -> None:
    error = post(api, {"prompt": "x", "max_tokens": 2, "min_tokens": 3}).json()["error"]
    assert error["param"] == "min_tokens" and "max_tokens=2, got 3" in error["message"]


def test_token_ids_reach_the_router_once_each_and_not_by_the_million(api: RunningApi) -> None:
    ids = [9, 8] * 1000
    body = {"prompt": "x", "max_tokens": 1, "stop_token_ids": ids, "allowed_token_ids": ids}
    assert post(api, body).status_code == 200
    sampling = api.router.requests[-1]["sampling"]
    assert sampling["stop_token_ids"] == sampling["allowed_token_ids"] == [9, 8]
    body |= {"n": 128, "prompt": [[5]] * 8, "allowed_token_ids": [*range(500)]}
    body["logit_bias"] = {str(token): 1 for token in range(474)}
    assert post(api, body).status_code == 200, "1024 sequences with 976 tokens each"
    body["stop_token_ids"] = [9, 8, 7]
    error = post(api, body).json()["error"]
    assert error["param"] == "allowed_token_ids"
    for part in ("stop_token_ids, allowed_token_ids and logit_bias", "977", "1024", "1000000"):
        assert part in error["message"]


def test_a_seed_is_always_set(api: RunningApi) -> None:
    for _ in range(2):
        post(api, {"prompt": "x", "max_tokens": 1})
    first, second = (request["sampling"]["seed"] for request in api.router.requests[-2:])
    assert first != second


def test_the_same_prompt_twice_has_two_seeds_unless_one_is_given(api: RunningApi) -> None:
    post(api, {"prompt": ["x", "x"], "n": 2, "max_tokens": 1})
    assert len({request["sampling"]["seed"] for request in api.router.requests[-4:]}) == 4
    post(api, {"prompt": ["x", "x"], "n": 2, "max_tokens": 1, "seed": 7})
    assert sorted(request["sampling"]["seed"] for request in api.router.requests[-4:]) == [7, 7, 8, 8]


@pytest.mark.parametrize(
    ("structured", "kind"),
    [
        ({"structured_outputs": {"json": {"type": "object"}}}, "json_schema"),
        ({"structured_outputs": {"json": '{"type": "object"}'}}, "json_schema"),
        ({"structured_outputs": {"json_object": True}}, "json_object"),
        ({"structured_outputs": {"regex": "a+"}}, "regex"),
        ({"structured_outputs": {"grammar": 'start: "a"'}}, "grammar"),
        ({"response_format": {"type": "json_object"}}, "json_object"),
        ({"response_format": {"type": "json_object", "value": {"type": "object"}}}, "json_schema"),
        ({"response_format": {"type": "json_object", "schema": {"type": "object"}, "value": None}}, "json_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}}}, "json_schema"),
    ],
)
def test_structured_outputs_reach_the_router(api: RunningApi, structured: dict[str, Any], kind: str) -> None:
    assert post(api, {"prompt": "x", "max_tokens": 1, **structured}).status_code == 200
    assert api.router.requests[-1]["sampling"]["structured"]["kind"] == kind


def test_truncation_keeps_the_end_of_the_prompt(api: RunningApi) -> None:
    post(api, {"prompt": [10, 11, 12, 13], "max_tokens": 1, "truncate_prompt_tokens": 2})
    assert api.router.requests[-1]["prompt_ids"] == [12, 13]
    post(api, {"prompt": [10] * 1000, "max_tokens": 6, "truncate_prompt_tokens": -1})
    assert len(api.router.requests[-1]["prompt_ids"]) == 506
    post(api, {"prompt": [10, 11, 12, 13], "max_tokens": 1, "truncate_prompt_tokens": 2, "truncation_side": "right"})
    assert api.router.requests[-1]["prompt_ids"] == [10, 11]


def test_a_large_batch_takes_turns_and_a_larger_one_is_refused(api: RunningApi) -> None:
    api.router.max_running = 300
    body = {"prompt": [[5, 6]] * 500, "n": 2, "max_tokens": 2}
    assert len(post(api, body).json()["choices"]) == 1000
    api.router.max_running = 10_000
    refused = post(api, {**body, "n": 3}).json()["error"]
    assert refused["param"] == "prompt" and "500" in refused["message"] and "1024" in refused["message"]


def test_too_long_prompts_are_refused_with_both_numbers(api: RunningApi) -> None:
    for body in ({"prompt": [5] * 600}, {"prompt": [5] * 100, "max_tokens": 500}):
        response = post(api, body)
        error = response.json()["error"]
        assert response.status_code == 400 and error["code"] == "context_length_exceeded"
        assert "512" in error["message"] and str(len(body["prompt"])) in error["message"]  # type: ignore[arg-type]
    assert post(api, {"prompt": [5] * 506}).json()["usage"]["completion_tokens"] == 6  # our own 16 gives way


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_aborts_its_requests(api: RunningApi, stream: bool) -> None:
    wait_for_aborts(api, post_and_leave(api, {"prompt": "x", "max_tokens": 200, "n": 2, "stream": stream}))
    assert num_in_flight(api.pool) == 0
    wait_until(lambda: httpx.get(api.url + "/load").json() == {"server_load": 0})


def test_a_client_that_leaves_in_the_middle_of_a_stream_aborts_it(api: RunningApi) -> None:
    api.router.token_s = 0.05
    body = {"prompt": "x", "max_tokens": 500, "stream": True}
    with httpx.stream("POST", api.url + "/v1/completions", json=body, timeout=60) as answer:
        next(answer.iter_lines())
        api.router.token_s = 600.0  # the rest never comes
    wait_for_aborts(api, [api.router.requests[-1]["request_id"]])


def test_the_async_client_streams_many_at_once(api: RunningApi, served: ServedModel) -> None:
    async def run() -> None:
        async with openai.AsyncOpenAI(base_url=api.url + "/v1", api_key="x") as client:

            async def one(seed: int) -> str:
                stream = await client.completions.create(
                    model="tiny", prompt="x", max_tokens=20, seed=seed, stream=True
                )
                return "".join([chunk.choices[0].text async for chunk in stream])

            texts = await asyncio.gather(*(one(seed) for seed in range(20)))
        assert texts == [served.tokenizer.decode(expected_ids(seed, 1, 20)) for seed in range(20)]

    asyncio.run(run())
