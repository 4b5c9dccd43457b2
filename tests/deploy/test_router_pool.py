"""Failover of requests between routers, on real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from actors.request import rows_to_wire
from deploy.errors import DeadlineExceeded, EngineError, Unavailable
from deploy.router_pool import GenerateRequest, PoolRequest, RouterPool
from deploy.settings import LimitSettings, MeshSettings, Settings
from tests.deploy.fakes import FakeRouter, num_in_flight, token_at
from tests.waiting import until

PROMPT = [10, 11, 12]


def expected(num: int, seed: int = 5) -> list[int]:
    return [token_at(seed, len(PROMPT) + i) for i in range(num)]


@contextlib.asynccontextmanager
async def pool_of(*routers: FakeRouter, router_wait_s: float = 2.0, **mesh: Any) -> AsyncIterator[RouterPool]:
    for router in routers:
        await router.start()
    listed = [router.entry for router in routers]

    async def discover() -> list[dict[str, Any]]:
        return listed

    mesh_settings = MeshSettings(discover_interval_s=0.05, **mesh)
    pool = RouterPool(discover, Settings(mesh=mesh_settings, limits=LimitSettings(router_wait_s=router_wait_s)))
    pool.listed = listed  # type: ignore[attr-defined]
    await pool.start()
    try:
        yield pool
    finally:
        await pool.close()
        for router in routers:
            router.kill()


def request(num: int = 20, *, timeout_s: float = 60.0, seed: int = 5) -> GenerateRequest:
    deadline = asyncio.get_running_loop().time() + timeout_s
    return GenerateRequest(prompt_ids=PROMPT, sampling={"max_tokens": num, "seed": seed}, deadline=deadline)


async def tokens_of(pool: RouterPool, one: GenerateRequest) -> list[int]:
    return [token async for chunk in pool.generate(one) for token in chunk.token_ids]


async def linked(pool: RouterPool, num: int) -> None:
    await until(lambda: len(pool.links) == num)


def test_a_request_gets_its_tokens() -> None:
    async def run() -> None:
        async with pool_of(FakeRouter()) as pool:
            assert await tokens_of(pool, request()) == expected(20)
            assert num_in_flight(pool) == 0

    asyncio.run(run())


@pytest.mark.parametrize("dies_after", [0, 1, 7, 19])
def test_a_request_outlives_its_router_and_no_token_is_lost_changed_or_doubled(dies_after: int) -> None:
    async def run() -> None:
        first, second = FakeRouter("a", dies_after=dies_after), FakeRouter("b")
        async with pool_of(first) as pool:
            await linked(pool, 1)
            await second.start()
            work = asyncio.ensure_future(tokens_of(pool, request()))
            await until(lambda: bool(first.requests))
            pool.listed.append(second.entry)  # type: ignore[attr-defined]
            assert await work == expected(20)
            assert second.requests[0]["output_ids"] == expected(dies_after)
            assert second.requests[0]["request_id"] == first.requests[0]["request_id"]
            assert pool.metrics.registry.get_sample_value("expertmesh_replays_total") == 1
            second.kill()

    asyncio.run(run())


def test_many_requests_outlive_several_routers() -> None:
    async def run() -> None:
        routers = [FakeRouter(f"r{i}", token_s=0.002, dies_after=40 * (i + 1) if i < 3 else None) for i in range(4)]
        async with pool_of(*routers) as pool:
            await linked(pool, 4)
            results = await asyncio.gather(*(tokens_of(pool, request(30, seed=seed)) for seed in range(16)))
            assert results == [expected(30, seed) for seed in range(16)]

    asyncio.run(run())


def test_requests_go_to_the_least_loaded_router() -> None:
    async def run() -> None:
        routers = [FakeRouter(f"r{i}", token_s=0.01) for i in range(3)]
        async with pool_of(*routers) as pool:
            await linked(pool, 3)
            await asyncio.gather(*(tokens_of(pool, request(5)) for _ in range(12)))
            assert [len(router.requests) for router in routers] == [4, 4, 4]

    asyncio.run(run())


def test_requests_go_to_routers_whose_mesh_is_whole_and_to_others_only_where_there_is_none() -> None:
    async def run() -> None:
        healing, whole = FakeRouter("healing", is_ready=False), FakeRouter("whole")
        async with pool_of(healing, whole) as pool:
            await linked(pool, 2)
            await until(lambda: sorted(link.load.ready for link in pool.links) == [False, True])
            for _ in range(4):
                await tokens_of(pool, request(1))
            assert (len(healing.requests), len(whole.requests)) == (0, 4) and pool.serves("tiny")
            whole.is_ready = False
            await until(lambda: not pool.serves("tiny"))
            for _ in range(4):
                assert await tokens_of(pool, request(1)) == expected(1)
            assert len(healing.requests) + len(whole.requests) == 8

    asyncio.run(run())


def test_requests_go_to_routers_that_are_listed_and_to_others_only_where_there_is_none() -> None:
    async def run() -> None:
        leaving, stays = FakeRouter("leaving"), FakeRouter("stays", is_ready=False)
        async with pool_of(leaving, stays) as pool:
            await linked(pool, 2)
            await until(lambda: sorted(link.load.ready for link in pool.links) == [False, True])
            pool.listed.remove(leaving.entry)  # type: ignore[attr-defined]
            await until(lambda: sorted(link.is_listed for link in pool.links) == [False, True])
            for _ in range(4):
                await tokens_of(pool, request(1))
            assert (len(leaving.requests), len(stays.requests)) == (0, 4), "also where that one's mesh heals"
            pool.listed.clear()  # type: ignore[attr-defined]
            await until(lambda: not any(link.is_listed for link in pool.links))
            for _ in range(4):
                assert await tokens_of(pool, request(1)) == expected(1)
            assert (len(leaving.requests), len(stays.requests)) == (4, 4)

    asyncio.run(run())


def test_a_full_router_is_passed_over_and_only_full_ones_refuse() -> None:
    async def run() -> None:
        full, free = FakeRouter("full", max_running=0), FakeRouter("free")
        async with pool_of(full, free) as pool:
            await linked(pool, 2)
            for _ in range(4):
                assert await tokens_of(pool, request()) == expected(20)
        full = FakeRouter("full", max_running=0)
        async with pool_of(full) as pool:
            with pytest.raises(EngineError) as caught:
                await tokens_of(pool, request())
            assert (caught.value.status, caught.value.code) == (503, "queue_full")
            assert caught.value.headers()["Retry-After"] == "1"

    asyncio.run(run())


def test_a_batch_that_has_begun_waits_where_all_routers_are_full() -> None:
    async def run() -> None:
        small = FakeRouter("small", max_running=2, token_s=0.005)
        async with pool_of(small, router_wait_s=0.1) as pool:  # the first one's alone
            await linked(pool, 1)
            first = asyncio.ensure_future(tokens_of(pool, request()))
            await until(lambda: small.num_tokens > 0)
            others = (tokens_of(pool, replace(request(), is_further=True)) for _ in range(11))
            assert await asyncio.gather(first, *others) == [expected(20)] * 12
            with pytest.raises(EngineError, match="full"):
                await asyncio.gather(*(tokens_of(pool, request()) for _ in range(12)))

    asyncio.run(run())


def test_without_a_router_a_request_waits_and_then_says_503() -> None:
    async def run() -> None:
        async with pool_of(router_wait_s=0.2) as pool:
            began = time.monotonic()
            with pytest.raises(Unavailable, match="no router"):
                await tokens_of(pool, request())
            assert time.monotonic() - began > 0.15

    asyncio.run(run())


def test_a_stream_that_has_begun_waits_for_a_router_until_its_deadline() -> None:
    async def run() -> None:
        router = FakeRouter(dies_after=5)
        async with pool_of(router, router_wait_s=0.1) as pool:
            await linked(pool, 1)
            work = asyncio.ensure_future(tokens_of(pool, request()))
            await until(lambda: router.num_tokens > 5 and not pool.links)
            with pytest.raises(Unavailable, match="no router"):  # begins after the other has lost its router
                await tokens_of(pool, request())
            assert not work.done()
            reborn = await FakeRouter("reborn").start()
            pool.listed[:] = [reborn.entry]  # type: ignore[attr-defined]
            assert await work == expected(20)
            reborn.kill()

    asyncio.run(run())


def test_a_request_that_loses_router_after_router_without_a_token_is_given_up() -> None:
    async def run() -> None:
        async with pool_of(*(FakeRouter(f"r{i}", dies_after=0) for i in range(5))) as pool:
            await linked(pool, 5)
            with pytest.raises(Unavailable, match="in a row"):
                await tokens_of(pool, request())

    asyncio.run(run())


def test_the_deadline_ends_a_request_and_aborts_it() -> None:
    async def run() -> None:
        router = FakeRouter(token_s=600.0)
        async with pool_of(router) as pool:
            await linked(pool, 1)
            one = request(timeout_s=0.3)
            with pytest.raises(DeadlineExceeded):
                await tokens_of(pool, one)
            await until(lambda: router.aborted == [one.request_id])

    asyncio.run(run())


def test_a_silent_router_is_left_for_another() -> None:
    async def run() -> None:
        silent, good = FakeRouter("silent", token_s=600.0, is_silent=True), FakeRouter("good")
        async with pool_of(silent, router_silence_s=0.4) as pool:
            work = asyncio.ensure_future(tokens_of(pool, request()))
            await until(lambda: bool(silent.requests))
            await good.start()
            pool.listed[:] = [good.entry]  # type: ignore[attr-defined]
            assert await work == expected(20)
            good.kill()

    asyncio.run(run())


def test_wrong_hellos_and_failing_discovery_are_survived() -> None:
    async def run() -> None:
        mute, locked, good = FakeRouter("mute", says_hello=False), FakeRouter("locked", token="x"), FakeRouter("good")
        for router in (mute, locked, good):
            await router.start()
        calls = 0

        async def discover() -> list[dict[str, Any]]:
            nonlocal calls
            calls += 1
            if calls in (1, 3):
                raise ConnectionError("the head is gone")
            return [mute.entry, locked.entry, good.entry, {"router_id": "nobody", "host": "127.0.0.1", "port": 1}]

        pool = RouterPool(discover, Settings(mesh=MeshSettings(discover_interval_s=0.05, connect_timeout_s=0.5)))
        await pool.start()
        assert await tokens_of(pool, request()) == expected(20)
        await until(lambda: min(len(mute.writers), len(locked.writers), calls - 2) > 1)  # each was tried and failed
        assert [link.address.router_id for link in pool.links] == ["good"]
        await pool.close()
        for router in (mute, locked, good):
            router.kill()

    asyncio.run(run())


def test_pool_requests_and_commands_are_answered() -> None:
    async def run() -> None:
        router = FakeRouter()
        async with pool_of(router) as pool:
            deadline = asyncio.get_running_loop().time() + 60
            (row,) = await pool.pool(PoolRequest(head="cls", prompt_ids=[1], deadline=deadline))
            assert row.tolist() == [1.0, 2.0]
            assert await pool.command("reset_prefix_cache") == {"router-0": {"ok": True}}
            assert router.commands == ["reset_prefix_cache"]

    asyncio.run(run())


class Pooler(FakeRouter):
    """Says the rows 0.1, 1.1, ... of a pool request, from_to by from_to; dies in their midst where they don't end."""

    spans: tuple[tuple[int, int], ...] = ()
    num_rows = 4

    def _pool(self, writer: asyncio.StreamWriter, request_id: str) -> None:
        for begin, end in self.spans:
            values = rows_to_wire(np.arange(begin, end, dtype=np.float32)[:, None] + np.float32(0.1))
            reason = "stop" if end == self.num_rows else None
            self._chunk(writer, request_id, [], values=values, first_row=begin, finish_reason=reason)
        if self.spans[-1][1] < self.num_rows:
            asyncio.get_running_loop().call_later(0.05, self.kill)


