"""What a person is told while shards load."""

from __future__ import annotations

import asyncio
from typing import Any

from actors.fleet import Fleet
from tests.actors.test_supervisor import TIMEOUTS, FakeShard, FakeStarter


class SlowShard(FakeShard):
    """Takes 10 s by the clock that it holds, and has half of it when asked meanwhile, which it waits for."""

    def __init__(self) -> None:
        super().__init__("shard-0", "node-0")
        self.now = 0.0
        self._is_loading = False
        self._was_asked = asyncio.Event()

    async def info(self) -> dict[str, Any]:
        if self._is_loading:
            self._was_asked.set()
        return {**await super().info(), "num_experts": 1, "weight_bytes": 30_000_000}

    async def load(self, keys: Any, order: int) -> int:
        self._is_loading = True
        self.now += 6.0
        await self._was_asked.wait()
        self.now += 4.0
        return 80_000_000


def test_a_long_load_is_told_of_on_the_way_and_at_its_end_with_bytes_and_rate() -> None:
    lines: list[str] = []

    async def scenario() -> None:
        shard = SlowShard()
        fleet = Fleet(FakeStarter(), TIMEOUTS, clock=lambda: shard.now, changed=lambda: None, progress=lines.append)
        assert await fleet._enrol("shard-0", shard) is not None
        await fleet.load("shard-0", [(0, 0), (0, 1)])

    asyncio.run(scenario())
    assert lines == [
        "shard-0: 1 of 2 experts, 30.0 MB in 6.0 s (5 MB/s)",
        "shard-0: 2 experts, 80.0 MB in 10.0 s (8 MB/s)",
    ]
