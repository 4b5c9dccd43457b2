"""Mixed traffic as a service sees it: whole and streamed, constraints, errors, clients that leave."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import httpx

SCHEMA = {"type": "object", "properties": {"kind": {"enum": ["x", "y"]}}, "required": ["kind"]}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {**SCHEMA, "additionalProperties": False}}}


@dataclass(frozen=True, slots=True)
class Planned:
    """One request. leave_after: its client goes away after so many lines of its stream, or, where it isn't streamed,
    after so many answers to others; None: it stays. status: what a client that stays gets."""

    path: str
    body: dict[str, Any]
    leave_after: int | None
    status: int = 200


def plan(rng: random.Random, vocab_size: int) -> Planned:
    """One random request; one in five is left by its client at a random moment."""
    leave = rng.randint(0, 9) if rng.random() < 0.2 else None
    text = " ".join(rng.choice(["the", "whale", "sea", "ship", "storm"]) for _ in range(rng.randint(1, 60)))
    ids = [rng.randrange(3, vocab_size) for _ in range(rng.randint(1, 200))]
    chat: dict[str, Any] = {"messages": [{"role": "user", "content": text}]}
    common = {"max_tokens": rng.randint(1, 48), "stream": rng.random() < 0.5, "seed": rng.randrange(1000)}
    extras: list[dict[str, Any]] = [
        {"temperature": 0},
        {"logprobs": 3, "echo": True},
        {"n": 3, "top_p": 0.9},
        {"stop": ["whale", " e"], "min_p": 0.01},
        {"repetition_penalty": 1.2, "logit_bias": {"7": 5}, "bad_words": ["sea"]},
        {"structured_outputs": {"regex": "[a-z]{3,40}"}},
    ]
    kinds: list[tuple[str, dict[str, Any], int]] = [
        ("/v1/completions", {"prompt": ids, **common, **rng.choice(extras)}, 200),
        ("/v1/completions", {"prompt": [ids, ids[:5]], **common, "ignore_eos": True}, 200),
        ("/v1/chat/completions", {**chat, **common}, 200),
        (
            "/v1/chat/completions",
            {
                **chat,
                **common,
                "response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}},
            },
            200,
        ),
        ("/v1/chat/completions", {**chat, **common, "tools": [TOOL], "tool_choice": "required"}, 200),
        ("/v1/messages", {**chat, "max_tokens": 20, "stream": common["stream"]}, 200),
        ("/tokenize", {"prompt": text}, 200),
        ("/v1/completions", {"prompt": ids, "max_tokens": 10**6}, 400),
        ("/v1/chat/completions", {**chat, "temperature": "warm"}, 400),
    ]
    path, body, status = rng.choices(kinds, weights=[6, 2, 5, 2, 2, 2, 1, 1, 1])[0]
    return Planned(path, body, leave, status)


async def send_all(url: str, planned: list[Planned], at_once: int) -> Counter[str]:
    """Send them, `at_once` in parallel. What became of them: "done", "left". AssertionError on a wrong answer."""
    became: Counter[str] = Counter()
    seats = asyncio.Semaphore(at_once)

    async def send(client: httpx.AsyncClient, one: Planned) -> None:
        async with seats:
            if one.leave_after is None or one.body.get("stream"):
                stays = await _ask(client, url, one)
            else:
                stays = await _ask_or_leave(client, url, one, became)
            became["done" if stays else "left"] += 1

    limits = httpx.Limits(max_connections=at_once, max_keepalive_connections=at_once)
    async with httpx.AsyncClient(timeout=300, limits=limits) as client:
        await asyncio.gather(*(send(client, one) for one in planned))
    return became


async def _ask(client: httpx.AsyncClient, url: str, one: Planned, extensions: dict[str, Any] | None = None) -> bool:
    """Whether the client stays to the end, and then gets what it should."""
    lines = []
    async with client.stream("POST", url + one.path, json=one.body, extensions=extensions) as answer:
        async for line in answer.aiter_lines():
            if len(lines) == one.leave_after:
                return False
            lines.append(line)
    content = "\n".join(lines)
    assert answer.status_code == one.status, (one, answer.status_code, content[:500])
    assert '"error"' not in content or one.status != 200, content[-500:]
    return True


async def _ask_or_leave(client: httpx.AsyncClient, url: str, one: Planned, became: Counter[str]) -> bool:
    """The same for an answer in one piece. The client leaves once its request is sent and others have been answered."""
    assert one.leave_after is not None
    sent, enough = asyncio.Event(), became["done"] + one.leave_after

    async def trace(event: str, _: Any) -> None:
        if event == "http11.send_request_body.complete":
            sent.set()

    work = asyncio.ensure_future(_ask(client, url, replace(one, leave_after=None), {"trace": trace}))
    while not work.done() and not (sent.is_set() and became["done"] >= enough):
        await asyncio.sleep(0.001)
    work.cancel()
    await asyncio.wait({work})
    return not work.cancelled() and work.result()
