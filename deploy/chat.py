"""/v1/chat/completions."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass
from typing import Any

from deploy.chat_messages import read_messages, render
from deploy.endpoints import TextEndpoint
from deploy.errors import InvalidRequest, invalid
from deploy.generation import Delta, TextPlan
from deploy.generation_plan import (
    Asked,
    plan_requests,
    read_prompt,
    structured_spec,
)
from deploy.logprobs import chat_logprobs, prompt_logprobs
from deploy.openai_answers import Usage, answer_head, stream_chunks
from deploy.openai_requests import ChatCompletionRequest
from deploy.service import Service
from deploy.tool_parser import CallStart, Content, HermesCalls, parser_for, read_whole
from deploy.tools import ToolUse, read_tool_use


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatPlan(TextPlan):
    body: ChatCompletionRequest
    use: ToolUse
    echo: str  # what the answer begins with: the assistant's last message
    head: dict[str, Any]


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
    prompt = await render(service, model, body, messages, use)
    max_tokens = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    prompt_ids = await service.read(lambda: read_prompt(prompt, body, model, max_tokens, "messages"), len(prompt))
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
        use=use,
        echo=messages[-1]["content"] if body.echo and messages[-1]["role"] == "assistant" else "",
        head=answer_head(service, body, model, answer_id, "chat.completion"),
    )


def chat(plan: ChatPlan, deltas: list[Delta]) -> dict[str, Any]:
    """The whole answer."""
    usage = Usage(plan.requests)
    for delta in deltas:
        usage.count(delta)
    choices = (_Choice(plan, index).whole(delta) for index, delta in enumerate(deltas))
    answer: dict[str, Any] = {**plan.head, "choices": choices, "usage": usage.to_dict()}
    if plan.body.prompt_logprobs is not None and deltas[0].prompt_logprobs is not None:
        answer["prompt_logprobs"] = prompt_logprobs(deltas[0].prompt_logprobs, plan.model.tokenizer)
    if plan.body.return_token_ids:
        answer["prompt_token_ids"] = plan.requests[0].prompt_ids
    return answer


def chat_stream(service: Service, plan: ChatPlan) -> AsyncGenerator[bytes]:
    """The answer as server-sent events."""
    choices = [_Choice(plan, index) for index in range(len(plan.requests))]

    def show(delta: Delta) -> Iterator[dict[str, Any]]:
        for choice in choices[delta.index].chunks(delta):
            shown: dict[str, Any] = {"choices": [choice]}
            if plan.body.return_token_ids and "role" in choice["delta"]:
                shown["prompt_token_ids"] = plan.requests[0].prompt_ids
            yield shown

    head = {**plan.head, "object": "chat.completion.chunk"}
    return stream_chunks(service, plan, head, plan.body.stream_options, show)


class _Choice:
    """One choice of the answer: reads tool calls out of its text."""

    def __init__(self, plan: ChatPlan, index: int) -> None:
        self._plan = plan
        self._index = index
        self._parser = parser_for(plan.use)
        self._num_calls = 0
        self._is_first = True

    def whole(self, delta: Delta) -> dict[str, Any]:
        text, calls = read_whole(self._plan.use, delta.text)
        self._num_calls = len(calls)
        content = self._plan.echo + text
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if calls:
            message |= {"content": content or None, "tool_calls": [_call(*call) for call in calls]}
        return self._render(delta, "message", message, with_logprobs=True)

    def chunks(self, delta: Delta) -> list[dict[str, Any]]:
        """What a stream shows of this delta: the role first of all, then what is new, if anything is."""
        chunks = []
        if self._is_first:
            self._is_first = False
            role = {"role": "assistant", "content": self._plan.echo}
            chunks.append({"index": self._index, "delta": role, "logprobs": None, "finish_reason": None})
        content, calls = "", dict[int, dict[str, Any]]()
        for piece in self._parser.feed(delta.text) + (self._parser.finish() if delta.finish_reason else []):
            if isinstance(piece, Content):
                content += piece.text
            elif isinstance(piece, CallStart):
                self._num_calls += 1
                calls[piece.index] = {"index": piece.index, **_call(piece.name, "")}
            else:
                call = calls.setdefault(piece.index, {"index": piece.index, "function": {"arguments": ""}})
                call["function"]["arguments"] += piece.text
        news: dict[str, Any] = {"content": content} if content else {}
        if calls:
            news["tool_calls"] = list(calls.values())
        shows_tokens = bool(delta.tokens) and bool(self._plan.body.logprobs or self._plan.body.return_token_ids)
        if news or shows_tokens or delta.finish_reason or delta.routed_experts:
            chunks.append(self._render(delta, "delta", news, with_logprobs=bool(delta.tokens)))
        return chunks

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
    if body.max_tokens == 0:
        raise invalid("max_tokens", "must be at least 1, got 0")
    if body.continue_final_message and body.add_generation_prompt and "add_generation_prompt" in body.model_fields_set:
        raise InvalidRequest(
            "continue_final_message and add_generation_prompt exclude each other; set one of them to false",
            param="continue_final_message",
        )


def _call(name: str, arguments: str) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}


CHAT: TextEndpoint[ChatCompletionRequest, ChatPlan] = TextEndpoint(
    body=ChatCompletionRequest, id_prefix="chatcmpl-", plan=plan_chat, answer=chat, stream=chat_stream
)
