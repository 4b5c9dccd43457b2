"""From router chunks to text: detokenizes as tokens come, ends at stop strings, runs many sequences as one answer."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from actors.request import Alternatives, Chunk
from deploy.openai_requests import GenerationBody
from deploy.router_pool import GenerateRequest, RouterPool
from deploy.served_model import ServedModel
from deploy.stop_strings import StopMatch, StopStrings

SEQUENCES_AT_ONCE = 256  # of one request: a batch neither fills a router's queue nor keeps others out of it


@dataclass(frozen=True, slots=True, kw_only=True)
class TextPlan:
    """A validated request, ready to run: the sequences to generate, and the body that says how to show them."""

    model: ServedModel
    requests: list[GenerateRequest]
    body: GenerationBody


@dataclass(frozen=True, slots=True)
class Token:
    """An output token. `text_offset` is where it begins in the output's text; `alternatives` if asked for."""

    token_id: int
    text_offset: int
    alternatives: Alternatives | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """What is new in one sequence. Token counts are of all output so far, shown or held back."""

    index: int
    text: str
    tokens: list[Token]
    num_tokens: int
    num_cached_tokens: int = 0
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    prompt_logprobs: list[Alternatives | None] | None = None
    routed_experts: list[Any] | None = None


class TextStream:
    """The text of one sequence. No part of a stop string is given out while it may still become one.

    A token is given out with the text it begins in; at the end all of them are."""

    def __init__(self, model: ServedModel, body: GenerationBody) -> None:
        self._detokenizer = model.tokenizer.detokenizer(skip_special_tokens=body.skip_special_tokens)
        self._body = body
        self._stop_ids = frozenset(body.stop_token_ids or ())
        self._end_ids = self._stop_ids.union(model.eos_token_ids)
        self._stops = StopStrings(body.stops)
        self._held_text = ""
        self._held_tokens: list[Token] = []
        self._num_shown = 0  # characters given out
        self._num_tokens = 0

    def push(self, chunk: Chunk, index: int = 0) -> Delta:
        """The delta of a chunk. It has a finish reason when the router finished, or when a stop string was found."""
        body = self._body
        match: StopMatch | None = None
        for i, token_id in enumerate(chunk.token_ids):
            self._num_tokens += 1
            alternatives = chunk.logprobs[i] if chunk.logprobs is not None else None
            self._held_tokens.append(Token(token_id, self._num_shown + len(self._held_text), alternatives))
            is_last = chunk.finish_reason == "stop" and i == len(chunk.token_ids) - 1
            if is_last and token_id in self._end_ids and not body.include_stop_str_in_output:
                break  # the token that ended it is no text
            match = self._grow(self._detokenizer.push(token_id))
            if match is not None:
                break
        finish_reason = chunk.finish_reason
        # The token id for a stop token of the request; nothing for the model's own end, as vLLM has it.
        stop_reason: int | str | None = chunk.stop_reason if chunk.stop_reason in self._stop_ids else None
        if match is None and finish_reason is not None:
            match = self._grow(self._detokenizer.finish())
        if match is not None:
            finish_reason, stop_reason = "stop", match.stop
            end = match.end if body.include_stop_str_in_output else match.start
            self._held_text = self._held_text[: end - self._num_shown]
        text, tokens = self._release(everything=finish_reason is not None)
        if body.max_tokens == 0:  # only the prompt is asked for; what is drawn is not
            text, tokens, self._num_tokens, stop_reason = "", [], 0, None
            finish_reason = "length" if finish_reason else None
        return Delta(
            index=index,
            text=text,
            tokens=tokens,
            num_tokens=self._num_tokens,
            num_cached_tokens=chunk.num_cached_tokens,
            finish_reason=finish_reason,
            stop_reason=stop_reason,
            prompt_logprobs=chunk.prompt_logprobs,
            routed_experts=chunk.routed_experts,
        )

    def _grow(self, text: str) -> StopMatch | None:
        self._held_text += text
        return self._stops.feed(text, search=self._num_tokens > (self._body.min_tokens or 0))

    def _release(self, *, everything: bool) -> tuple[str, list[Token]]:
        num_held = 0 if everything else self._stops.num_held
        cut = len(self._held_text) - num_held
        text, self._held_text = self._held_text[:cut], self._held_text[cut:]
        self._num_shown += len(text)
        if num_held == 0:
            tokens, self._held_tokens = self._held_tokens, []
            return text, tokens
        shown = [token for token in self._held_tokens if token.text_offset < self._num_shown]
        self._held_tokens = self._held_tokens[len(shown) :]
        return text, shown


async def stream_sequence(pool: RouterPool, plan: TextPlan, index: int) -> AsyncGenerator[Delta]:
    """The deltas of one sequence. A stop string, or closing the iterator, aborts the request at the router."""
    request = plan.requests[index]
    stream = TextStream(plan.model, plan.body)
    with pool.metrics.watch(len(request.prompt_ids), request.model, request.sampling) as watch:
        async with contextlib.aclosing(pool.generate(request)) as chunks:
            async for chunk in chunks:
                watch.saw(chunk)
                delta = stream.push(chunk, index)
                watch.ended = delta.finish_reason
                yield delta
                if delta.finish_reason is not None:
                    return


async def stream_all(pool: RouterPool, plan: TextPlan) -> AsyncGenerator[Delta]:
    """The deltas of several sequences as they come; `index` says whose. The first error ends them all."""
    if len(plan.requests) == 1:
        async with contextlib.aclosing(stream_sequence(pool, plan, 0)) as deltas:
            async for delta in deltas:
                yield delta
        return
    queue: asyncio.Queue[Delta | Exception | None] = asyncio.Queue()
    seats = asyncio.Semaphore(SEQUENCES_AT_ONCE)

    async def drain(index: int) -> None:
        try:
            async with seats, contextlib.aclosing(stream_sequence(pool, plan, index)) as deltas:
                async for delta in deltas:
                    queue.put_nowait(delta)
            queue.put_nowait(None)
        except Exception as error:
            queue.put_nowait(error)

    tasks = [asyncio.create_task(drain(index)) for index in range(len(plan.requests))]
    try:
        num_open = len(tasks)
        while num_open:
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                num_open -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def gather_all(pool: RouterPool, plan: TextPlan) -> list[Delta]:
    """All sequences, finished: one delta each with everything."""
    found: list[list[Delta]] = [[] for _ in plan.requests]
    async with contextlib.aclosing(stream_all(pool, plan)) as deltas:
        async for delta in deltas:
            found[delta.index].append(delta)
    return [_joined(deltas) for deltas in found]


def _joined(deltas: Sequence[Delta]) -> Delta:
    """Text, tokens and experts add up; the prompt's come once; the last delta has the end."""
    experts = [expert for delta in deltas for expert in delta.routed_experts or ()]
    return replace(
        deltas[-1],
        text="".join(delta.text for delta in deltas),
        tokens=[token for delta in deltas for token in delta.tokens],
        num_cached_tokens=max(delta.num_cached_tokens for delta in deltas),
        prompt_logprobs=next((one.prompt_logprobs for one in deltas if one.prompt_logprobs is not None), None),
        routed_experts=experts or None,
    )
