"""Large answers are rendered beside the event loop, which goes on with everybody else."""

from __future__ import annotations

import asyncio
import copy
import json
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from starlette.requests import Request

from actors.request import Chunk, Rows
from deploy.chat import CHAT
from deploy.completions import COMPLETIONS
from deploy.endpoints import TextEndpoint
from deploy.ingress import create_api
from deploy.openai_requests import TokenizeRequest, parse
from deploy.pooling import PoolingRequest, pool
from deploy.router_pool import PoolRequest, RouterPool, RouterRequest
from deploy.served_model import ModelList, ServedModel
from deploy.service import Service
from deploy.settings import Settings
from deploy.sse import CLIENT_LEFT
from deploy.token_endpoints import tokenize

ROW = np.random.default_rng(0).standard_normal(2048).astype(np.float32)


class NoRouter(RouterPool):
    """Answers by itself, at once."""

    def __init__(self) -> None:
        async def discover() -> list[dict[str, Any]]:
            return []

        super().__init__(discover, Settings())

    async def pool(self, request: PoolRequest) -> Rows:
        return [ROW] * 1000

    async def generate(self, request: RouterRequest) -> AsyncGenerator[Chunk]:
        alternatives = [(token_id, -1.0, token_id) for token_id in range(21)]
        yield Chunk(
            request_id=request.request_id,
            token_ids=[40] * 50,
            logprobs=[alternatives] * 50,
            prompt_logprobs=[None] + [alternatives] * (len(request.prompt_ids) - 1),
            finish_reason="length",
        )


def turns_of_the_loop(served: ServedModel, work: Callable[[Service], Coroutine[Any, Any, Any]]) -> tuple[int, Any]:
    """How often the event loop came round while the work was done, and its result."""

    async def run() -> tuple[int, Any]:
        service = Service(Settings(), ModelList([served]), NoRouter())
        task, turns = asyncio.ensure_future(work(service)), 0
        while not task.done():
            await asyncio.sleep(0.001)
            turns += 1
        service.close()
        return turns, task.result()

    return asyncio.run(run())


@pytest.mark.parametrize(
    ("endpoint", "body"),
    [
        (COMPLETIONS, {"prompt": [[5] * 400] * 8, "logprobs": 20, "prompt_logprobs": 20}),
        (CHAT, {"messages": [{"role": "user", "content": "x"}], "n": 64, "logprobs": True, "top_logprobs": 20}),
    ],
    ids=["completions", "chat"],
)
def test_log_probabilities(served: ServedModel, endpoint: TextEndpoint[Any, Any], body: dict[str, Any]) -> None:
    async def receive() -> Any:
        return await asyncio.Future()

    request = Request({"type": "http", "state": {"request_id": "r"}}, receive)
    parsed = parse(body, endpoint.body)
    turns, answer = turns_of_the_loop(served, lambda service: endpoint.serve(service, request, parsed))
    choices = json.loads(answer.body)["choices"]
    if endpoint is COMPLETIONS:
        assert len(choices) == 8 and choices[7]["prompt_logprobs"][0] is None
        assert all(len(one) == 21 for one in choices[7]["prompt_logprobs"][1:])
    else:
        assert len(choices) == 64 and len(choices[0]["logprobs"]["content"]) == 50
    assert turns > 5, "one that holds up the loop leaves it one or two turns"


class Recorded:
    """A tokenizers.Tokenizer that tells in which threads it tokenizes, and names tokens."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self.threads: set[str] = set()
        self.may_go_on = threading.Event()

    def encode_batch_fast(self, *arguments: Any, **options: Any) -> Any:
        self.threads.add(threading.current_thread().name)
        self.may_go_on.wait(60)
        return self._backend.encode_batch_fast(*arguments, **options)

    def id_to_token(self, token_id: int) -> str:
        self.threads.add(threading.current_thread().name)
        return str(self._backend.id_to_token(token_id))


def test_texts_of_tokens(served: ServedModel) -> None:
    backend = Recorded(served.tokenizer.backend)
    backend.may_go_on.set()
    tokenizer = copy.copy(served.tokenizer)
    tokenizer.backend = backend  # type: ignore[assignment]
    body = parse({"prompt": "word " * 2000, "return_token_strs": True}, TokenizeRequest)
    _, answer = turns_of_the_loop(replace(served, tokenizer=tokenizer), lambda service: tokenize(service, body))
    assert json.loads(answer)["count"] == len(json.loads(answer)["token_strs"]) > 2000
    assert len(backend.threads) == 1 and backend.threads.pop().startswith("read")


@pytest.mark.parametrize("path", ["/tokenize", "/v1/messages/count_tokens"])
def test_nobody_waits_for_the_tokens_of_a_client_that_has_left(served: ServedModel, path: str) -> None:
    tokenizer = copy.copy(served.tokenizer)
    tokenizer.backend = backend = Recorded(served.tokenizer.backend)  # type: ignore[assignment]
    text = "word " * 2000
    body = {"prompt": text} if path == "/tokenize" else {"messages": [{"role": "user", "content": text}]}
    heard = [{"type": "http.disconnect"}, {"type": "http.request", "body": json.dumps(body).encode()}]
    said: list[int] = []

    async def receive() -> dict[str, Any]:
        if heard[-1]["type"] == "http.disconnect":
            while not backend.threads:
                await asyncio.sleep(0.01)
        return heard.pop()

    async def send(message: Any) -> None:
        said.append(message.get("status", 0))

    async def run() -> None:
        pool = NoRouter()
        api = create_api(Settings(), [replace(served, tokenizer=tokenizer)], pool)
        scope = {"type": "http", "method": "POST", "path": path, "query_string": b"", "headers": []}
        try:
            await asyncio.wait_for(api(scope, receive, send), 20)
        finally:
            backend.may_go_on.set()
            await pool.close()

    asyncio.run(run())
    assert said[0] == CLIENT_LEFT


@pytest.mark.parametrize("is_raw", [True, False])
def test_rows_of_all_tokens(served: ServedModel, is_raw: bool) -> None:
    body = parse({"input": "x", "task": "token_embed", "use_activation": not is_raw}, PoolingRequest)
    turns, answer = turns_of_the_loop(served, lambda service: pool(service, body, "pool-1"))
    rows = json.loads(answer)["data"][0]["data"]
    assert len(rows) == 1000
    if is_raw:
        assert rows[7] == ROW.tolist(), "float32 as JSON writes them"
    assert turns > 5, "one that holds up the loop leaves it one or two turns"


def test_large_answers_hold_up_no_text_that_is_read(served: ServedModel) -> None:
    may_end = threading.Event()

    async def run() -> str:
        service = Service(Settings(), ModelList([served]), NoRouter())
        writing = [asyncio.ensure_future(service.write(lambda: may_end.wait(60), 1 << 20)) for _ in range(16)]
        try:
            return await asyncio.wait_for(service.read(lambda: threading.current_thread().name, 1 << 20), 30)
        finally:
            may_end.set()
            await asyncio.gather(*writing)
            service.close()

    assert asyncio.run(run()).startswith("read")
