"""The HTTP face: one FastAPI app over a pool of routers. No Ray here; whatever differs between deployments comes in.

Life of a request: `Front` gives it an id and checks its key; the endpoint reads and checks the body, renders and
tokenizes; the pool finds a router; deltas come back as JSON or as server-sent events.
"""

from __future__ import annotations

import logging
import re
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deploy import (
    anthropic,
    head_endpoints,
    mesh_endpoints,
    monitoring,
    operations,
    text_endpoints,
    token_endpoints,
    transformers_chat,
)
from deploy.api_schema import describe_bodies
from deploy.auth import ApiKeys, all_keys
from deploy.errors import ApiError, HttpError
from deploy.key_limits import KeyLimits, SharedLedger
from deploy.openai_requests import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    RequestBody,
    TokenizeRequest,
)
from deploy.router_pool import RouterPool
from deploy.served_model import ModelList, ServedModel
from deploy.service import Service
from deploy.settings import Settings
from deploy.sse import error_answer

logger = logging.getLogger(__name__)
MeshInfo = Callable[[], Awaitable[dict[str, Any]]]
_BODIES: dict[str, type[RequestBody]] = {
    "/v1/completions": CompletionRequest,
    "/v1/chat/completions": ChatCompletionRequest,
    "/v1/messages": anthropic.MessagesRequest,
    "/v1/messages/count_tokens": anthropic.CountTokensRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
    "/load_model": transformers_chat.LoadModelRequest,
}
_FREE_PATHS = frozenset({"/ping", "/tokenize", "/detokenize", "/reset_prefix_cache", "/mesh/scale", "/load_model"})
_REQUEST_ID = re.compile(r"[!-~]{1,128}")


def create_api(
    settings: Settings,
    models: Sequence[ServedModel],
    pool: RouterPool,
    *,
    mesh_info: MeshInfo | None = None,
    mesh_scale: mesh_endpoints.Scale | None = None,
    ledger: SharedLedger | None = None,
    version: str = "0.1.0",
    now: Callable[[], float] = time.time,
) -> FastAPI:
    """The app. It starts the pool with its lifespan, or with the first request, and closes it with its lifespan.

    `mesh_info` answers GET /mesh; without it the app tells what its links know. `mesh_scale` carries out POST
    /mesh/scale. `ledger` is shared with the other
    ingresses; without it this one is alone."""
    service = Service(settings, ModelList(models), pool, version, now)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await pool.start()
        yield
        await pool.close()
        service.close()

    api = FastAPI(title="expertmesh", version=version, lifespan=lifespan)
    api.state.service = service
    api.add_exception_handler(ApiError, _answer_api_error)
    api.add_exception_handler(HTTPException, _answer_http_exception)
    keys = ApiKeys(all_keys(settings.server.api_keys, settings.server.api_key_file))
    ledger = ledger if settings.server.num_ingresses > 1 else None
    sharing = monitoring.Sharing(pool.metrics, ledger)
    limits = KeyLimits(settings.limits, ledger)
    api.add_middleware(Front, service=service, keys=keys, limits=limits, sharing=sharing)
    if settings.server.allowed_origins:
        api.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.server.allowed_origins),
            allow_methods=["*"],
            allow_headers=["*"],
        )
    text_endpoints.add_to(api, service)
    token_endpoints.add_to(api, service)
    anthropic.add_to(api, service)
    head_endpoints.add_to(api, service)
    transformers_chat.add_to(api, service)
    operations.add_to(api, service, mesh_info)
    mesh_endpoints.add_to(api, service, mesh_scale)
    monitoring.add_to(api, service, mesh_info, sharing)
    describe_bodies(api, _BODIES | head_endpoints.BODIES)
    return api


class Front:
    """Every request passes here: an id, a key, and no exception gets past."""

    def __init__(
        self, app: ASGIApp, service: Service, keys: ApiKeys, limits: KeyLimits, sharing: monitoring.Sharing
    ) -> None:
        self._app = app
        self._service = service
        self._keys = keys
        self._limits = limits
        self._sharing = sharing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        await self._service.pool.start()
        headers = Headers(scope=scope)
        request_id = headers.get("x-request-id", "")
        if not _REQUEST_ID.fullmatch(request_id):
            request_id = uuid.uuid4().hex
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        state = scope.setdefault("state", {})
        state["request_id"] = request_id
        try:
            client = self._keys.check(scope["path"], headers)
            async with self._admission(scope, client, request_id):
                await self._app(scope, receive, send_with_id)
        except Exception as error:
            if not isinstance(error, ApiError):
                logger.exception("request %s failed", request_id)
                error = ApiError(f"The server failed on this request; its id in the logs is {request_id}.")
            if error.status in (401, 429, 503):
                self._service.pool.metrics.rejected.labels(error.code or "other").inc()
            if started:
                raise
            await error_answer(error, scope["path"])(scope, receive, send_with_id)

    @asynccontextmanager
    async def _admission(self, scope: Scope, client: str, request_id: str) -> AsyncIterator[None]:
        """Requests for the mesh are counted until their answer has ended; looking around is free."""
        if scope["method"] != "POST" or scope["path"] in _FREE_PATHS:
            yield
            return
        with self._service.admitted():
            try:
                async with self._limits.admitted(client, request_id):
                    yield
            finally:
                self._sharing.soon()


async def _answer_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error_answer(error, request.url.path)


async def _answer_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    answer = error_answer(
        HttpError(error.status_code, f"{request.method} {request.url.path}: {error.detail}"), request.url.path
    )
    for name, value in (error.headers or {}).items():
        answer.headers[name] = value
    return answer
