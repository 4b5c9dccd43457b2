"""The endpoints that write text: read the body, plan, and answer whole or as a stream."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

from deploy.body import read_json
from deploy.chat import ChatPlan, chat, chat_stream, plan_chat
from deploy.completions import CompletionPlan, complete, complete_stream, plan_completion
from deploy.errors import ApiError
from deploy.openai_requests import ChatCompletionRequest, CompletionRequest, StreamingBody, parse
from deploy.service import Service
from deploy.sse import DONE, JsonAnswer, client_left, event, start_stream, until_disconnect

Body = TypeVar("Body", bound=StreamingBody)
Plan = TypeVar("Plan")


@dataclass(frozen=True, slots=True, kw_only=True)
class TextEndpoint(Generic[Body, Plan]):
    """What sets one API apart from another. `end_with_error` says how its streams tell of an error."""

    body: type[Body]
    id_prefix: str
    plan: Callable[[Service, Body, str], Awaitable[Plan]]
    answer: Callable[[Service, Plan], Coroutine[Any, Any, dict[str, Any]]]
    stream: Callable[[Service, Plan], AsyncGenerator[bytes]]
    end_with_error: Callable[[ApiError], bytes] = lambda error: event(error.body()) + DONE

    async def serve(self, request: Request, service: Service) -> Response:
        body = parse(await read_json(request, service.settings.limits.max_body_bytes), self.body)
        plan = await self.plan(service, body, self.id_prefix + (body.request_id or request.state.request_id))
        if body.stream:
            return await start_stream(request, self.stream(service, plan), self.end_with_error)
        answer = await until_disconnect(request, self.answer(service, plan))
        return client_left() if answer is None else JsonAnswer(answer)


COMPLETIONS: TextEndpoint[CompletionRequest, CompletionPlan] = TextEndpoint(
    body=CompletionRequest, id_prefix="cmpl-", plan=plan_completion, answer=complete, stream=complete_stream
)
CHAT: TextEndpoint[ChatCompletionRequest, ChatPlan] = TextEndpoint(
    body=ChatCompletionRequest, id_prefix="chatcmpl-", plan=plan_chat, answer=chat, stream=chat_stream
)


def add_to(api: FastAPI, service: Service) -> None:
    @api.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await COMPLETIONS.serve(request, service)

    @api.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await CHAT.serve(request, service)