def test_rows_come_in_pieces_and_are_whole_after_a_preemption_and_the_loss_of_a_router() -> None:
    async def run() -> None:
        first, second = Pooler("a"), Pooler("b")
        first.spans = ((0, 2), (2, 3))
        second.spans = ((0, 1), (1, 3), (0, 2), (2, 4))  # preempted after three rows
        async with pool_of(first) as pool:
            await linked(pool, 1)
            await second.start()
            pool.listed.append(second.entry)  # type: ignore[attr-defined]
            deadline = asyncio.get_running_loop().time() + 10
            rows = await pool.pool(PoolRequest(head="", prompt_ids=[1] * 4, tokens="all", deadline=deadline))
            assert len(first.requests) == len(second.requests) == 1
            assert [row.tolist() for row in rows] == [[float(np.float32(i) + np.float32(0.1))] for i in range(4)]
            second.kill()

    asyncio.run(run())


def test_a_pool_request_that_ends_router_after_router_is_given_up_though_rows_came() -> None:
    async def run() -> None:
        routers = [Pooler(f"r{i}") for i in range(5)]
        for router in routers:
            router.spans = ((0, 2),)
        async with pool_of(*routers) as pool:
            await linked(pool, 5)
            deadline = asyncio.get_running_loop().time() + 20
            with pytest.raises(Unavailable, match="in a row"):
                await pool.pool(PoolRequest(head="", prompt_ids=[1] * 4, tokens="all", deadline=deadline))

    asyncio.run(run())


