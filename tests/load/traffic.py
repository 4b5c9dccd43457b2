"""Mixed traffic as a service sees it: whole and streamed, constraints, errors, clients that leave."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from dataclasses import dataclass
from typing import Any

import httpx

SCHEMA = {"type": "object", "properties": {"kind": {"enum": ["x", "y"]}}, "required": ["kind"]}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {**SCHEMA, "additionalProperties": False}}}


@dataclass(frozen=True, slots=True)
class Planned:
    """One request. leave_after_s: when its client goes away, or None. status: what a client that stays gets."""

    path: str
    body: dict[str, Any]
    leave_after_s: float | None
    status: int = 200


def plan(rng: random.Random, vocab_size: int) -> Planned:
    """One random request; one in five is left by its client at a random moment."""
    leave = rng.uniform(0.0, 1.0) ** 2 if rng.random() < 0.2 else None
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
            try:
                async with asyncio.timeout(one.leave_after_s):
                    async with client.stream("POST", url + one.path, json=one.body) as answer:
                        content = await answer.aread()
            except TimeoutError:
                became["left"] += 1
                return
            assert answer.status_code == one.status, (one, answer.status_code, content[:500])
            assert b'"error"' not in content or one.status != 200, content[-500:]
            became["done"] += 1

    limits = httpx.Limits(max_connections=at_once, max_keepalive_connections=at_once)
    async with httpx.AsyncClient(timeout=300, limits=limits) as client:
        await asyncio.gather(*(send(client, one) for one in planned))
    return became
