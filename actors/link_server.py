"""The router's end of the wire to the ingresses: an asyncio TCP server on a loop and a thread of its own.

The engine's thread hands over what a step brought and goes on; turning it into JSON and writing it happens here.
An ingress that stops reading is cut off before its backlog fills the memory: it will come back and replay. One that
only reads slowly is not.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import itertools
import json
import logging
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from actors.engine import Engine
from actors.request import MAX_LINE_BYTES, Chunk, GenerateRequest, error_chunk, request_from_wire
from model.sampling_params import StructuredSpec
from model.structured import GrammarCompiler, Matcher

log = logging.getLogger("expertmesh.link")

HELLO_S = 5.0
LOAD_EVERY_S = 0.5
MAX_BACKLOG_BYTES = 64 << 20  # for an ingress that has taken nothing for UNREAD_S
UNREAD_S = 5.0
MAX_SLOW_BACKLOG_BYTES = 1 << 30  # for one that takes some of it


class Outlet:
    """Writes to one ingress, and cuts it off when it takes nothing any more."""

    def __init__(self, writer: asyncio.StreamWriter, clock: Callable[[], float] = time.monotonic) -> None:
        self._writer = writer
        self._clock = clock
        self._backlog = 0  # bytes, if nothing was taken since the last line
        self._taken_at = clock()

    def write(self, line: bytes) -> None:
        backlog, now = self._writer.transport.get_write_buffer_size(), self._clock()
        if backlog < self._backlog:
            self._taken_at = now
        is_unread = backlog > MAX_BACKLOG_BYTES and now - self._taken_at > UNREAD_S
        if is_unread or backlog > MAX_SLOW_BACKLOG_BYTES:
            log.warning("an ingress has %d MB to read and takes nothing, or little; its link is cut", backlog >> 20)
            self._writer.transport.abort()
            return
        self._writer.write(line)
        self._backlog = backlog + len(line)

    def close(self) -> None:
        self._writer.close()


class LinkServer:
    """start() returns the port. `deliver` may be called from any thread; the rest belongs to the loop.

    commands: name -> function that runs on the engine's thread and returns what to answer.
    """

    def __init__(
        self,
        *,
        router_id: str,
        token: str,
        models: list[str],
        compiler: GrammarCompiler | None,
        commands: Mapping[str, Callable[[], dict[str, Any]]],
        load: Callable[[], dict[str, Any]],
    ) -> None:
        self._router_id = router_id
        self._token = token
        self._models = models
        self._compiler = compiler
        self._commands = commands
        self._load = load
        self._engine: Engine | None = None
        self._writers: dict[str, Outlet] = {}
        self._compiling: dict[tuple[str, str], bool] = {}  # False: aborted meanwhile
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="grammar")
        self._numbers = itertools.count()
        self._loop = asyncio.new_event_loop()
        self._server: asyncio.Server | None = None

    def start(self, engine: Engine, host: str, port: int = 0) -> int:
        """Listen and serve; returns the port."""
        self._engine = engine
        threading.Thread(target=self._loop.run_forever, name="link-server", daemon=True).start()
        return asyncio.run_coroutine_threadsafe(self._listen(host, port), self._loop).result(timeout=10)

    def stop(self) -> None:
        """Close the port and every connection."""
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(timeout=10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._pool.shutdown(wait=False, cancel_futures=True)

    def deliver(self, outbox: Mapping[str, list[Chunk]]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: the router is going down
            self._loop.call_soon_threadsafe(self._send_chunks, outbox)

    async def _listen(self, host: str, port: int) -> int:
        self._server = await asyncio.start_server(self._serve, host, port, limit=MAX_LINE_BYTES)
        self._loop.create_task(self._report_load())
        return int(self._server.sockets[0].getsockname()[1])

    async def _close(self) -> None:
        if self._server is not None:
            self._server.close()
        for writer in list(self._writers.values()):
            writer.close()
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        owner: str | None = None
        try:
            owner = await self._greet(reader, writer)
            if owner is not None:
                await self._read(owner, reader)
        except (TimeoutError, OSError, ValueError, asyncio.LimitOverrunError) as error:
            log.info("link %s: %s", owner, str(error)[:200])
        except asyncio.CancelledError:
            log.debug("link %s: closed with the server", owner)  # raised on, asyncio would log it as an error
        finally:
            if owner is not None:
                del self._writers[owner]
                self._abort_all(owner)
            writer.close()

    async def _greet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> str | None:
        hello = json.loads(await asyncio.wait_for(reader.readline(), HELLO_S) or b"{}")
        if not isinstance(hello, dict) or not hmac.compare_digest(str(hello.get("token")), self._token):
            writer.write(_line({"op": "refused", "message": "the mesh token is missing or wrong"}))
            return None
        owner = f"{hello.get('ingress_id')}#{next(self._numbers)}"
        self._writers[owner] = Outlet(writer)
        writer.write(_line({"op": "hello", "router_id": self._router_id, "models": self._models}))
        writer.write(_line({"op": "load", **self._load()}))
        return owner

    async def _read(self, owner: str, reader: asyncio.StreamReader) -> None:
        while line := await reader.readline():
            message = json.loads(line)
            match message.get("op"):
                case "generate" | "pool":
                    self._submit(owner, message)
                case "abort":
                    self._abort(owner, str(message["request_id"]))
                case "command":
                    self._command(owner, message)
                case other:
                    raise ValueError(f"unknown op {str(other)[:40]!r}")

    def _submit(self, owner: str, message: dict[str, Any]) -> None:
        assert self._engine is not None
        try:
            request = request_from_wire(message)
        except (ValueError, KeyError, TypeError) as error:
            refusal = error_chunk(str(message.get("request_id")), 400, "invalid_request", str(error)[:500])
            self._send_chunks({owner: [refusal]})
            return
        if isinstance(request, GenerateRequest) and request.sampling.structured is not None:
            self._compiling[owner, request.request_id] = True  # now: an abort may come before the task begins
            self._loop.create_task(self._compile_then_submit(owner, request))
        else:
            self._engine.submit(owner, request)

    async def _compile_then_submit(self, owner: str, request: GenerateRequest) -> None:
        """Grammars may take long to compile: on a worker thread, and only then into the engine."""
        assert self._engine is not None and request.sampling.structured is not None
        key = (owner, request.request_id)
        try:
            matcher = await self._loop.run_in_executor(self._pool, self._compile, key, request.sampling.structured)
        except ValueError as error:
            self._send_chunks({owner: [error_chunk(request.request_id, 400, "invalid_grammar", str(error)[:500])]})
            return
        except Exception as error:
            log.exception("the grammar of request %s can't be compiled", request.request_id)
            message = f"the grammar could not be compiled: {type(error).__name__}"
            self._send_chunks({owner: [error_chunk(request.request_id, 500, "internal_error", message)]})
            return
        finally:
            wanted = self._compiling.pop(key)
        if matcher is not None and wanted and owner in self._writers:
            self._engine.submit(owner, request, matcher)

    def _compile(self, key: tuple[str, str], spec: StructuredSpec) -> Matcher | None:
        """On a worker thread; None for a request that was aborted while it waited for one."""
        if not self._compiling.get(key):
            return None
        if self._compiler is None:
            raise ValueError("structured output needs the model's tokenizer.json, which is missing")
        return self._compiler.compile(spec)

    def _abort(self, owner: str, request_id: str) -> None:
        assert self._engine is not None
        if (owner, request_id) in self._compiling:
            self._compiling[owner, request_id] = False
        self._engine.abort(owner, request_id)

    def _abort_all(self, owner: str) -> None:
        assert self._engine is not None
        for key in self._compiling:
            if key[0] == owner:
                self._compiling[key] = False
        self._engine.abort_all(owner)

    def _command(self, owner: str, message: dict[str, Any]) -> None:
        assert self._engine is not None
        request_id, name = str(message["request_id"]), str(message.get("name"))
        command = self._commands.get(name)
        if command is None:
            known = ", ".join(self._commands)
            self._send_chunks(
                {owner: [error_chunk(request_id, 400, "unknown_command", f"{name[:40]!r}; known: {known}")]}
            )
            return

        def answer() -> None:
            chunk = Chunk(request_id=request_id, result=command(), finish_reason="stop")
            self.deliver({owner: [chunk]})

        self._engine.call(answer)

    async def _report_load(self) -> None:
        while True:
            await asyncio.sleep(LOAD_EVERY_S)
            line = _line({"op": "load", **self._load()})
            for writer in list(self._writers.values()):
                writer.write(line)

    def _send_chunks(self, outbox: Mapping[str, list[Chunk]]) -> None:
        for owner, chunks in outbox.items():
            writer = self._writers.get(owner)
            if writer is not None:
                writer.write(_line({"op": "chunks", "chunks": [chunk.to_wire() for chunk in chunks]}))


def _line(message: Mapping[str, Any]) -> bytes:
    return json.dumps(message, separators=(",", ":"), allow_nan=True).encode() + b"\n"
