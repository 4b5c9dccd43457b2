"""Which shards the fleet gives up, on a clock of the test's own; who is silent says so at once."""

from __future__ import annotations

import asyncio
from typing import Any

from actors.fleet import Fleet
from cluster.settings import Timeouts

PATIENT = Timeouts(ping_s=20.0, watch_ping_s=20.0, rejoin_s=5.0, patience_s=30.0)


class Handle:
    """The part of ShardHandle that is asked here."""

    def __init__(self) -> None:
        self.is_silent = False

    async def info(self) -> dict[str, Any]:
        return {"node_id": "node-0", "host": "127.0.0.1", "pid": 1}

    async def ping(self) -> int:
        if self.is_silent:
            raise TimeoutError
        return 0


class Starter:
    def __init__(self) -> None:
        self.ended: list[str] = []

    async def kill(self, shard_id: str) -> None:
        self.ended.append(shard_id)


class Shards:
    """A fleet of so many; `now` is its clock."""

    def __init__(self, count: int) -> None:
        self.now = 100.0
        self.handles = {f"shard-{i}": Handle() for i in range(count)}
        self.starter = Starter()
        self.fleet = Fleet(
            self.starter, PATIENT, clock=lambda: self.now, changed=lambda: None, progress=lambda line: None
        )

    async def enrol(self) -> None:
        for shard_id, handle in self.handles.items():
            await self.fleet._enrol(shard_id, handle)

    async def ended_after(self, wait_s: float) -> list[str]:
        """Which shards a sweep has ended by then."""
        self.now += wait_s
        for shard_id, state in (await self.fleet.sweep()).items():
            self.fleet.remove(shard_id, state)
        await asyncio.sleep(0)  # ending is a task
        return self.starter.ended


def test_when_everybody_was_silent_and_one_is_back_the_others_have_their_time_from_then_on() -> None:
    async def scenario() -> None:
        shards = Shards(3)
        await shards.enrol()
        for handle in shards.handles.values():
            handle.is_silent = True
        await shards.ended_after(0.0)
        await shards.ended_after(0.0)
        assert set(shards.fleet.silent) == {"shard-0", "shard-1", "shard-2"}
        assert await shards.ended_after(29.0) == []
        shards.handles["shard-0"].is_silent = False
        assert await shards.ended_after(0.5) == []
        assert await shards.ended_after(4.0) == []
        shards.handles["shard-1"].is_silent = False
        assert await shards.ended_after(0.5) == []
        assert set(shards.fleet.shards) == {"shard-0", "shard-1"}
        assert await shards.ended_after(1.0) == ["shard-2"], "only the first return gives time"

    asyncio.run(scenario())


def test_the_only_shard_is_forgiven_longer_than_one_of_two() -> None:
    async def scenario() -> None:
        shards = Shards(2)
        await shards.enrol()
        for epoch in range(10):
            assert await shards.fleet.find_lost(["shard-1"], ["shard-1"], epoch) == {}
        assert await shards.fleet.find_lost(["shard-1"], ["shard-1"], 10) == {"shard-1": "unreliable"}
        found = [await shards.fleet.find_lost(["shard-0"], ["shard-0", "shard-1"], epoch) for epoch in range(3)]
        assert found == [{}, {}, {"shard-0": "unreliable"}]

    asyncio.run(scenario())
