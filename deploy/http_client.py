"""A small HTTP client for the commands: JSON both ways and server-sent events, from the standard library alone."""

from __future__ import annotations

import contextlib
import json
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any

LOOPBACK = ("127.0.0.1", "::1", "localhost")
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy's loopback is not ours


class CallError(Exception):
    """The service refused, failed or is not there; the message is one line for a person. status 0: not reached."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, slots=True, kw_only=True)
class Client:
    """One service. url: as `serve` prints it, with or without a trailing /v1. direct: never through a proxy; nor are
    loopback addresses."""

    url: str
    api_key: str | None = None
    timeout_s: float = 600.0
    direct: bool = False

    def text(self, path: str) -> str:
        """The body of a GET. Raises CallError."""
        with self._open(path, None) as answer:
            return str(answer.read().decode())

    def get(self, path: str) -> Any:
        """Raises CallError."""
        return json.loads(self.text(path))

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """Raises CallError."""
        with self._open(path, body) as answer:
            return json.loads(answer.read() or b"null")

    def stream(self, path: str, body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """The data of each event, up to [DONE]. Leaving the iterator early ends the request. Raises CallError."""
        with self._open(path, {**body, "stream": True}) as answer:
            for line in answer:
                if not line.startswith(b"data:"):
                    continue
                data = line[5:].strip()
                if data == b"[DONE]":
                    return
                event = json.loads(data)
                if "error" in event:
                    raise CallError(event["error"].get("message", "the stream failed"), 500)
                yield event

    def first_model(self) -> str:
        """The model that is served first. Raises CallError."""
        return str(self.get("/v1/models")["data"][0]["id"])

    @contextlib.contextmanager
    def _open(self, path: str, body: Mapping[str, Any] | None) -> Iterator[Any]:
        headers = {"Accept": "application/json"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        data = None
        if body is not None:
            headers["Content-Type"] = "application/json"
            data = json.dumps(body).encode()
        base = self.url.rstrip("/").removesuffix("/v1")
        request = urllib.request.Request(base + path, data, headers)
        try:
            is_here = urllib.parse.urlsplit(base).hostname in (*LOOPBACK, "0.0.0.0", "::")
            open_url = _DIRECT.open if self.direct or is_here else urllib.request.urlopen
            with open_url(request, timeout=self.timeout_s) as answer:
                yield answer
        except urllib.error.HTTPError as error:
            raise CallError(_message(error), error.code) from None
        except (urllib.error.URLError, HTTPException, OSError) as error:
            reason = getattr(error, "reason", None) or error
            raise CallError(f"{base} does not answer: {reason}; is it up? (--url says where)") from None
        except ValueError as error:
            raise CallError(f"{base} is no address, or answers as expertmesh doesn't: {error}") from None


def _message(error: urllib.error.HTTPError) -> str:
    try:
        return str(json.loads(error.read())["error"]["message"])
    except (ValueError, KeyError, TypeError, OSError):
        return f"HTTP {error.code} {error.reason}"
