"""The port that outlives whoever answers on it."""

from __future__ import annotations

import asyncio
import http.client
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from deploy.launch import port_problem
from deploy.listener import answering, open_port, shown
from tests.ports import free_port

IPV6_ADDRESSES = "".join(file.read_text() for file in Path("/proc/net").glob("if_inet6"))


def app(name: str) -> Starlette:
    async def say(request: Request) -> PlainTextResponse:
        return PlainTextResponse(f"{name}: {request.client is not None}")

    return Starlette(routes=[Route("/", say)])


def test_a_client_waits_while_one_ingress_follows_another():
    number = free_port()

    def ask() -> str:
        return httpx.get(f"http://127.0.0.1:{number}/", timeout=60).text

    def ask_before_anybody_answers() -> Callable[[], str]:
        """Connected and sent; the function that is returned reads the answer."""
        connection = http.client.HTTPConnection("127.0.0.1", number, timeout=60)
        connection.request("GET", "/", headers={"Connection": "close"})
        return lambda: connection.getresponse().read().decode()

    async def one_after_the_other() -> list[str]:
        loop, answers = asyncio.get_running_loop(), []
        for name in ("first", "second"):
            read = ask_before_anybody_answers()
            async with answering(app(name), path):
                answers += [await loop.run_in_executor(pool, work) for work in (read, ask)]
        return answers

    with ThreadPoolExecutor(1) as pool, open_port("127.0.0.1", number) as path:
        assert asyncio.run(one_after_the_other()) == ["first: True"] * 2 + ["second: True"] * 2
    with pytest.raises(httpx.ConnectError):
        ask()
    assert not Path(path).exists()


def test_several_ingresses_share_a_port_and_one_may_leave():
    async def ask() -> str:
        async with httpx.AsyncClient() as client:
            return (await client.get(f"http://127.0.0.1:{number}/")).text

    async def both() -> None:
        async with answering(app("one"), path):
            async with answering(app("other"), path):
                assert {await ask() for _ in range(8)} <= {"one: True", "other: True"}
            assert [await ask() for _ in range(8)] == ["one: True"] * 8

    number = free_port()
    with open_port("127.0.0.1", number) as path:
        asyncio.run(both())


@pytest.mark.skipif("0" * 31 + "1" not in IPV6_ADDRESSES, reason="this machine has no ::1")
def test_an_ipv6_address_is_listened_on_and_stands_in_brackets():
    async def ask(url: str) -> str:
        async with answering(app("six"), path), httpx.AsyncClient() as client:
            return (await client.get(url)).text

    number = free_port()
    assert port_problem("::1", number) is None
    with open_port("::1", number) as path:
        assert asyncio.run(ask(f"http://{shown('::1', number)}/")) == "six: True"
        assert "in use" in str(port_problem("::1", number))


def test_a_port_that_is_taken_or_not_given_is_an_error(tmp_path: Path):
    async def ask_nobody() -> None:
        async with answering(app("nobody"), str(tmp_path / "port")):
            pass

    number = free_port()
    with open_port("127.0.0.1", number), pytest.raises(OSError, match="in use"), open_port("127.0.0.1", number):
        pass
    with pytest.raises(FileNotFoundError):
        asyncio.run(ask_nobody())
