"""Errors, keys, limits and the operators' endpoints."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from deploy.auth import OPEN_PATHS
from deploy.errors import InvalidRequest
from deploy.ingress import create_api
from deploy.openai_requests import ChatCompletionRequest, CompletionRequest, RequestBody
from deploy.router_pool import RouterPool
from deploy.served_model import ModelList, ServedModel
from deploy.service import Service
from deploy.settings import Settings
from tests.deploy.fakes import FakeRouter, RunningApi, running_api

HELLO = [{"role": "user", "content": "hello"}]


def send(api: RunningApi, body: bytes | Any, path: str = "/v1/chat/completions", **headers: str) -> httpx.Response:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return httpx.post(api.url + path, content=data, headers={"content-type": "application/json", **headers}, timeout=30)


def error_of(response: httpx.Response) -> dict[str, Any]:
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert 0 < len(error["message"]) <= 600
    assert "Traceback" not in error["message"] and "\n" not in error["message"]
    return error


def bodies(base: type[RequestBody] = RequestBody) -> Iterator[type[RequestBody]]:
    for body in base.__subclasses__():
        yield body
        yield from bodies(body)


@pytest.mark.parametrize("wrong", [[{1}] * 1000, {str(i): {1} for i in range(1000)}], ids=["list", "object"])
def test_a_list_or_an_object_is_read_until_its_first_wrong_item(wrong: Any) -> None:
    for body in bodies():
        for name, field in body.model_fields.items():
            try:
                with contextlib.suppress(InvalidRequest):
                    body.model_validate({field.alias or name: wrong})
            except ValidationError as error:
                mine = [one for one in error.errors() if one["loc"][0] == (field.alias or name)]
                assert len(mine) < 4, (body, name)  # one for each type that the field may have


def test_giant_bodies_are_413_and_long_ones_400(api: RunningApi) -> None:
    huge = send(api, {"messages": [{"role": "user", "content": "x" * (10 << 20)}]})
    assert huge.status_code == 413 and error_of(huge)["code"] == "body_too_large"
    chunked = httpx.post(
        api.url + "/v1/completions",
        content=(b"x" * 65536 for _ in range(200)),
        headers={"content-type": "application/json"},
    )
    assert chunked.status_code == 413
    long = send(api, {"messages": [{"role": "user", "content": "ab " * 300_000}]})
    assert long.status_code == 400 and error_of(long)["code"] == "context_length_exceeded"


def test_long_texts_do_not_hold_up_others(api: RunningApi, served: ServedModel) -> None:
    text = " ".join(f"{i * 7919 % 10_007}" for i in range(300_000))

    async def run() -> int:
        work = asyncio.ensure_future(api_service.encode(served, text, add_special_tokens=False))
        turns = 0
        while not work.done():
            await asyncio.sleep(0.001)
            turns += 1
        return turns

    api_service = Service(Settings(), ModelList([served]), api.pool)
    assert asyncio.run(run()) > 5, "one that holds up the loop, or the GIL, leaves it one or two turns"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
FIELDS = sorted({*CompletionRequest.model_fields, *ChatCompletionRequest.model_fields, "best_of", "store", "zzz"})


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=4), st.booleans())
def test_no_body_makes_the_server_fail(api: RunningApi, body: dict[str, Any], is_chat: bool) -> None:
    base = {"messages": HELLO} if is_chat else {"prompt": "x"}
    path = "/v1/chat/completions" if is_chat else "/v1/completions"
    response = send(api, json.dumps({**base, "max_tokens": 1, **body}).encode(), path)
    assert response.status_code in (200, 400, 404)
    if response.status_code != 200:
        error_of(response)


def test_unknown_things_are_named_and_the_nearest_known_is_offered(api: RunningApi) -> None:
    typo = send(api, {"messages": HELLO, "temprature": 1})
    assert typo.status_code == 400 and "'temperature'" in error_of(typo)["message"]
    assert error_of(typo)["param"] == "temprature"
    model = send(api, {"messages": HELLO, "model": "gpt-9"})
    assert model.status_code == 404 and error_of(model)["code"] == "model_not_found"
    path = httpx.get(api.url + "/v1/nothing")
    assert path.status_code == 404 and error_of(path)["code"] == "not_found"
    method = httpx.get(api.url + "/v1/completions")
    assert method.status_code == 405 and error_of(method)["code"] == "method_not_allowed"
    media = send(api, {"messages": HELLO}, **{"content-type": "text/plain"})
    assert media.status_code == 415 and error_of(media)["code"] == "unsupported_media_type"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("metadata", {"a": "b"}),
        ("store", False),
        ("service_tier", "auto"),
        ("best_of", 1),
        ("stop", None),
    ],
)
def test_harmless_fields_are_accepted(api: RunningApi, field: str, value: Any) -> None:
    body = {"prompt": "x", "max_tokens": 1, field: value}
    assert send(api, body, "/v1/completions").status_code == 200


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("store", True),
        ("service_tier", "flex"),
        ("use_beam_search", True),
        ("audio", {}),
    ],
)
def test_what_is_not_done_is_refused_by_name(api: RunningApi, field: str, value: Any) -> None:
    response = send(api, {"prompt": "x", field: value}, "/v1/completions")
    assert response.status_code == 400 and error_of(response)["param"] == field


def test_an_error_in_the_middle_of_a_stream_is_an_event_and_the_stream_ends(served: ServedModel) -> None:
    router = FakeRouter(token_s=0.02, dies_after=5)
    with running_api(served, Settings.model_validate({"limits": {"request_timeout_s": 3.0}}), router) as api:
        response = send(api, {"prompt": "x", "max_tokens": 99, "stream": True}, "/v1/completions")
        assert response.status_code == 200
        lines = [line[6:] for line in response.text.split("\n\n") if line]
        assert lines[-1] == "[DONE]"
        assert json.loads(lines[-2])["error"]["type"] == "server_error"
        assert len(lines) == 7
        late = send(api, {"prompt": "x", "stream": True}, "/v1/completions")
        assert late.status_code == 503 and error_of(late)["code"] == "no_router"
        assert late.headers["retry-after"] == "1"
        assert httpx.get(api.url + "/ready").status_code == 503
        assert httpx.get(api.url + "/health").status_code == 503
        assert httpx.get(api.url + "/ping").status_code == 200
        assert 'rejected_requests_total{code="no_router"} 1.0' in httpx.get(api.url + "/metrics").text, "no probes"


def test_a_full_queue_is_503_also_for_streams(served: ServedModel) -> None:
    with running_api(served, router=FakeRouter(max_running=0)) as api:
        for stream in (False, True):
            response = send(api, {"prompt": "x", "stream": stream}, "/v1/completions")
            assert response.status_code == 503 and error_of(response)["code"] == "queue_full"
            assert "retry-after" in response.headers
        assert 'rejected_requests_total{code="queue_full"} 2.0' in httpx.get(api.url + "/metrics").text


def test_an_ingress_holds_only_so_many_requests(served: ServedModel) -> None:
    limited = Settings.model_validate(
        {"limits": {"max_queue": 2, "max_requests_per_key": 1}, "server": {"api_keys": ["a", "b", "c"]}}
    )
    with running_api(served, limited, FakeRouter(token_s=0.05)) as api, httpx.Client() as http:

        def begin(key: str) -> Any:
            body = {"prompt": "x", "max_tokens": 300, "stream": True}
            headers = {"authorization": f"Bearer {key}", "x-request-id": "always-the-same"}
            return http.stream("POST", api.url + "/v1/completions", json=body, headers=headers)

        with begin("a") as first:
            assert first.status_code == 200
            with begin("a") as again:
                assert again.status_code == 429 and "retry-after" in again.headers
            with begin("b") as second:
                assert second.status_code == 200
                with begin("c") as third:
                    assert third.status_code == 503


TOKEN_BODIES: dict[str, Any] = {
    "/tokenize": {"prompt": "x"},
    "/detokenize": {"tokens": [5]},
    "/v1/messages/count_tokens": {"messages": HELLO},
}


@pytest.mark.parametrize(("limit", "status"), [("max_queue", 503), ("max_requests_per_key", 429)])
def test_who_counts_tokens_takes_a_place_and_nothing_of_the_rate(served: ServedModel, limit: str, status: int) -> None:
    limited = Settings.model_validate({"limits": {limit: 1, "requests_per_minute_per_key": 1}})
    with running_api(served, limited, FakeRouter(token_s=0.05)) as api, httpx.Client() as http:
        for path, body in TOKEN_BODIES.items():
            assert send(api, body, path).status_code == 200
        body = {"prompt": "x", "max_tokens": 300, "stream": True}
        with http.stream("POST", api.url + "/v1/completions", json=body) as first:
            assert first.status_code == 200
            for path, body in TOKEN_BODIES.items():
                assert send(api, body, path).status_code == status
        refused = "queue_full" if status == 503 else "rate_limit_exceeded"
        assert f'rejected_requests_total{{code="{refused}"}} 3.0' in httpx.get(api.url + "/metrics").text


def test_a_body_that_never_ends_gives_its_place_up(served: ServedModel) -> None:
    limited = Settings.model_validate({"limits": {"max_queue": 2, "request_timeout_s": 2.0}})
    with running_api(served, limited) as api, socket.socket() as one, socket.socket() as other:
        for slow in (one, other):
            slow.settimeout(10)
            slow.connect(("127.0.0.1", int(api.url.rpartition(":")[2])))
            slow.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        for slow in (one, other):
            answer = slow.makefile("rb").read()  # to the end of the connection
            assert answer.startswith(b"HTTP/1.1 408") and b'"code":"request_timeout"' in answer
        assert send(api, {"prompt": "x", "max_tokens": 1}, "/v1/completions").status_code == 200


def test_a_client_that_stops_reading_ends_its_stream(served: ServedModel) -> None:
    async def run() -> list[str]:
        router = await FakeRouter(token_s=0.01).start()
        limited = Settings.model_validate({"limits": {"request_timeout_s": 3.0}})
        body = b'{"prompt": "x", "max_tokens": 500, "stream": true}'

        async def discover() -> list[dict[str, Any]]:
            return router.entries

        pool = RouterPool(discover, limited)
        heard = [{"type": "http.request", "body": body}]

        async def receive() -> dict[str, Any]:
            return heard.pop() if heard else await asyncio.Future()

        async def send(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.body":
                await asyncio.Future()  # as a server does when nobody takes what it has

        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "query_string": b"", "headers": []}
        async with asyncio.timeout(60):
            await create_api(limited, [served], pool)(scope, receive, send)
            while not router.aborted:
                await asyncio.sleep(0.01)
        await pool.close()
        router.kill()
        return router.aborted

    assert len(asyncio.run(run())) == 1


def test_keys_are_checked_everywhere_but_for_probes(served: ServedModel) -> None:
    keyed = Settings.model_validate({"server": {"api_keys": ["key-1", "key-2"]}})
    with running_api(served, keyed) as api:
        for path in ("/v1/models", "/mesh", "/server_info", "/load", "/v1/nothing"):
            response = httpx.get(api.url + path)
            assert response.status_code == 401 and error_of(response)["code"] == "invalid_api_key"
        assert httpx.get(api.url + "/ping").status_code == 200
        assert httpx.get(api.url + "/health").status_code in (200, 503)  # 503 until it has found its router
        for headers in ({"authorization": "Bearer key-1"}, {"authorization": "bearer key-2"}, {"x-api-key": "key-1"}):
            assert httpx.get(api.url + "/v1/models", headers=headers).status_code == 200
        for headers in ({"authorization": "Bearer key-3"}, {"authorization": "key-1"}, {"x-api-key": ""}):
            assert httpx.get(api.url + "/v1/models", headers=headers).status_code == 401
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=api.url + "/v1", api_key="wrong", max_retries=0).models.list()
        assert "key-1" not in httpx.get(api.url + "/server_info", headers={"x-api-key": "key-1"}).text


def test_a_wrong_key_has_no_account_whatever_it_posts(served: ServedModel) -> None:
    limits = {"requests_per_minute_per_key": 1, "max_requests_per_key": 1}
    keyed = Settings.model_validate({"server": {"api_keys": ["key-1"]}, "limits": limits})
    with running_api(served, keyed) as api:
        for path in sorted(OPEN_PATHS - {"/ping"}):
            answers = [send(api, {}, path, authorization="Bearer wrong").status_code for _ in range(3)]
            assert answers == [405] * 3, path


def test_browsers_of_other_origins_are_let_in_only_where_named(served: ServedModel) -> None:
    def asked(url: str, origin: str) -> list[str | None]:
        preflight = {"origin": origin, "access-control-request-method": "POST"}
        answers = httpx.get(url + "/ping", headers={"origin": origin}), httpx.options(url + "/ping", headers=preflight)
        return [answer.headers.get("access-control-allow-origin") for answer in answers]

    with running_api(served) as api:
        assert asked(api.url, "https://a.example") == [None, None]
    named = Settings.model_validate({"server": {"allowed_origins": ["https://a.example"]}})
    with running_api(served, named) as api:
        assert asked(api.url, "https://a.example") == ["https://a.example"] * 2
        assert asked(api.url, "https://b.example") == [None, None]


def test_request_ids_are_echoed_and_name_the_answer(api: RunningApi) -> None:
    response = send(api, {"prompt": "x", "max_tokens": 1}, "/v1/completions", **{"x-request-id": "abc-1"})
    assert response.headers["x-request-id"] == "abc-1" and response.json()["id"] == "cmpl-abc-1"
    fresh = send(
        api, {"prompt": "x", "max_tokens": 1, "request_id": "mine"}, "/v1/completions", **{"x-request-id": "a b"}
    )
    assert fresh.headers["x-request-id"] != "a b" and fresh.json()["id"] == "cmpl-mine"
    assert api.router.requests[-1]["request_id"] != "mine"  # two clients may choose the same


def test_the_operators_endpoints_answer(api: RunningApi, served: ServedModel) -> None:
    client = openai.OpenAI(base_url=api.url + "/v1", api_key="x")
    assert [model.id for model in client.models.list()] == ["tiny", "tiny-alias"]
    assert client.models.retrieve("tiny").model_dump()["max_model_len"] == 512
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("none")
    assert httpx.get(api.url + "/version").json() == {"version": "0.1.0"}
    assert httpx.get(api.url + "/ready").json() == {"routers": 1}
    assert httpx.post(api.url + "/ping").status_code == 200
    assert httpx.get(api.url + "/mesh").json()["routers"][0]["router_id"] == "router-0"
    assert httpx.get(api.url + "/server_info").json()["settings"]["server"]["port"] == 8000
    assert httpx.post(api.url + "/reset_prefix_cache").json() == {"routers": {"router-0": {"ok": True}}}
    assert api.router.commands[-1] == "reset_prefix_cache"
    document = httpx.get(api.url + "/openapi.json").json()
    body = document["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert "messages" in document["components"]["schemas"][body["$ref"].rsplit("/", 1)[-1]]["properties"]


def test_tokens_go_both_ways(api: RunningApi, served: ServedModel) -> None:
    answer = send(api, {"prompt": "the expert 🙂", "return_token_strs": True}, "/tokenize").json()
    assert answer["tokens"] == served.tokenizer.encode("the expert 🙂")
    assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"])
    assert answer["max_model_len"] == 512
    assert send(api, {"tokens": answer["tokens"]}, "/detokenize").json() == {"prompt": "the expert 🙂"}
    chat = send(api, {"messages": HELLO}, "/tokenize").json()
    text = send(api, {"tokens": chat["tokens"]}, "/detokenize").json()["prompt"]
    assert text == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    assert send(api, {}, "/tokenize").status_code == 400
    assert send(api, {"tokens": [512]}, "/detokenize").status_code == 400
    assert send(api, {"tokens": [-1]}, "/detokenize").status_code == 400
    long = send(api, {"prompt": "word " * 20_000}, "/tokenize").json()
    assert long["count"] > 20_000
    assert "chat_template" in httpx.get(api.url + "/tokenizer_info").json()
