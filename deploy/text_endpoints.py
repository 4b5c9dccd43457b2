"""Routes of the endpoints that write text."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

from deploy.body import read_json
from deploy.chat import chat, chat_stream, plan_chat
from deploy.completions import complete, complete_stream, plan_completion
from deploy.openai_requests import ChatCompletionRequest, CompletionRequest, GenerationBody, parse
from deploy.service import Service
from deploy.sse import JsonAnswer, client_left, start_stream, until_disconnect

Body = TypeVar("Body", bound=GenerationBody)
Plan = TypeVar("Plan")


def add_to(api: FastAPI, service: Service) -> None:
    @api.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await _serve(request, service, CompletionRequest, "cmpl", plan_completion, complete, complete_stream)

    @api.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await _serve(request, service, ChatCompletionRequest, "chatcmpl", plan_chat, chat, chat_stream)


async def _serve(
    request: Request,
    service: Service,
    body_type: type[Body],
    prefix: str,
    plan: Callable[[Service, Body, str], Awaitable[Plan]],
    answer: Callable[[Service, Plan], Any],
    stream: Callable[[Service, Plan], AsyncIterator[bytes]],
) -> Response:
    """Read, plan, run: the same for each endpoint."""
    body = parse(await read_json(request, service.settings.limits.max_body_bytes), body_type)
    planned = await plan(service, body, f"{prefix}-{body.request_id or request.state.request_id}")
    if body.stream:
        return await start_stream(request, stream(service, planned))
    result = await until_disconnect(request, answer(service, planned))
    return client_left() if result is None else JsonAnswer(result)