def test_closing_the_iterator_early_aborts_at_once() -> None:
    async def run() -> None:
        router = FakeRouter(token_s=0.01)
        async with pool_of(router) as pool:
            one = request(1000)
            stream = pool.generate(one)
            await anext(stream)
            router.token_s = 600.0
            await stream.aclose()
            assert num_in_flight(pool) == 0
            await until(lambda: router.aborted == [one.request_id])

    asyncio.run(run())


def test_a_stream_that_meets_only_refusals_after_a_loss_is_given_up_in_time() -> None:
    async def run() -> None:
        first, full = FakeRouter("first", dies_after=3), FakeRouter("full", max_running=0)
        async with pool_of(first, router_wait_s=0.6) as pool:
            await linked(pool, 1)
            await full.start()
            pool.listed.append(full.entry)  # type: ignore[attr-defined]
            with pytest.raises(EngineError, match="full"):
                await tokens_of(pool, request())
            assert len(full.requests) > 1
            assert all(one["output_ids"] == expected(3) for one in full.requests)
            full.kill()

    asyncio.run(run())


def test_a_link_whose_connection_has_ended_unheard_is_lost_and_its_request_goes_elsewhere() -> None:
    class Ended:
        """uvloop's transport, closed before the reader has run."""

        def write(self, data: bytes) -> None:
            raise RuntimeError

        def __getattr__(self, name: str) -> Any:
            return getattr(writer, name)

    async def run() -> None:
        nonlocal writer
        async with pool_of(FakeRouter("a"), FakeRouter("b")) as pool:
            await linked(pool, 2)
            writer = pool.links[0]._writer
            pool.links[0]._writer = Ended()  # type: ignore[assignment]
            assert await asyncio.gather(*(tokens_of(pool, request()) for _ in range(4))) == [expected(20)] * 4

    writer: Any = None
    asyncio.run(run())
