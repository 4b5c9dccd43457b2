"""Everything the HTTP API answers instead of a result.

    ApiError
    ├── InvalidRequest          400  what the client sent is wrong; `param` names the field
    │   └── ContextTooLong      400  context_length_exceeded
    ├── InvalidApiKey           401
    ├── ModelNotFound           404
    ├── RequestTimeout          408  the body didn't come in time
    ├── BodyTooLarge            413
    ├── UnsupportedMedia        415
    ├── TooManyRequests         429  this client has too many requests at once
    ├── Unavailable             503  the service can't take the request now; Retry-After says when to come back
    ├── DeadlineExceeded        504
    └── EngineError             5xx or 4xx, as the router says

The body is OpenAI's: {"error": {"message", "type", "param", "code"}}.
"""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

MAX_MESSAGE_CHARS = 600
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


class ApiError(Exception):
    """An error with an HTTP status and the four fields of OpenAI's error object."""

    status = 500
    code: str | None = "internal_error"
    retry_after_s: float | None = None

    def __init__(
        self, message: str, *, param: str | None = None, code: str | None = None, retry_after_s: float | None = None
    ):
        super().__init__(message)
        self.message = bounded(message)
        self.param = param
        self.code = code if code is not None else self.code
        self.retry_after_s = retry_after_s if retry_after_s is not None else self.retry_after_s

    @property
    def type(self) -> str:
        if self.status == 429:
            return "rate_limit_error"
        return "server_error" if self.status >= 500 else "invalid_request_error"

    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def anthropic_body(self) -> dict[str, Any]:
        """The same error as Anthropic's clients expect it."""
        kind = _ANTHROPIC_TYPES.get(self.status, "api_error" if self.status >= 500 else "invalid_request_error")
        return {"type": "error", "error": {"type": kind, "message": self.message}}

    def huggingface_body(self) -> dict[str, Any]:
        """The same error in the shape of text-generation-inference, which huggingface_hub reads."""
        kind = "overloaded" if self.status in (429, 503) else "generation" if self.status >= 500 else "validation"
        return {"error": self.message, "error_type": kind}

    def headers(self) -> dict[str, str]:
        return {} if self.retry_after_s is None else {"Retry-After": str(max(1, round(self.retry_after_s)))}


class InvalidRequest(ApiError):
    status = 400
    code: str | None = None


class ContextTooLong(InvalidRequest):
    code = "context_length_exceeded"


class InvalidApiKey(ApiError):
    status, code = 401, "invalid_api_key"

    def headers(self) -> dict[str, str]:
        return {"WWW-Authenticate": "Bearer"}


class ModelNotFound(ApiError):
    status, code = 404, "model_not_found"


class RequestTimeout(ApiError):
    status, code = 408, "request_timeout"

    def headers(self) -> dict[str, str]:
        return {"Connection": "close"}  # the rest of the body may still come


class BodyTooLarge(ApiError):
    status, code = 413, "body_too_large"


class UnsupportedMedia(ApiError):
    status, code = 415, "unsupported_media_type"


class TooManyRequests(ApiError):
    status, code, retry_after_s = 429, "rate_limit_exceeded", 1.0


class Unavailable(ApiError):
    status, code, retry_after_s = 503, "service_unavailable", 1.0


class DeadlineExceeded(ApiError):
    status, code = 504, "deadline_exceeded"


class EngineError(ApiError):
    """An error that a router reported in place of a result."""

    def __init__(self, status: int, code: str, message: str):
        super().__init__(message, code=code, retry_after_s=1.0 if status in (429, 503) else None)
        self.status = status


class HttpError(ApiError):
    """What the framework itself refuses: no such path, no such method."""

    def __init__(self, status: int, message: str):
        super().__init__(message, code={404: "not_found", 405: "method_not_allowed"}.get(status))
        self.status = status


def invalid(param: str | None, rule: str, *, code: str | None = None) -> InvalidRequest:
    """One field is wrong: the message begins with its name."""
    return InvalidRequest(f"{param}: {rule}", param=param, code=code)


def bounded(message: str) -> str:
    """At most MAX_MESSAGE_CHARS, and printable whatever a client put into it."""
    message = message.encode("utf-8", "replace").decode("utf-8")
    return message if len(message) <= MAX_MESSAGE_CHARS else message[: MAX_MESSAGE_CHARS - 1] + "…"


def from_validation(error: ValidationError) -> InvalidRequest:
    """The first of pydantic's complaints as one sentence that names the field, the value and the rule."""
    first = error.errors(include_url=False, include_context=False)[0]
    # Locations of unions carry the names of the members tried; a field path is enough for a client.
    path = [str(part) for part in first["loc"] if isinstance(part, int) or str(part).isidentifier()]
    param = ".".join(path)[:200] or None
    shown = repr(first.get("input"))
    shown = shown if len(shown) <= 80 else shown[:77] + "..."
    rule = first["msg"].removeprefix("Value error, ")
    if first["type"] == "missing":
        return invalid(param, "this field is required", code="missing_required_parameter")
    return invalid(param, rule if first["type"] == "value_error" else f"{rule} (got {shown})")
