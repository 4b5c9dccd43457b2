"""What every endpoint needs, in one value: settings, models, routers, threads for long texts, who is being served."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from deploy.errors import DeadlineExceeded, Unavailable
from deploy.router_pool import RouterPool
from deploy.served_model import ModelList, ServedModel
from deploy.settings import Settings

T = TypeVar("T")
VERSION = "0.1.0"
LONG_TEXT_CHARS = 4096  # a few milliseconds of tokenizing: longer texts leave the event loop


class Service:
    """Shared by all requests of one ingress."""

    def __init__(self, settings: Settings, models: ModelList, pool: RouterPool) -> None:
        self.settings = settings
        self.models = models
        self.pool = pool
        self.num_active = 0
        self._readers = ThreadPoolExecutor(max_workers=4, thread_name_prefix="read")
        self._writers = ThreadPoolExecutor(max_workers=2, thread_name_prefix="write")
        identity = f"{VERSION} {[model.names for model in models.models]} {settings.engine.model_dump_json()}"
        self.fingerprint = "fp_" + hashlib.sha256(identity.encode()).hexdigest()[:12]

    def deadline(self) -> float:
        """When a request that starts now must be done, in the event loop's time."""
        return asyncio.get_running_loop().time() + self.settings.limits.request_timeout_s

    @contextlib.contextmanager
    def admitted(self) -> Iterator[None]:
        """Counts a request while it is served. Raises Unavailable when there are too many."""
        limits = self.settings.limits
        if self.num_active >= limits.max_queue:
            raise Unavailable(f"this server holds {limits.max_queue} requests already; try again", code="queue_full")
        self.num_active += 1
        try:
            yield
        finally:
            self.num_active -= 1

    async def read(self, function: Callable[[], T], num_chars: int) -> T:
        """Runs what reads a request's text: here when it is short, in a thread when it is long."""
        return await self._run(function, num_chars, self._readers, "the text took too long to read; send a shorter one")

    async def write(self, function: Callable[[], T], num_chars: int) -> T:
        """Runs what writes an answer, as `read` does; in threads of its own, so large answers hold up no request."""
        too_long = "the answer took too long to write; ask for less in one request"
        return await self._run(function, num_chars, self._writers, too_long)

    async def _run(self, function: Callable[[], T], num_chars: int, threads: ThreadPoolExecutor, too_long: str) -> T:
        if num_chars <= LONG_TEXT_CHARS:
            return function()
        try:
            async with asyncio.timeout(self.settings.limits.request_timeout_s):
                return await asyncio.get_running_loop().run_in_executor(threads, function)
        except TimeoutError:
            raise DeadlineExceeded(too_long) from None

    async def encode(self, model: ServedModel, text: str, *, add_special_tokens: bool) -> list[int]:
        return await self.read(lambda: model.tokenizer.encode(text, add_special_tokens=add_special_tokens), len(text))

    def close(self) -> None:
        for threads in (self._readers, self._writers):
            threads.shutdown(wait=False, cancel_futures=True)
