"""/v1/chat/completions."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass
from typing import Any

from deploy.chat_messages import read_messages, render
from deploy.errors import InvalidRequest, invalid
from deploy.generation import Delta, TextOptions, gather_all, stream_all
from deploy.generation_plan import (
    Asked,
    check_length,
    check_prompt,
    plan_requests,
    structured_spec,
    text_options,
    truncate_prompt,
)
from deploy.logprobs import chat_logprobs, prompt_logprobs
from deploy.openai_requests import ChatCompletionRequest
from deploy.router_pool import GenerateRequest
from deploy.served_model import ServedModel
from deploy.service import Service
from deploy.tool_parser import CallArguments, CallStart, Content, HermesCalls, Parser, Piece, parser_for
from deploy.tools import ToolUse, read_tool_use
from deploy.usage import Usage, events_with_usage


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatPlan:
    """A validated chat, ready to run."""

    body: ChatCompletionRequest
    model: ServedModel
    requests: list[GenerateRequest]
    options: TextOptions
    use: ToolUse
    echo: str  # what the answer begins with: the assistant's last message
    answer_id: str
    created: int
    fingerprint: str

    def head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.answer_id,
            "object": kind,
            "created": self.created,
            "model": self.body.model or self.model.names[0],
            "system_fingerprint": self.fingerprint,
        }


async def plan_chat(service: Service, body: ChatCompletionRequest, answer_id: str) -> ChatPlan:
    """Renders, tokenizes and checks everything. Raises ApiError."""
    model = service.models.find_generator(body.model)
    _check_fields(body)
    use = read_tool_use(body.tools, body.tool_choice, is_parallel=body.parallel_tool_calls is not False)
    structured = structured_spec(body)
    if structured is None:
        tags_are_tokens = model.tokenizer.backend.token_to_id(HermesCalls.OPEN) is not None
        structured = use.structured(tags_are_tokens=tags_are_tokens)
    elif use.mode in ("required", "named"):
        raise invalid("tool_choice", "a demanded call excludes response_format")
    messages = read_messages(body.messages)
    prompt = await render(
        service,
        model,
        messages,
        use=use,
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=body.continue_final_message,
        variables=body.chat_template_kwargs,
    )
    max_tokens = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    check_length(prompt, body, model, "messages")
    prompt_ids = await service.encode(model, prompt, add_special_tokens=body.add_special_tokens)
    prompt_ids = truncate_prompt(body, model, prompt_ids, max_tokens)
    check_prompt(prompt_ids, model, "messages")
    asked = Asked(
        max_tokens=max_tokens,
        max_tokens_name="max_tokens" if body.max_completion_tokens is None else "max_completion_tokens",
        prompt_param="messages",
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        prompt_logprobs=body.prompt_logprobs,
        structured=structured,
    )
    return ChatPlan(
        body=body,
        model=model,
        requests=plan_requests(body, model, [prompt_ids], asked, service.settings.limits, service.deadline()),
        options=text_options(body, model),
        use=use,
        echo=messages[-1]["content"] if body.echo and messages[-1]["role"] == "assistant" else "",
        answer_id=answer_id,
        created=int(service.now()),
        fingerprint=service.fingerprint,
    )


async def chat(service: Service, plan: ChatPlan) -> dict[str, Any]:
    """The whole answer."""
    deltas = await gather_all(service.pool, plan.requests, plan.model.tokenizer, plan.options)
    usage = Usage.of_prompts(plan.requests, len(plan.requests))
    choices = []
    answer = plan.head("chat.completion")
    for index, delta in enumerate(deltas):
        usage.count(delta)
        choices.append(_Choice(plan, index).whole(delta))
    answer |= {"choices": choices, "usage": usage.to_dict()}
    if plan.body.prompt_logprobs is not None and deltas[0].prompt_logprobs is not None:
        answer["prompt_logprobs"] = prompt_logprobs(deltas[0].prompt_logprobs, plan.model.tokenizer)
    if plan.body.return_token_ids:
        answer["prompt_token_ids"] = plan.requests[0].prompt_ids
    return answer


async def chat_stream(service: Service, plan: ChatPlan) -> AsyncGenerator[bytes]:
    """The answer as server-sent events."""
    choices = [_Choice(plan, index) for index in range(len(plan.requests))]
    usage = Usage.of_prompts(plan.requests, len(plan.requests))

    def show(delta: Delta) -> Iterator[dict[str, Any]]:
        for choice in choices[delta.index].chunks(delta):
            shown: dict[str, Any] = {"choices": [choice]}
            if plan.body.return_token_ids and "role" in choice["delta"]:
                shown["prompt_token_ids"] = plan.requests[0].prompt_ids
            yield shown

    async with contextlib.aclosing(
        stream_all(service.pool, plan.requests, plan.model.tokenizer, plan.options)
    ) as deltas:
        head = plan.head("chat.completion.chunk")
        async for one in events_with_usage(deltas, show, head, usage, plan.body.stream_options):
            yield one


class _Choice:
    """One choice of the answer: reads tool calls out of its text."""

    def __init__(self, plan: ChatPlan, index: int) -> None:
        self._plan = plan
        self._index = index
        self._parser: Parser = parser_for(plan.use)
        self._num_calls = 0
        self._is_first = True

    def whole(self, delta: Delta) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": None, "refusal": None}
        calls: list[dict[str, Any]] = []
        content = self._plan.echo
        for piece in self._pieces(delta):
            if isinstance(piece, Content):
                content += piece.text
            elif isinstance(piece, CallStart):
                calls.append(_call(piece.name))
            else:
                calls[piece.index]["function"]["arguments"] += piece.text
        message["content"] = content if content or not calls else None
        if calls:
            message["tool_calls"] = calls
        return self._render(delta, "message", message, with_logprobs=True)

    def chunks(self, delta: Delta) -> list[dict[str, Any]]:
        """What a stream shows of this delta: the role first of all, then what is new, if anything is."""
        chunks = []
        if self._is_first:
            self._is_first = False
            role = {"role": "assistant", "content": self._plan.echo}
            chunks.append({"index": self._index, "delta": role, "logprobs": None, "finish_reason": None})
        content, calls = "", {}
        for piece in self._pieces(delta):
            if isinstance(piece, Content):
                content += piece.text
            elif isinstance(piece, CallStart):
                calls[piece.index] = {"index": piece.index, **_call(piece.name)}
            else:
                _append(calls.setdefault(piece.index, {"index": piece.index, "function": {"arguments": ""}}), piece)
        news: dict[str, Any] = {"content": content} if content else {}
        if calls:
            news["tool_calls"] = list(calls.values())
        shows_tokens = bool(delta.tokens) and bool(self._plan.body.logprobs or self._plan.body.return_token_ids)
        if news or shows_tokens or delta.finish_reason or delta.routed_experts:
            chunks.append(self._render(delta, "delta", news, with_logprobs=bool(delta.tokens)))
        return chunks

    def _pieces(self, delta: Delta) -> list[Piece]:
        pieces = self._parser.feed(delta.text)
        if delta.finish_reason is not None:
            pieces += self._parser.finish()
        self._num_calls += sum(isinstance(piece, CallStart) for piece in pieces)
        return pieces

    def _render(self, delta: Delta, name: str, value: dict[str, Any], *, with_logprobs: bool) -> dict[str, Any]:
        body, tokenizer = self._plan.body, self._plan.model.tokenizer
        choice: dict[str, Any] = {
            "index": self._index,
            name: value,
            "logprobs": None,
            "finish_reason": self._finish_reason(delta),
            "stop_reason": delta.stop_reason,
        }
        if body.logprobs and with_logprobs:
            choice["logprobs"] = chat_logprobs(
                delta.tokens,
                tokenizer,
                num_top=body.top_logprobs or 0,
                as_ids=bool(body.return_tokens_as_token_ids),
            )
        if body.return_token_ids:
            choice["token_ids"] = [token.token_id for token in delta.tokens]
        if body.return_routed_experts and delta.routed_experts is not None:
            choice["routed_experts"] = delta.routed_experts
        return choice

    def _finish_reason(self, delta: Delta) -> str | None:
        """`tool_calls` when the model called and ended; a demanded function ends with `stop`, as OpenAI has it."""
        if delta.finish_reason == "stop" and self._num_calls and self._plan.use.mode != "named":
            return "tool_calls"
        return delta.finish_reason


def _check_fields(body: ChatCompletionRequest) -> None:
    if body.top_logprobs is not None and not body.logprobs:
        raise invalid("top_logprobs", "needs logprobs; set logprobs to true")
    if body.stream and body.prompt_logprobs is not None:
        raise invalid("prompt_logprobs", "not available with stream; set stream to false")
    if body.max_tokens == 0:
        raise invalid("max_tokens", "must be at least 1, got 0")
    if body.continue_final_message and body.add_generation_prompt and "add_generation_prompt" in body.model_fields_set:
        raise InvalidRequest(
            "continue_final_message and add_generation_prompt exclude each other; set one of them to false",
            param="continue_final_message",
        )


def _call(name: str) -> dict[str, Any]:
    return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": {"name": name, "arguments": ""}}


def _append(call: dict[str, Any], piece: CallArguments) -> None:
    call["function"]["arguments"] += piece.text
