"""The router's end of a link: whom it cuts off, whom it waits for, and what it passes on."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Self

import pytest

from actors import link_server
from actors.link_server import MAX_BACKLOG_BYTES, MAX_SLOW_BACKLOG_BYTES, UNREAD_S, LinkServer, Outlet
from actors.request import Chunk
from tests.waiting import PATIENCE_S, wait_until

PLAIN = {"op": "generate", "prompt_ids": [5], "sampling": {"max_tokens": 1}}
CONSTRAINED = {**PLAIN, "sampling": {"max_tokens": 1, "structured": {"kind": "regex", "payload": "a"}}}


class Peer(asyncio.Transport):
    """Where an outlet's lines go; the test says what is taken of them, and when it is."""

    def __init__(self) -> None:
        super().__init__()
        self.backlog = 0
        self.is_cut = False
        self.now = 0.0

    def get_write_buffer_size(self) -> int:
        return self.backlog

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.backlog += len(data)

    def abort(self) -> None:
        self.is_cut = True

    def is_closing(self) -> bool:
        return True  # there is nothing to close


@pytest.fixture
def peer() -> Peer:
    return Peer()


@pytest.fixture
def outlet(peer: Peer) -> Iterator[Outlet]:
    loop = asyncio.new_event_loop()
    yield Outlet(asyncio.StreamWriter(peer, asyncio.Protocol(), None, loop), lambda: peer.now)
    loop.close()


class Line(bytes):
    """As long as it says, without the memory."""

    size: int

    def __new__(cls, size: int) -> Self:
        line = super().__new__(cls)
        line.size = size
        return line

    def __len__(self) -> int:
        return self.size


def test_an_ingress_that_takes_nothing_of_a_large_backlog_is_cut_off_in_time(peer: Peer, outlet: Outlet) -> None:
    outlet.write(Line(3 * MAX_BACKLOG_BYTES))  # one answer, however long, is no reason
    outlet.write(Line(10))
    peer.now += UNREAD_S - 1
    outlet.write(Line(10))
    assert not peer.is_cut
    peer.now += 2
    outlet.write(Line(10))
    assert peer.is_cut


def test_an_ingress_that_reads_slowly_keeps_its_link_until_too_much_waits_for_it(peer: Peer, outlet: Outlet) -> None:
    while peer.backlog <= MAX_SLOW_BACKLOG_BYTES:
        assert not peer.is_cut
        outlet.write(Line(2 * MAX_BACKLOG_BYTES))
        peer.backlog -= 1000
        peer.now += UNREAD_S - 1
    outlet.write(Line(10))
    assert peer.is_cut


def test_an_ingress_that_took_all_but_little_is_no_silent_one_later(peer: Peer, outlet: Outlet) -> None:
    outlet.write(Line(10))
    peer.now, peer.backlog = 1000.0, 0
    outlet.write(Line(3 * MAX_BACKLOG_BYTES))
    outlet.write(Line(10))
    assert not peer.is_cut


@dataclass
class FakeEngine:
    """Only remembers what it is told."""

    submitted: list[str] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    gone: list[str] = field(default_factory=list)

    def submit(self, owner: str, request: Any, matcher: Any = None) -> None:
        self.submitted.append(request.request_id)

    def abort(self, owner: str, request_id: str) -> None:
        self.aborted.append(request_id)

    def abort_all(self, owner: str) -> None:
        self.gone.append(owner)


@dataclass
class SlowCompiler:
    """Is done when the test lets it."""

    has_begun: threading.Event = field(default_factory=threading.Event)
    may_end: threading.Event = field(default_factory=threading.Event)

    def compile(self, spec: Any) -> str:
        self.has_begun.set()
        assert self.may_end.wait(PATIENCE_S)
        return "a matcher"


@dataclass
class Link:
    server: LinkServer
    engine: FakeEngine
    compiler: SlowCompiler
    port: int

    def connect(self, ingress_id: str) -> socket.socket:
        ingress = socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE_S)
        send(ingress, {"op": "hello", "token": "secret", "ingress_id": ingress_id})
        return ingress


def send(ingress: socket.socket, message: dict[str, Any]) -> None:
    ingress.sendall(json.dumps(message).encode() + b"\n")


@pytest.fixture
def link() -> Iterator[Link]:
    engine, compiler = FakeEngine(), SlowCompiler()
    server = LinkServer(
        router_id="router-0", token="secret", models=["tiny"], compiler=compiler, commands={}, load=dict
    )
    yield Link(server, engine, compiler, server.start(engine, "127.0.0.1"))
    compiler.may_end.set()
    server.stop()


def test_an_ingress_that_reads_nothing_is_cut_and_no_other_notices(link: Link, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_server, "MAX_BACKLOG_BYTES", 1 << 20)
    monkeypatch.setattr(link_server, "UNREAD_S", 0.0)
    with link.connect("deaf") as deaf, link.connect("other") as other:
        lines = other.makefile("rb")
        assert json.loads(lines.readline())["op"] == "hello" and json.loads(lines.readline())["op"] == "load"
        wait_until(lambda: len(link.server._writers) == 2)
        owners = sorted(link.server._writers)
        for number in range(1000):  # far more than the sockets take
            chunk = Chunk(request_id=str(number), token_ids=[7] * 100_000)
            link.server.deliver({owner: [chunk] for owner in owners})
            heard = json.loads(lines.readline())
            while heard["op"] == "load":
                heard = json.loads(lines.readline())
            assert heard["chunks"][0]["request_id"] == str(number)
            if link.engine.gone:
                break
        assert link.engine.gone == [owners[0]] and owners[0].startswith("deaf")
        assert list(link.server._writers) == [owners[1]]
        num_bytes = 0
        while piece := deaf.recv(1 << 20):
            num_bytes += len(piece)
        assert num_bytes > 0, "what it had been sent, and then the end"


@pytest.mark.parametrize("leaves", [False, True])
def test_what_is_aborted_while_its_grammar_compiles_never_reaches_the_engine(link: Link, leaves: bool) -> None:
    with link.connect("one") as one, link.connect("two") as two:
        send(one, {**CONSTRAINED, "request_id": "unwanted"})
        assert link.compiler.has_begun.wait(PATIENCE_S)
        if leaves:
            one.close()
        else:
            send(one, {"op": "abort", "request_id": "unwanted"})
        wait_until(lambda: bool(link.engine.gone if leaves else link.engine.aborted))
        send(two, {**CONSTRAINED, "request_id": "wanted"})
        link.compiler.may_end.set()
        wait_until(lambda: link.engine.submitted == ["wanted"] and not link.server._compiling)
        send(two, {**PLAIN, "request_id": "plain"})
        wait_until(lambda: len(link.engine.submitted) == 2)
        assert link.engine.submitted == ["wanted", "plain"]
