"""Limits of each API key, over all ingresses: requests a minute and requests at once.

The counts are in the mesh's ledger. While that can't be reached, each ingress counts for itself: the limits then hold
for each of them, and nobody waits.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import AsyncGenerator
from typing import Any

from actors.ledger import Ledger
from deploy.errors import TooManyRequests
from deploy.settings import LimitSettings
from deploy.supervisors import Supervisors

logger = logging.getLogger(__name__)


class KeyLimits:
    """`shared` is None where there is one ingress."""

    def __init__(self, limits: LimitSettings, shared: Supervisors | None) -> None:
        self._shared = shared
        self._own = Ledger(time.monotonic)
        self._per_minute = limits.requests_per_minute_per_key
        self._at_once = limits.max_requests_per_key
        self._lease_s = limits.request_timeout_s + 60.0
        self._releases: set[asyncio.Task[None]] = set()

    @contextlib.asynccontextmanager
    async def admitted(self, key: str, *, is_rated: bool = True) -> AsyncGenerator[None]:
        """Counts a request while it is served, and in its minute where it is_rated. Raises TooManyRequests."""
        per_minute = self._per_minute if is_rated else None
        if per_minute is None and self._at_once is None:
            yield
            return
        request_id = uuid.uuid4().hex  # clients may give the same X-Request-Id to all of theirs
        refused, wait_s = await self._admit(key, request_id, per_minute)
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
            self._own.release(key, request_id)
            self._release_later(key, request_id)

    def _release_later(self, key: str, request_id: str) -> None:
        """At the shared ledger, if there is one. No answer need wait for it."""
        if self._shared is not None:
            task = asyncio.create_task(_release(self._shared, key, request_id))
            self._releases.add(task)
            task.add_done_callback(self._releases.discard)

    async def _admit(self, key: str, request_id: str, per_minute: int | None) -> tuple[str, float]:
        limits: dict[str, Any] = {"per_minute": per_minute, "at_once": self._at_once, "lease_s": self._lease_s}
        if self._shared is not None:
            try:
                async with asyncio.timeout(1.0):
                    return await self._shared.admit(key, request_id, **limits)
            except asyncio.CancelledError:  # the client has left, and may have been counted
                self._release_later(key, request_id)
                raise
            except Exception as error:
                logger.warning("the shared limits can't be reached, own ones hold: %s", str(error)[:200])
                self._release_later(key, request_id)  # a late answer: it may have been counted all the same
        return self._own.admit(key, request_id, **limits)


async def _release(shared: Supervisors, key: str, request_id: str) -> None:
    with contextlib.suppress(Exception):  # its lease will end
        await shared.release(key, request_id)
