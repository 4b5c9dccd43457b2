"""How every part writes its log: lines of text, or with `json` one object a line. Neither holds a prompt or an answer.

    {"time": "2026-11-22T20:41:34.120Z", "level": "info", "part": "ingress", "logger": "expertmesh.access",
     "message": "POST /v1/completions 200 in 0.104 s", "request_id": "abc-1", "prompt_tokens": 3, "output_tokens": 16}

Routers know a request as `<request_id>-<32 hex digits>`, one for each sequence of it.
"""

from __future__ import annotations

import json
import logging
import sys
import time
import traceback
from contextvars import ContextVar
from typing import Literal, TextIO

LogFormat = Literal["text", "json"]
REQUEST_ID: ContextVar[str] = ContextVar("request_id", default="")  # of the request that is being served
OURS = ("expertmesh", "deploy")


def start_logging(part: str, log_format: LogFormat, stream: TextIO | None = None) -> None:
    """Call once in each process, first of all. Lines go to stderr, which Ray keeps in the node's log directory."""
    handler = logging.StreamHandler(stream or sys.__stderr__)  # Serve puts its own log in the place of sys.stderr
    handler.setFormatter(_Json(part) if log_format == "json" else _Text(part))
    logging.getLogger().handlers[:] = [handler]
    for name in OURS:
        logging.getLogger(name).setLevel(logging.INFO)


class _Line(logging.Formatter):
    def __init__(self, part: str) -> None:
        super().__init__()
        self._part = part

    def formatException(self, ei: object) -> str:
        """Where it happened and its kind, but not its message: that may quote what a client sent."""
        assert isinstance(ei, tuple)
        return "".join(traceback.format_tb(ei[2])) + (ei[0].__name__ if ei[0] is not None else "")


class _Text(_Line):
    def format(self, record: logging.LogRecord) -> str:
        stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.created))
        request_id = f" [{REQUEST_ID.get()}]" if REQUEST_ID.get() else ""
        line = f"{stamp} {record.levelname:7} {self._part} {record.name}{request_id}: {record.getMessage()}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class _Json(_Line):
    def format(self, record: logging.LogRecord) -> str:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03}Z"
        line = {
            "time": stamp,
            "level": record.levelname.lower(),
            "part": self._part,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if REQUEST_ID.get():
            line["request_id"] = REQUEST_ID.get()
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line)
