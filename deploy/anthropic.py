"""Anthropic's /v1/messages: the same chats in another shape. Requests become chats, answers become content blocks."""

from __future__ import annotations

import contextlib
import json
import uuid
from collections.abc import AsyncGenerator, Mapping
from typing import Any

from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from deploy.chat import ChatPlan, plan_chat
from deploy.chat_messages import read_messages, render
from deploy.endpoints import Endpoints, TextEndpoint
from deploy.errors import InvalidRequest, invalid
from deploy.generation import Delta, stream_all
from deploy.openai_requests import INT64_MAX, ChatCompletionRequest, ListOf, RequestBody, StreamingBody, parse
from deploy.service import Service
from deploy.sse import event, whole_answer
from deploy.tool_parser import CallArguments, CallStart, Piece, parser_for, read_whole
from deploy.tools import read_tool_use

_STOP_REASONS = {"stop": "end_turn", "length": "max_tokens"}
_TOOL_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


class CountTokensRequest(RequestBody):
    """What both endpoints read."""

    model: str | None = None
    messages: ListOf[dict[str, Any]] = Field(min_length=1, max_length=100_000)
    system: str | ListOf[dict[str, Any]] | None = None
    tools: ListOf[dict[str, Any]] | None = None
    tool_choice: dict[str, Any] | None = None
    output_config: dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None  # vLLM's


class MessagesRequest(CountTokensRequest, StreamingBody):
    max_tokens: int = Field(ge=1, le=INT64_MAX)
    stop_sequences: ListOf[str] | None = None
    temperature: float | None = Field(default=None, ge=0, le=1)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=0, le=INT64_MAX)


def add_to(endpoints: Endpoints) -> None:
    async def count_tokens(request: Request, body: CountTokensRequest) -> Response:
        return await whole_answer(request, _count_tokens(endpoints.service, body))

    endpoints.add_text("/v1/messages", MESSAGES)
    endpoints.add("/v1/messages/count_tokens", CountTokensRequest, count_tokens)


def to_chat(body: CountTokensRequest) -> ChatCompletionRequest:
    """The same request as a chat. Raises InvalidRequest."""
    messages: list[dict[str, Any]] = []
    if body.system is not None:
        messages.append({"role": "system", "content": _texts(body.system, "system")})
    for i, message in enumerate(body.messages):
        messages += _messages(message, f"messages[{i}]")
    chat: dict[str, Any] = {
        "model": body.model,
        "messages": messages,
        "chat_template_kwargs": body.chat_template_kwargs,
        "tools": [_tool(tool, f"tools[{i}]") for i, tool in enumerate(body.tools or [])] or None,
        **_tool_choice(body.tool_choice),
        **_output_format(body.output_config),
    }
    if messages[-1]["role"] == "assistant" and not messages[-1].get("tool_calls"):
        chat["continue_final_message"] = True  # Anthropic's prefill
    if isinstance(body, MessagesRequest):
        chat |= body.model_dump(include={"max_tokens", "temperature", "top_p", "top_k"}) | {"stop": body.stop_sequences}
    return parse(chat, ChatCompletionRequest)


