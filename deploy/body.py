"""Reads a request's JSON body, whatever a client puts into it."""

from __future__ import annotations

from typing import Any

from pydantic_core import from_json
from starlette.requests import ClientDisconnect, Request

from deploy.errors import BodyTooLarge, InvalidRequest, UnsupportedMedia


async def read_json(request: Request, max_bytes: int) -> Any:
    """The decoded body. Nesting is capped, and NaN, lone surrogates and giant numbers are refused by the parser.

    Raises BodyTooLarge, UnsupportedMedia or InvalidRequest."""
    media_type = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if media_type != "application/json" and not media_type.endswith("+json"):
        raise UnsupportedMedia(f"Content-Type {media_type[:80]!r} is not supported; send application/json")
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced[:20]) > max_bytes:
        raise _too_large(max_bytes)
    data = bytearray()
    try:
        async for piece in request.stream():
            data += piece
            if len(data) > max_bytes:
                raise _too_large(max_bytes)
    except ClientDisconnect:
        raise InvalidRequest("the body ended early") from None
    try:
        return from_json(bytes(data), allow_inf_nan=False)
    except ValueError as error:
        raise InvalidRequest(f"the body is not JSON: {error}", code="invalid_json") from None


def _too_large(max_bytes: int) -> BodyTooLarge:
    return BodyTooLarge(f"the body is larger than this server's {max_bytes} bytes; send less")
