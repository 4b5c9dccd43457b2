"""The HTTP face: one FastAPI app over a pool of routers. No Ray here; whatever differs between deployments comes in.

Life of a request: `Front` gives it an id and checks its key; the endpoint reads and checks the body, renders and
tokenizes; the pool finds a router; deltas come back as JSON or as server-sent events.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass

from fastapi import FastAPI
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from actors.logs import REQUEST_ID
from deploy import anthropic, head_endpoints, mesh_endpoints, monitoring, operations, token_endpoints
from deploy.auth import OPEN_PATHS, ApiKeys, all_keys
from deploy.chat import CHAT
from deploy.completions import COMPLETIONS
from deploy.endpoints import Endpoints
from deploy.errors import ApiError, HttpError
from deploy.key_limits import KeyLimits
from deploy.listener import answering
from deploy.ray_metrics import RayMetrics
from deploy.router_pool import RouterPool
from deploy.served_model import ModelList, ServedModel
from deploy.service import VERSION, Service
from deploy.settings import Settings
from deploy.sse import error_answer
from deploy.supervisors import Supervisors
from deploy.tracing import CURRENT, RequestNote, Tracing, exporter_to

logger = logging.getLogger(__name__)
access = logging.getLogger("expertmesh.access")
_FREE_PATHS = OPEN_PATHS | {"/reset_prefix_cache", "/mesh/scale", "/load_model"}
_TOKEN_PATHS = frozenset({"/tokenize", "/detokenize", "/v1/messages/count_tokens"})  # work for this process alone
_REQUEST_ID = re.compile(r"[!-~]{1,128}")


def create_api(
    settings: Settings,
    models: Sequence[ServedModel],
    pool: RouterPool,
    *,
    supervisors: Supervisors | None = None,
    ray_metrics: RayMetrics | None = None,
    port_path: str | None = None,
    behind_serve: bool = False,
) -> FastAPI:
    """The app. It starts the pool with its lifespan, or with the first request, and closes it with its lifespan.

    Without `supervisors` it tells of the mesh what its links know, and counts for itself alone. With the
    path of `deploy.listener` it answers by itself from its lifespan on. behind_serve: Serve's proxy gives a request its
    id where it has none, and adds it to the answer."""
    service = Service(settings, ModelList(models), pool)
    exporter = exporter_to(settings.server.otlp_traces_endpoint)
    tracing = Tracing(exporter, VERSION) if exporter is not None else None

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await pool.start()
        publishing = asyncio.create_task(ray_metrics.repeat(service, supervisors)) if ray_metrics else None
        async with answering(api, port_path) if port_path else nullcontext():
            yield
        if publishing is not None:
            publishing.cancel()
        await pool.close()
        service.close()
        if tracing is not None:
            tracing.close()

    api = FastAPI(title="expertmesh", version=VERSION, lifespan=lifespan)
    api.state.service = service
    api.add_exception_handler(ApiError, _answer_error)
    api.add_exception_handler(HTTPException, _answer_error)
    keys = ApiKeys(all_keys(settings.server.api_keys, settings.server.api_key_file))
    ledger = supervisors if settings.server.num_ingresses > 1 else None
    sharing = monitoring.Sharing(pool.metrics, ledger)
    limits = KeyLimits(settings.limits, ledger)
    api.add_middleware(
        Front,
        service=service,
        keys=keys,
        limits=limits,
        sharing=sharing,
        tracing=tracing,
        behind_serve=behind_serve,
    )
    if settings.server.allowed_origins:
        api.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.server.allowed_origins),
            allow_methods=["*"],
            allow_headers=["*"],
        )
    endpoints = Endpoints(api, service)
    endpoints.add_text("/v1/completions", COMPLETIONS)
    endpoints.add_text("/v1/chat/completions", CHAT, "chat_completions")
    token_endpoints.add_to(endpoints)
    anthropic.add_to(endpoints)
    head_endpoints.add_to(endpoints)
    operations.add_to(endpoints)
    mesh_endpoints.add_to(api, service, supervisors)
    monitoring.add_to(api, service, supervisors, sharing)
    return api


@dataclass(frozen=True, slots=True)
class Front:
    """Every request passes here: an id, a key, a line in the log, and no exception gets past."""

    app: ASGIApp
    service: Service
    keys: ApiKeys
    limits: KeyLimits
    sharing: monitoring.Sharing
    tracing: Tracing | None
    behind_serve: bool

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        await self.service.pool.start()
        path, headers, began = scope["path"], Headers(scope=scope), time.monotonic()
        request_id = headers.get("x-request-id", "")
        if not _REQUEST_ID.fullmatch(request_id):
            request_id = uuid.uuid4().hex
        is_admitted = scope["method"] == "POST" and path not in _FREE_PATHS
        is_work = is_admitted and path not in _TOKEN_PATHS
        note = self.tracing.begin(path, headers, request_id) if self.tracing and is_work else RequestNote()
        REQUEST_ID.set(request_id)
        CURRENT.set(note)
        status = 0  # no answer has begun

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                answered = MutableHeaders(scope=message)
                if not (self.behind_serve and request_id == headers.get("x-request-id")):
                    answered["x-request-id"] = request_id
                if scope["path"].startswith("/v1/messages"):
                    answered["request-id"] = request_id  # where Anthropic's clients look
            await send(message)

        state = scope.setdefault("state", {})
        state["request_id"] = request_id
        try:
            client = self.keys.check(path, headers)
            async with self._admission(client, is_admitted=is_admitted, is_rated=is_work):
                await self.app(scope, receive, send_with_id)
        except Exception as error:
            if not isinstance(error, ApiError):
                logger.exception("the request failed")
                error = ApiError(f"The server failed on this request; its id in the logs is {request_id}.")
            state["error_code"] = error.code
            if status:
                raise error from None
            await error_answer(error, path)(scope, receive, send_with_id)
        finally:
            code = state.get("error_code")
            if status in (401, 429) or (status == 503 and is_admitted):
                self.service.pool.metrics.rejected.labels(code or "other").inc()
            note.end(status, code)
            if is_work or status >= 400:
                _log_access(scope, status, time.monotonic() - began, note)

    @asynccontextmanager
    async def _admission(self, client: str, *, is_admitted: bool, is_rated: bool) -> AsyncIterator[None]:
        """Requests with work are counted until their answer has ended; looking around is free."""
        if not is_admitted:
            yield
            return
        with self.service.admitted():
            try:
                async with self.limits.admitted(client, is_rated=is_rated):
                    yield
            finally:
                self.sharing.soon()


def _log_access(scope: Scope, status: int, seconds: float, note: RequestNote) -> None:
    path = scope["path"][:200].encode("unicode_escape").decode()
    fields = {"method": scope["method"], "path": path, "status": status, "seconds": round(seconds, 6)}
    if note.num_sequences:
        fields |= {"prompt_tokens": note.prompt_tokens, "output_tokens": note.output_tokens}
        fields["finish_reasons"] = note.finish_reasons[:16]
    access.info("%s %s %d in %.3f s", scope["method"], path, status, seconds, extra={"fields": fields})


async def _answer_error(request: Request, error: Exception) -> Response:
    """An endpoint's refusal, or the framework's own: no such path, no such method."""
    path = request.url.path
    headers: Mapping[str, str] = {}
    if isinstance(error, HTTPException):
        headers = error.headers or {}
        error = HttpError(error.status_code, f"{request.method} {path}: {error.detail}")
    assert isinstance(error, ApiError)
    request.state.error_code = error.code  # for `Front`
    answer = error_answer(error, path)
    answer.headers.update(headers)
    return answer
