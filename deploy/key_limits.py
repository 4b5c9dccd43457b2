"""Limits of each API key, over all ingresses: requests a minute and requests at once.

The counts are in the mesh's ledger. While that can't be reached, each ingress counts for itself: the limits then hold
for each of them, and nobody waits.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator
from typing import Any, Protocol

from actors.ledger import Ledger, Totals
from deploy.errors import TooManyRequests
from deploy.settings import LimitSettings

logger = logging.getLogger(__name__)


class SharedLedger(Protocol):
    """actors.ledger.Ledger, further away. Any call may raise when it can't be reached."""

    async def share(self, ingress_id: str, totals: Totals) -> Totals: ...

    async def admit(self, key: str, request_id: str, **limits: Any) -> tuple[str, float]: ...

    async def release(self, key: str, request_id: str) -> None: ...


class KeyLimits:
    """`shared` is None where there is one ingress."""

    def __init__(self, limits: LimitSettings, shared: SharedLedger | None) -> None:
        self._shared = shared
        self._own = Ledger(time.monotonic)
        self._per_minute = limits.requests_per_minute_per_key
        self._at_once = limits.max_requests_per_key
        self._lease_s = limits.request_timeout_s + 60.0
        self._releases: set[asyncio.Task[None]] = set()

    @contextlib.asynccontextmanager
    async def admitted(self, key: str, request_id: str) -> AsyncGenerator[None]:
        """Counts a request while it is served. Raises TooManyRequests."""
        if self._per_minute is None and self._at_once is None:
            yield
            return
        limits = {"per_minute": self._per_minute, "at_once": self._at_once, "lease_s": self._lease_s}
        shared = self._shared
        try:
            if shared is None:
                refused, wait_s = self._own.admit(key, request_id, **limits)  # type: ignore[arg-type]
            else:
                async with asyncio.timeout(1.0):
                    refused, wait_s = await shared.admit(key, request_id, **limits)
        except Exception as error:
            logger.warning("the shared limits can't be reached, own ones hold: %s", str(error)[:200])
            shared = None
            refused, wait_s = self._own.admit(key, request_id, **limits)  # type: ignore[arg-type]
        if refused == "concurrency":
            raise TooManyRequests(
                f"this API key has {self._at_once} requests in flight, the most it may have; wait for one",
                retry_after_s=wait_s,
            )
        if refused:
            raise TooManyRequests(
                f"this API key may send {self._per_minute} requests a minute; the next one in {wait_s:.0f} s",
                retry_after_s=wait_s,
            )
        try:
            yield
        finally:
            if shared is None:
                self._own.release(key, request_id)
            else:
                task = asyncio.create_task(_release(shared, key, request_id))  # the answer need not wait for it
                self._releases.add(task)
                task.add_done_callback(self._releases.discard)


async def _release(shared: SharedLedger, key: str, request_id: str) -> None:
    with contextlib.suppress(Exception):  # its lease will end
        await shared.release(key, request_id)
