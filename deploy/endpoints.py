"""POST endpoints: each reads and checks its body, and answers whole or, where the body asks for it, as a stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from fastapi import FastAPI
from pydantic.json_schema import models_json_schema
from pydantic_core import from_json, to_json
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from deploy.errors import ApiError, BodyTooLarge, InvalidRequest, RequestTimeout, UnsupportedMedia
from deploy.generation import Delta, TextPlan, gather_all
from deploy.openai_requests import Body, RequestBody, StreamingBody, parse
from deploy.service import Service
from deploy.settings import LimitSettings
from deploy.sse import DONE, event, start_stream, whole_answer

StreamBody = TypeVar("StreamBody", bound=StreamingBody)
Plan = TypeVar("Plan", bound=TextPlan)


@dataclass(frozen=True, slots=True, kw_only=True)
class TextEndpoint(Generic[StreamBody, Plan]):
    """What sets one API that writes text apart from another. `answer` makes the whole answer of what came for each
    sequence; `end_with_error`: how its streams tell of an error."""

    body: type[StreamBody]
    id_prefix: str = ""
    plan: Callable[[Service, StreamBody, str], Awaitable[Plan]]
    answer: Callable[[Plan, list[Delta]], Any]
    stream: Callable[[Service, Plan], AsyncGenerator[bytes]]
    end_with_error: Callable[[ApiError], bytes] = lambda error: event(error.body()) + DONE

    async def serve(self, service: Service, request: Request, body: StreamBody) -> Response:
        plan = await self.plan(service, body, self.id_prefix + (body.request_id or request.state.request_id))
        if body.stream:
            time_s = service.settings.limits.request_timeout_s
            return await start_stream(request, self.stream(service, plan), self.end_with_error, time_s)
        return await whole_answer(request, self._whole(service, plan))

    async def _whole(self, service: Service, plan: Plan) -> bytes:
        deltas = await gather_all(service.pool, plan)
        return await service.write(lambda: to_json(self.answer(plan, deltas)), 4 * _num_logprobs(deltas))


def _num_logprobs(deltas: Iterable[Delta]) -> int:
    """That an answer may show; each takes some microseconds. All tokens of a sequence have as many."""
    num = 0
    for delta in deltas:
        if delta.prompt_logprobs:
            num += len(delta.prompt_logprobs) * len(delta.prompt_logprobs[-1] or ())
        if delta.tokens:
            num += len(delta.tokens) * len(delta.tokens[0].alternatives or ())
    return num


class Endpoints:
    """Adds routes to an app. They read their bodies themselves, so the app's OpenAPI document is told of them here."""

    def __init__(self, api: FastAPI, service: Service) -> None:
        self.api = api
        self.service = service
        self._bodies: dict[str, type[RequestBody]] = {}
        self._build_document = api.openapi
        api.openapi = self._document  # type: ignore[method-assign]

    def add(
        self, path: str, body: type[Body], work: Callable[[Request, Body], Awaitable[Response]], name: str | None = None
    ) -> None:
        """`name` is the route's in the document; by default the last part of the path."""
        self._bodies[path] = body

        @self.api.post(path, name=name or path.rpartition("/")[2], description=work.__doc__)
        async def endpoint(request: Request) -> Response:
            return await work(request, await self.read(request, body))

    def add_text(self, path: str, endpoint: TextEndpoint[StreamBody, Plan], name: str | None = None) -> None:
        async def work(request: Request, body: StreamBody) -> Response:
            return await endpoint.serve(self.service, request, body)

        self.add(path, endpoint.body, work, name)

    async def read(self, request: Request, body: type[Body]) -> Body:
        """The body, checked. Raises ApiError."""
        return parse(await read_json(request, self.service.settings.limits), body)

    def _document(self) -> dict[str, Any]:
        if self.api.openapi_schema is None:
            document = self._build_document()
            references, definitions = models_json_schema(
                [(model, "validation") for model in self._bodies.values()], ref_template="#/components/schemas/{model}"
            )
            schemas = document.setdefault("components", {}).setdefault("schemas", {})
            schemas.update(definitions.get("$defs", {}))
            for path, model in self._bodies.items():
                content = {"application/json": {"schema": references[model, "validation"]}}
                document["paths"][path]["post"]["requestBody"] = {"required": True, "content": content}
        assert self.api.openapi_schema is not None
        return self.api.openapi_schema


async def read_json(request: Request, limits: LimitSettings) -> Any:
    """The decoded body. Nesting is capped, and NaN, lone surrogates and giant numbers are refused by the parser.

    Raises BodyTooLarge, RequestTimeout, UnsupportedMedia or InvalidRequest."""
    max_bytes = limits.max_body_bytes
    media_type = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if media_type != "application/json" and not media_type.endswith("+json"):
        raise UnsupportedMedia(f"Content-Type {media_type[:80]!r} is not supported; send application/json")
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced[:20]) > max_bytes:
        raise _too_large(max_bytes)
    data = bytearray()
    try:
        async with asyncio.timeout(limits.request_timeout_s):
            async for piece in request.stream():
                data += piece
                if len(data) > max_bytes:
                    raise _too_large(max_bytes)
    except TimeoutError:
        raise RequestTimeout(f"the body did not end within {limits.request_timeout_s:g} s; send it again") from None
    except ClientDisconnect:
        raise InvalidRequest("the body ended early") from None
    try:
        return from_json(bytes(data), allow_inf_nan=False)
    except ValueError as error:
        raise InvalidRequest(f"the body is not JSON: {error}", code="invalid_json") from None


def _too_large(max_bytes: int) -> BodyTooLarge:
    return BodyTooLarge(f"the body is larger than this server's {max_bytes} bytes; send less")
