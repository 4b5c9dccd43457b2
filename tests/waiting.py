"""Wait until something has come true. The time allowed is long: only what never comes true meets it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

PATIENCE_S = 60.0


def wait_until(condition: Callable[[], bool], timeout_s: float = PATIENCE_S) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "the condition did not come true in time"
        time.sleep(0.02)


async def until(condition: Callable[[], bool], timeout_s: float = PATIENCE_S) -> None:
    """The same on an event loop, which goes on meanwhile."""
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.01)
