"""What the link does with grammars: for whom they are compiled, and what is said when that fails."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from actors.link_server import LinkServer


class Compiler:
    """Notes what it compiles; "slow" waits until it may end, "broken" raises what is no ValueError."""

    def __init__(self) -> None:
        self.compiled: list[str] = []
        self.go_on = threading.Event()

    def compile(self, spec: Any) -> object:
        self.compiled.append(spec.payload)
        if spec.payload == "slow":
            assert self.go_on.wait(60.0)
        if spec.payload == "broken":
            raise RuntimeError("out of luck")
        return object()


class Engine:
    def __init__(self) -> None:
        self.submitted: list[str] = []

    def submit(self, owner: str, request: Any, matcher: Any = None) -> None:
        self.submitted.append(request.request_id)

    def abort(self, owner: str, request_id: str) -> None: ...

    def abort_all(self, owner: str) -> None: ...


class Link:
    """An ingress' end of the link."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    def send(self, op: str, **fields: Any) -> None:
        self.writer.write(json.dumps({"op": op, **fields}).encode() + b"\n")

    def generate(self, request_id: str, pattern: str) -> None:
        structured = {"kind": "regex", "payload": pattern}
        self.send("generate", request_id=request_id, prompt_ids=[1], sampling={"structured": structured})

    async def error_of(self, request_id: str) -> dict[str, Any]:
        async with asyncio.timeout(60.0):
            while True:
                message = json.loads(await self.reader.readline())
                for chunk in message.get("chunks", []):
                    if chunk["request_id"] == request_id:
                        return dict(chunk["error"])


def run(scenario: Callable[[Link, Compiler, Engine], Awaitable[None]]) -> None:
    compiler, engine = Compiler(), Engine()
    server = LinkServer(
        router_id="router-0",
        token="secret",
        models=["tiny"],
        compiler=compiler,
        commands={},
        load=lambda: {"ready": True},
    )
    port = server.start(engine, "127.0.0.1")

    async def connected() -> None:
        link = Link(*await asyncio.open_connection("127.0.0.1", port))
        link.send("hello", token="secret", ingress_id="i")
        await scenario(link, compiler, engine)
        link.writer.close()

    try:
        asyncio.run(connected())
    finally:
        compiler.go_on.set()
        server.stop()


def test_nothing_is_compiled_for_requests_that_were_aborted_before_their_turn() -> None:
    async def scenario(link: Link, compiler: Compiler, engine: Engine) -> None:
        for i in range(2):  # as many as there are threads
            link.generate(f"slow-{i}", "slow")
        for i in range(5):
            link.generate(f"gone-{i}", "gone")
            link.send("abort", request_id=f"gone-{i}")
        link.generate("live", "live")
        link.send("command", request_id="end", name="none")
        assert (await link.error_of("end"))["code"] == "unknown_command"  # all of the above has been read
        compiler.go_on.set()
        async with asyncio.timeout(60.0):
            while len(engine.submitted) < 3:
                await asyncio.sleep(0.01)
        assert sorted(engine.submitted) == ["live", "slow-0", "slow-1"]
        assert compiler.compiled == ["slow", "slow", "live"]

    run(scenario)


def test_whatever_goes_wrong_in_compiling_is_answered_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(link: Link, compiler: Compiler, engine: Engine) -> None:
        link.generate("r", "broken")
        error = await link.error_of("r")
        assert (error["status"], error["code"]) == (500, "internal_error")
        assert error["message"] == "the grammar could not be compiled: RuntimeError"
        assert engine.submitted == []

    run(scenario)
    assert "out of luck" in caplog.text
