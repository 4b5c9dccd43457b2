"""One connection from this ingress to one router: JSON lines over TCP.

    ingress -> router   hello, generate, pool, abort, command
    router -> ingress   hello, chunks (one line per step with everything new for this ingress), load

A link hands each request's chunks to a queue of its own, in order. When the connection ends, for whatever reason, every
open queue gets `None`: the router is gone, and `deploy.router_pool` sends the requests again elsewhere.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic_core import from_json

from actors.request import MAX_LINE_BYTES, Chunk

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterAddress:
    router_id: str
    host: str
    port: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterLoad:
    """What a router last said of itself. `ready`: its mesh is whole, so requests can finish."""

    ready: bool = True
    running: int = 0
    waiting: int = 0


class RouterLink:
    """An open connection. Build with `connect`; `on_change` is called when load arrives and when the link is lost.

    `models` are the names that the router serves."""

    def __init__(
        self,
        address: RouterAddress,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        on_change: Callable[[], None],
        models: frozenset[str] = frozenset(),
    ) -> None:
        self.address = address
        self.models = models
        self.load = RouterLoad()
        self.is_open = True
        self.is_listed = True  # still among the routers that discovery names: new requests may go here
        self.silence_s = 0.0  # time since the last line; the pool counts it, each line resets it
        self._reader = reader
        self._writer = writer
        self._on_change = on_change
        self._queues: dict[str, asyncio.Queue[Chunk | None]] = {}
        self._read_task = asyncio.create_task(self._read())

    @classmethod
    async def connect(
        cls,
        address: RouterAddress,
        *,
        token: str | None,
        ingress_id: str,
        timeout_s: float,
        on_change: Callable[[], None],
    ) -> RouterLink:
        """Raises OSError or TimeoutError when nobody answers, ConnectionError when it isn't that router."""
        async with asyncio.timeout(timeout_s):
            reader, writer = await asyncio.open_connection(address.host, address.port, limit=MAX_LINE_BYTES)
            try:
                writer.write(_line({"op": "hello", "token": token, "ingress_id": ingress_id}))
                hello = json.loads(await reader.readline() or b"{}")
                expected = ("hello", address.router_id)
                if not isinstance(hello, dict) or (hello.get("op"), hello.get("router_id")) != expected:
                    raise ConnectionError(
                        f"{address.host}:{address.port} is not router {address.router_id!r}, or refuses us"
                    )
            except ValueError as error:
                writer.close()
                raise ConnectionError(f"{address.host}:{address.port} does not speak the routers' protocol") from error
            except BaseException:
                writer.close()
                raise
        return cls(address, reader, writer, on_change, frozenset(map(str, hello.get("models") or ())))

    @property
    def num_open(self) -> int:
        return len(self._queues)

    def holds(self, request_id: str) -> bool:
        """Whether the request is there and open."""
        return request_id in self._queues

    def submit(self, message: Mapping[str, Any]) -> asyncio.Queue[Chunk | None]:
        """Sends a request; its chunks arrive in the queue, `None` when the link is lost."""
        queue: asyncio.Queue[Chunk | None] = asyncio.Queue()
        if not self.is_open:
            queue.put_nowait(None)
            return queue
        self._queues[message["request_id"]] = queue
        self._send(message)
        return queue

    def release(self, request_id: str, *, abort: bool) -> None:
        """Forgets a request. With `abort` the router is told at once, so that it stops computing."""
        if self._queues.pop(request_id, None) is not None and abort and self.is_open:
            self._send({"op": "abort", "request_id": request_id})

    def _send(self, message: Mapping[str, Any]) -> None:
        try:
            self._writer.write(_line(message))
        except RuntimeError:  # uvloop's, where the connection has ended and `_read` hasn't heard of it yet
            self.drop()

    def drop(self) -> None:
        """Ends the link now. Open requests see `None`."""
        if not self.is_open:
            return
        self.is_open = False
        self._read_task.cancel()
        self._writer.transport.abort()
        queues, self._queues = self._queues, {}
        for queue in queues.values():
            queue.put_nowait(None)
        self._on_change()

    async def close(self) -> None:
        """Ends the link after what was written has been sent (aborts, for instance)."""
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(1.0):
                await self._writer.drain()
        self.drop()

    async def _read(self) -> None:
        try:
            while line := await self._reader.readline():
                if not line.endswith(b"\n"):
                    break  # cut off in the middle: what it would have said is computed again elsewhere
                self._receive(from_json(line))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            # One that breaks the protocol is as lost as one that hangs up.
            logger.info("router %s: %s: %s", self.address.router_id, type(error).__name__, str(error)[:200])
        finally:
            self.drop()

    def _receive(self, message: dict[str, Any]) -> None:
        self.silence_s = 0.0
        if message["op"] == "chunks":
            for data in message["chunks"]:
                if (queue := self._queues.get(data["request_id"])) is not None:
                    queue.put_nowait(Chunk(**data))
        elif message["op"] == "load":
            self.load = RouterLoad(
                ready=message.get("ready", True), running=message["running"], waiting=message["waiting"]
            )
            self._on_change()


def _line(message: Mapping[str, Any]) -> bytes:
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"
