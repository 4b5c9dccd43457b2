"""Answers over HTTP that notice when the client leaves: server-sent events and plain JSON.

A client that hangs up must stop its request at the router at once. Servers differ in how they say so (a message, a
cancellation, a failing send), so both answers here listen while they work.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from typing import Any, TypeVar

from pydantic_core import to_json
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from deploy.errors import ApiError

T = TypeVar("T")
logger = logging.getLogger(__name__)
DONE = b"data: [DONE]\n\n"
GRACE_S = 2.0  # for the event that says that a request's time is up
CLIENT_LEFT = 499  # nobody reads this; the status is nginx's, for access logs


def event(value: Any, name: str | None = None) -> bytes:
    """One server-sent event."""
    return (f"event: {name}\n".encode() if name else b"") + b"data: " + to_json(value) + b"\n\n"


class JsonAnswer(Response):
    """Bytes are JSON already."""

    media_type = "application/json"

    def __init__(self, content: Any, status_code: int = 200, headers: Mapping[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else to_json(content)
        super().__init__(data, status_code=status_code, headers=dict(headers or {}))


def error_answer(error: ApiError, path: str) -> JsonAnswer:
    """An error in the shape of the API that the path belongs to."""
    if path.startswith("/v1/messages"):
        body = error.anthropic_body()
    else:
        body = error.huggingface_body() if path.startswith("/hf/") else error.body()
    return JsonAnswer(body, error.status, error.headers())


class EventStream(Response):
    """Sends events as they come. An error after the start becomes an event, and the stream ends as it should.

    Events end within the request's time_s. A stream that is still written after that has a client that reads nothing,
    and gives its place up. Build with `start_stream`, which waits for the first event, so that early errors keep their
    HTTP status."""

    def __init__(
        self,
        first: bytes,
        rest: AsyncGenerator[bytes],
        end_with_error: Callable[[ApiError], bytes],
        time_s: float,
    ) -> None:
        self._first = first
        self._rest = rest
        self._end_with_error = end_with_error
        self._time_s = time_s
        self.status_code = 200
        self.background = None
        self.init_headers(
            {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        writing = asyncio.create_task(self._write(send))
        leaving = asyncio.create_task(_until_disconnect(receive))
        try:
            await asyncio.wait((writing, leaving), timeout=self._time_s + GRACE_S, return_when=asyncio.FIRST_COMPLETED)
        finally:
            leaving.cancel()
            writing.cancel()
            await asyncio.gather(writing, leaving, return_exceptions=True)
            await self._rest.aclose()

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self._first, "more_body": True})
        try:
            async for data in self._rest:
                await send({"type": "http.response.body", "body": data, "more_body": True})
        except (OSError, asyncio.CancelledError):
            raise  # the client has left
        except Exception as error:
            if not isinstance(error, ApiError):
                logger.exception("a stream failed")
                error = ApiError("The server failed in the middle of the answer.")
            await send({"type": "http.response.body", "body": self._end_with_error(error), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def start_stream(
    request: Request,
    events: AsyncGenerator[bytes],
    end_with_error: Callable[[ApiError], bytes],
    time_s: float,
) -> Response:
    """The response for a stream of events. Raises what the first event raises."""

    async def begin() -> bytes:
        return await anext(events)

    try:
        first = await _unless_client_leaves(request, begin())
    except BaseException:
        await events.aclose()
        raise
    if first is None:
        await events.aclose()
        return Response(status_code=CLIENT_LEFT)
    return EventStream(first, events, end_with_error, time_s)


async def whole_answer(request: Request, work: Coroutine[Any, Any, Any]) -> Response:
    """The result of the work as JSON. The work is cancelled when the client leaves; read the body before."""
    answer = await _unless_client_leaves(request, work)
    return Response(status_code=CLIENT_LEFT) if answer is None else JsonAnswer(answer)


async def _unless_client_leaves(request: Request, work: Coroutine[Any, Any, T]) -> T | None:
    working = asyncio.ensure_future(work)
    leaving = asyncio.create_task(_until_disconnect(request.receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        leaving.cancel()
        working.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _until_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
