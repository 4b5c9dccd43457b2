"""Messages of a chat as the templates want them: roles, text contents, tool calls with their arguments as objects."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from deploy.errors import InvalidRequest, invalid
from deploy.openai_requests import ChatCompletionRequest, TokenizeRequest
from deploy.served_model import ServedModel
from deploy.service import Service
from deploy.tool_parser import read_arguments
from deploy.tools import ToolUse

_FIELDS = frozenset({"role", "content", "name", "tool_calls", "tool_call_id", "refusal", "reasoning_content", "audio"})
# Clients send back what they got.
_IGNORED = frozenset({"function_call", "annotations", "parsed", "reasoning", "cache_control"})
_TEXT_PARTS = {"text": "text", "refusal": "refusal", "input_text": "text", "output_text": "text"}


def read_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Raises InvalidRequest that names the message and what is wrong with it."""
    return [_read_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


async def render(
    service: Service,
    model: ServedModel,
    body: ChatCompletionRequest | TokenizeRequest,
    messages: Sequence[Mapping[str, Any]],
    use: ToolUse,
) -> str:
    """The prompt of a chat, whose messages have been read. Raises InvalidRequest for what the template refuses."""
    template = model.tokenizer.chat_template
    if template is None:
        raise InvalidRequest(f"model {model.names[0]!r} has no chat template; use /v1/completions", param="messages")
    if body.continue_final_message and messages[-1]["role"] != "assistant":
        raise invalid("continue_final_message", "the last message must be the assistant's")
    tools = list(use.tools)
    if not template.takes_tools():
        messages = calls_as_text(messages)
        messages, tools = with_preamble(messages, use.preamble()) if tools else messages, []
    limits = service.settings.limits

    def work() -> str:
        return template.render(
            messages,
            tools=tools or None,
            add_generation_prompt=body.add_generation_prompt and not body.continue_final_message,
            continue_final_message=body.continue_final_message,
            variables=body.chat_template_kwargs,
            max_chars=limits.max_template_chars,
            timeout_s=limits.template_timeout_s,
        )

    num_chars = sum(len(message.get("content") or "") + 64 for message in messages) + 256 * len(tools)
    try:
        return await service.read(work, num_chars)
    except ValueError as error:
        raise InvalidRequest(str(error), param="messages") from None


def calls_as_text(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The messages with calls and results inside their contents, as Qwen2.5's template writes them: templates that take
    no tools leave them out."""
    told: list[Mapping[str, Any]] = []
    for role, group in itertools.groupby(messages, lambda message: message["role"]):
        if role == "tool":
            results = (f"<tool_response>\n{message['content']}\n</tool_response>" for message in group)
            told.append({"role": "user", "content": "\n".join(results)})
            continue
        for message in group:
            kept = dict(message)
            functions = [json.dumps(call["function"], ensure_ascii=False) for call in kept.pop("tool_calls", ())]
            texts = [kept["content"], *(f"<tool_call>\n{function}\n</tool_call>" for function in functions)]
            told.append({**kept, "content": "\n".join(filter(None, texts))})
    return told


def with_preamble(messages: Sequence[Mapping[str, Any]], preamble: str) -> list[Mapping[str, Any]]:
    """The messages with the preamble at the end of the system's message, or as one."""
    if messages[0]["role"] == "system":
        first = messages[0]
        return [{**first, "content": f"{first['content']}\n\n{preamble}"}, *messages[1:]]
    return [{"role": "system", "content": preamble}, *messages]


def _read_message(message: Mapping[str, Any], where: str) -> dict[str, Any]:
    role = message.get("role")
    if role not in ("system", "developer", "user", "assistant", "tool"):
        raise invalid(f"{where}.role", f"{str(role)[:80]!r} is not system, developer, user, assistant or tool")
    if unknown := sorted(message.keys() - _FIELDS - _IGNORED):
        raise invalid(where, f"unknown field {unknown[0][:80]!r}")
    for name in ("audio", "function_call"):
        if message.get(name) is not None:
            raise invalid(f"{where}.{name}", "not supported; use text and tool_calls")
    content = message.get("content")
    if content is None and role != "assistant":
        raise invalid(f"{where}.content", "this field is required")
    read: dict[str, Any] = {
        "role": "system" if role == "developer" else role,  # the newer word for it; templates know the older
        "content": "" if content is None else _text(content, f"{where}.content"),
    }
    for name in ("name", "tool_call_id", "reasoning_content"):
        if message.get(name) is not None:
            if not isinstance(message[name], str):
                raise invalid(f"{where}.{name}", "expected a string")
            read[name] = message[name]
    if message.get("tool_calls") is not None:
        if role != "assistant" or not isinstance(message["tool_calls"], list):
            raise invalid(f"{where}.tool_calls", "a list in an assistant's message")
        read["tool_calls"] = [
            _tool_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(message["tool_calls"])
        ]
    return read


def _text(content: Any, where: str) -> str:
    """A string, or the text parts of a list, a line each."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise invalid(where, "expected a string or a list of text parts")
    texts = []
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get(_TEXT_PARTS.get(str(kind), "")) if isinstance(part, dict) else None
        if not isinstance(text, str):
            raise invalid(
                f"{where}[{i}]", f"a part of type {str(kind)[:80]!r} is not supported; these models read text only"
            )
        texts.append(text)
    return "\n".join(texts)


def _tool_call(call: Any, where: str) -> dict[str, Any]:
    """An earlier call, with its arguments parsed: templates print them as JSON again. A broken text, which a model may
    have written, is passed on as it is."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise InvalidRequest(f"{where}.function: an object with a name is required", param=where)
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        arguments = read_arguments(arguments)
    elif not isinstance(arguments, dict):
        raise InvalidRequest(f"{where}.function.arguments: expected a JSON object as a string", param=where)
    return {
        "id": str(call.get("id") or ""),
        "type": "function",
        "function": {"name": function["name"], "arguments": arguments},
    }