def _messages(message: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """One message becomes several: each tool result is a message of its own in a chat."""
    role, content = message.get("role"), message.get("content")
    if role not in ("user", "assistant", "system"):
        raise invalid(f"{where}.role", f"{str(role)[:80]!r} is not user, assistant or system")
    if isinstance(content, str):
        return [{"role": role, "content": content}]
    if not isinstance(content, list):
        raise invalid(f"{where}.content", "expected a string or a list of blocks")
    results, texts, calls = [], [], []
    for i, block in enumerate(content):
        kind = block.get("type") if isinstance(block, dict) else None
        place = f"{where}.content[{i}]"
        if kind == "text":
            texts.append(_texts([block], place))
        elif kind == "tool_use" and role == "assistant":
            function = {"name": block.get("name"), "arguments": json.dumps(block.get("input") or {})}
            calls.append({"id": block.get("id"), "type": "function", "function": function})
        elif kind == "tool_result" and role == "user":
            text = _texts(block.get("content") or "", f"{place}.content")
            text = f"Error: {text}" if block.get("is_error") else text
            results.append({"role": "tool", "tool_call_id": str(block.get("tool_use_id") or ""), "content": text})
        elif kind not in ("thinking", "redacted_thinking") or role != "assistant":  # another model's earlier thoughts
            raise invalid(place, f"{role}'s blocks of type {str(kind)[:80]!r} are not supported; use text and tools")
    said = [{"role": role, "content": "\n".join(texts)}] if texts or calls or not results else []
    if calls:
        said[0]["tool_calls"] = calls
    return [*results, *said]


def _texts(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise invalid(where, "expected a string or a list of text blocks")
    texts = []
    for block in content:
        if not isinstance(block, dict) or block.get("type") != "text" or not isinstance(block.get("text"), str):
            raise invalid(where, "only text blocks are supported here")
        texts.append(block["text"])
    return "\n".join(texts)


def _tool(tool: Mapping[str, Any], where: str) -> dict[str, Any]:
    if tool.get("type", "custom") != "custom":
        raise InvalidRequest(
            f"{where}.type: {str(tool['type'])[:80]!r} runs at Anthropic; define a custom tool", param=where
        )
    function = {"name": tool.get("name"), "parameters": tool.get("input_schema"), "strict": tool.get("strict")}
    if tool.get("description") is not None:
        function["description"] = tool["description"]
    return {"type": "function", "function": function}


def _tool_choice(choice: Mapping[str, Any] | None) -> dict[str, Any]:
    if choice is None:
        return {}
    kind = choice.get("type")
    if kind == "tool":
        found: Any = {"type": "function", "function": {"name": choice.get("name")}}
    elif isinstance(kind, str) and kind in _TOOL_CHOICES:
        found = _TOOL_CHOICES[kind]
    else:
        raise InvalidRequest("tool_choice.type: use auto, any, tool or none", param="tool_choice")
    return {"tool_choice": found, "parallel_tool_calls": not choice.get("disable_parallel_tool_use")}


def _output_format(config: Mapping[str, Any] | None) -> dict[str, Any]:
    if not config:
        return {}
    given = config.get("format")
    if set(config) != {"format"} or not isinstance(given, dict) or given.get("type") != "json_schema":
        raise invalid("output_config", "only format with type json_schema is supported")
    schema = {"name": "output", "schema": given.get("schema")}
    return {"response_format": {"type": "json_schema", "json_schema": schema}}


def _answer(plan: ChatPlan, deltas: list[Delta]) -> dict[str, Any]:
    (delta,) = deltas
    text, calls = read_whole(plan.use, delta.text)
    blocks: list[dict[str, Any]] = [{"type": "text", "text": text}] if text or not calls else []
    for name, arguments in calls:
        try:
            blocks.append(_tool_block(name, json.loads(arguments)))
        except ValueError:
            blocks.append(_tool_block(name, {}))  # cut off by max_tokens, as stop_reason says
    return {**_head(plan, delta), "content": blocks, **_end(delta, has_calls=bool(calls))}


async def _stream(service: Service, plan: ChatPlan) -> AsyncGenerator[bytes]:
    blocks = _Blocks()
    parser = parser_for(plan.use)
    is_first, num_cached = True, 0
    async with contextlib.aclosing(stream_all(service.pool, plan)) as deltas:
        async for delta in deltas:
            if is_first:
                is_first, num_cached = False, delta.num_cached_tokens
                yield _event("message_start", message={**_head(plan, delta), "content": []})
            pieces = parser.feed(delta.text)
            if delta.finish_reason is not None:
                pieces += parser.finish()
            for piece in pieces:
                for one in blocks.show(piece):
                    yield one
    for one in blocks.close():
        yield one
    end = _end(delta, has_calls=blocks.has_calls)
    usage = _usage(plan, delta.num_tokens, num_cached)
    yield _event("message_delta", delta=end, usage=usage)
    yield _event("message_stop")


async def _count_tokens(service: Service, body: CountTokensRequest) -> dict[str, int]:
    """Also of what doesn't fit the context: clients ask to learn just that."""
    chat = to_chat(body)
    model = service.models.find_generator(chat.model)
    use = read_tool_use(chat.tools, chat.tool_choice, is_parallel=chat.parallel_tool_calls is not False)
    prompt = await render(service, model, chat, read_messages(chat.messages), use)
    return {"input_tokens": len(await service.encode(model, prompt, add_special_tokens=chat.add_special_tokens))}


async def _plan(service: Service, body: MessagesRequest, answer_id: str) -> ChatPlan:
    return await plan_chat(service, to_chat(body), answer_id)


MESSAGES: TextEndpoint[MessagesRequest, ChatPlan] = TextEndpoint(
    body=MessagesRequest,
    id_prefix="msg_",
    plan=_plan,
    answer=_answer,
    stream=_stream,
    end_with_error=lambda error: event(error.anthropic_body(), "error"),
)


class _Blocks:
    """Numbers the content blocks of a stream, and opens and closes them."""

    def __init__(self) -> None:
        self.has_calls = False
        self._index = -1
        self._open: int | str | None = None  # "text", or the index of the open call

    def show(self, piece: Piece) -> list[bytes]:
        if isinstance(piece, CallArguments):
            return [self._delta({"type": "input_json_delta", "partial_json": piece.text})]
        if isinstance(piece, CallStart):
            self.has_calls = True
            return [*self.close(), self._begin(piece.index, _tool_block(piece.name, {}))]
        begun = [] if self._open == "text" else [*self.close(), self._begin("text", {"type": "text", "text": ""})]
        return [*begun, self._delta({"type": "text_delta", "text": piece.text})]

    def close(self) -> list[bytes]:
        if self._open is None:
            return []
        self._open = None
        return [_event("content_block_stop", index=self._index)]

    def _begin(self, what: int | str, block: dict[str, Any]) -> bytes:
        self._open = what
        self._index += 1
        return _event("content_block_start", index=self._index, content_block=block)

    def _delta(self, delta: dict[str, Any]) -> bytes:
        return _event("content_block_delta", index=self._index, delta=delta)


def _event(kind: str, **values: Any) -> bytes:
    return event({"type": kind, **values}, kind)


def _tool_block(name: str, arguments: Any) -> dict[str, Any]:
    return {"type": "tool_use", "id": f"toolu_{uuid.uuid4().hex[:24]}", "name": name, "input": arguments}


def _head(plan: ChatPlan, delta: Delta) -> dict[str, Any]:
    return {
        "id": plan.head["id"],
        "type": "message",
        "role": "assistant",
        "model": plan.head["model"],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": _usage(plan, delta.num_tokens, delta.num_cached_tokens),
    }


def _end(delta: Delta, *, has_calls: bool) -> dict[str, Any]:
    if isinstance(delta.stop_reason, str):
        return {"stop_reason": "stop_sequence", "stop_sequence": delta.stop_reason}
    reason = _STOP_REASONS.get(delta.finish_reason or "", "end_turn")
    return {"stop_reason": "tool_use" if has_calls and reason == "end_turn" else reason, "stop_sequence": None}


def _usage(plan: ChatPlan, num_output: int, num_cached: int) -> dict[str, int]:
    """Anthropic counts what came from the cache apart."""
    return {
        "input_tokens": len(plan.requests[0].prompt_ids) - num_cached,
        "output_tokens": num_output,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": num_cached,
    }
