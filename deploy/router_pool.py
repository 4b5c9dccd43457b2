"""All routers, as one: the least loaded one that serves the model takes a request, and a request outlives its router.

The pool keeps a log of each request's output tokens. When a link is lost, the request goes to another router with
`prompt_ids` and `output_ids` so far and the same seed; sampling is keyed by (seed, position), so the tokens go on as
they would have. What was handed out is never handed out again, and a line cut off in the middle counts as never said.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from actors.logs import REQUEST_ID
from actors.request import Chunk, Rows, rows_from_wire
from deploy.errors import DeadlineExceeded, EngineError, Unavailable
from deploy.link import RouterAddress, RouterLink
from deploy.metrics import ServingMetrics
from deploy.settings import Settings
from deploy.tracing import CURRENT

logger = logging.getLogger(__name__)

Discover = Callable[[], Awaitable[Sequence[Mapping[str, Any]]]]
MAX_LOSSES_WITHOUT_PROGRESS = 4
RETRY_S = 0.25
MAX_RETRY_S = 2.0
_TIME_IS_UP = Chunk(request_id="")
_NOT_SENT = ("model", "deadline", "is_further")


def new_id() -> str:
    """An id for a sequence, which routers' logs show; it begins with the client's request's."""
    request_id = REQUEST_ID.get()
    return f"{request_id}-{uuid.uuid4().hex}" if request_id else uuid.uuid4().hex


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterRequest:
    """What a router is asked for. `deadline` is in the loop's time.

    `model` is the name by which routers know the model; None where all routers are alike. `first_id` is the request_id
    of the first of several sequences for the same prompt: they go to its router, which computes the prompt once.
    `is_further`: others of its client's request are under way, so it waits while all routers' queues are full."""

    op: str
    prompt_ids: list[int]
    model: str | None = None
    deadline: float
    priority: int = 0
    cache_salt: str | None = None
    first_id: str | None = None
    is_further: bool = False
    request_id: str = field(default_factory=new_id)

    def message(self) -> dict[str, Any]:
        """What of it travels."""
        return {one.name: getattr(self, one.name) for one in fields(self) if one.name not in _NOT_SENT}


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateRequest(RouterRequest):
    """One sequence to generate. `sampling` is `SamplingParams.to_dict()`, seeded."""

    op: str = "generate"
    sampling: Mapping[str, Any]
    return_routed_experts: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolRequest(RouterRequest):
    """The rows of a pooling head: one for `tokens` = "last", one per token for "all"."""

    op: str = "pool"
    head: str
    tokens: Literal["last", "all"] = "last"


class RouterPool:
    """Links to every router that `discover` names ([{"router_id", "host", "port"}, ...]).

    `discover` is awaited at start, at intervals and at once after a loss; when it fails, the last answer stands."""

    def __init__(self, discover: Discover, settings: Settings) -> None:
        self._discover = discover
        self._mesh = settings.mesh
        self._router_wait_s = settings.limits.router_wait_s
        self._ingress_id = uuid.uuid4().hex
        self._links: dict[RouterAddress, RouterLink] = {}
        self._connecting: dict[RouterAddress, asyncio.Task[None]] = {}
        self._wake = asyncio.Event()
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._turn = 0
        self.metrics = ServingMetrics()

    async def start(self) -> None:
        """Begins to connect; returns at once. Call in the event loop that will use the pool."""
        if self._task is None:
            self._task = asyncio.create_task(self._maintain())

    async def close(self) -> None:
        tasks = [task for task in (self._task, *self._connecting.values()) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(link.close() for link in list(self._links.values())))
        self._links.clear()
        self._task = None

    @property
    def links(self) -> list[RouterLink]:
        return [link for link in self._links.values() if link.is_open]

    async def pool(self, request: PoolRequest) -> Rows:
        """The rows. Raises as `generate` does."""
        rows: Rows = []
        with self.metrics.watch(len(request.prompt_ids), request.model, {}) as watch:
            async with contextlib.aclosing(self.generate(request)) as chunks:
                async for chunk in chunks:
                    watch.saw(chunk)
                    rows[chunk.first_row :] = rows_from_wire(chunk.values or ())
                    if chunk.finish_reason == "stop" and rows:
                        watch.ended = "stop"
                        return rows
        raise EngineError(500, "engine_error", f"head {request.head!r} returned no values")

    async def command(self, name: str, *, timeout_s: float = 10.0) -> dict[str, dict[str, Any]]:
        """Sends a command to every router; router_id -> its result. A router that is lost meanwhile is left out."""

        async def ask(link: RouterLink) -> tuple[str, dict[str, Any]] | None:
            request_id = uuid.uuid4().hex
            queue = link.submit({"op": "command", "request_id": request_id, "name": name})
            try:
                async with asyncio.timeout(timeout_s):
                    chunk = await queue.get()
            except TimeoutError:
                return None
            finally:
                link.release(request_id, abort=False)
            return None if chunk is None else (link.address.router_id, chunk.result or {})

        answers = await asyncio.gather(*(ask(link) for link in self.links))
        return dict(answer for answer in answers if answer is not None)

    async def generate(self, request: RouterRequest) -> AsyncGenerator[Chunk]:
        """The chunks of one request, to its finish: it goes to one router after another until one has finished it.

        Close the iterator early to abort the request at its router. Raises Unavailable, DeadlineExceeded or
        EngineError; tokens already yielded stay valid."""
        loop = asyncio.get_running_loop()
        request_id, deadline, message = request.request_id, request.deadline, request.message()
        output_ids: list[int] = []
        full: set[RouterLink] = set()  # routers that had no room
        num_losses = num_refusals = 0
        has_first = False
        refused_at: float | None = None  # since when there have been only refusals
        while True:
            pause_s = min(RETRY_S * num_refusals, MAX_RETRY_S)
            link = await self._pick(request, full, pause_s, may_give_up=not has_first)
            left_s = max(0.0, deadline - loop.time())
            queue = link.submit({**message, "deadline_s": left_s, "output_ids": output_ids})
            end = loop.call_at(deadline, queue.put_nowait, _TIME_IS_UP)  # a timer per chunk costs as much as its text
            finished = False
            try:
                while (chunk := await queue.get()) is not None:
                    if chunk is _TIME_IS_UP:
                        raise DeadlineExceeded(
                            "the request's time is up; ask for fewer tokens or raise limits.request_timeout_s"
                        )
                    if chunk.error is not None:
                        finished = True
                        full.add(link)
                        refused_at = refused_at or loop.time()
                        others = any(one not in full for one in self._usable(request.model))
                        may_wait = has_first and loop.time() - refused_at < self._router_wait_s
                        may_wait = may_wait or (request.is_further and chunk.error.get("code") == "queue_full")
                        num_refusals += 1
                        if chunk.error.get("status") == 503 and (others or may_wait):
                            break
                        raise EngineError(
                            int(chunk.error.get("status", 500)),
                            str(chunk.error.get("code", "engine_error")),
                            str(chunk.error.get("message", "the router failed")),
                        )
                    finished = chunk.finish_reason is not None
                    output_ids += chunk.token_ids
                    num_refusals, refused_at = 0, None
                    if chunk.token_ids:  # rows are no progress: another router computes them anew
                        num_losses = 0
                    if has_first and chunk.prompt_logprobs is not None:
                        chunk = replace(chunk, prompt_logprobs=None)  # a replay repeats it
                    has_first = has_first or bool(chunk.token_ids)
                    yield chunk
                    if finished:
                        return
                else:
                    num_losses += 1
                    self.metrics.replays.inc()
                    if (note := CURRENT.get()) is not None:
                        note.lost_router(link.address.router_id, len(output_ids))
                    full.clear()
                    logger.warning(
                        "request %s lost router %s after %d tokens", request_id, link.address.router_id, len(output_ids)
                    )
                    if num_losses >= MAX_LOSSES_WITHOUT_PROGRESS:
                        raise Unavailable(
                            f"{num_losses} routers in a row were lost while they had this request", code="router_lost"
                        )
            finally:
                end.cancel()
                link.release(request_id, abort=not finished)

    def serves(self, model: str) -> bool:
        """Whether a router for it is connected and has a whole mesh, so that requests can finish."""
        return any(link.load.ready for link in self._usable(model))

    def _usable(self, model: str | None) -> list[RouterLink]:
        """Those that are leaving, or whose mesh heals, only when there are no others."""
        links = [link for link in self.links if model is None or model in link.models]
        links = [link for link in links if link.is_listed] or links
        return [link for link in links if link.load.ready] or links

    async def _pick(
        self, request: RouterRequest, full: set[RouterLink], pause_s: float, *, may_give_up: bool
    ) -> RouterLink:
        """The router that has first_id, or the least loaded; waits while there is none, a begun stream till its end.
        Full ones are asked again after pause_s."""
        loop = asyncio.get_running_loop()
        give_up = min(request.deadline, loop.time() + self._router_wait_s) if may_give_up else request.deadline
        while True:
            links = [link for link in self._usable(request.model) if link not in full]
            links = [link for link in links if request.first_id and link.holds(request.first_id)] or links
            if links:
                self._turn += 1
                order = self._turn
                return min(
                    enumerate(links),
                    key=lambda item: (
                        max(item[1].load.running + item[1].load.waiting, item[1].num_open),
                        (item[0] - order) % len(links),
                    ),
                )[1]
            self._wake.set()
            if full:
                await asyncio.sleep(min(pause_s, max(0.0, request.deadline - loop.time())))
                full.clear()
                continue
            self._changed.clear()
            try:
                async with asyncio.timeout_at(give_up):
                    await self._changed.wait()
            except TimeoutError:
                raise Unavailable("no router is up; the mesh is starting or recovering", code="no_router") from None

    async def _maintain(self) -> None:
        loop = asyncio.get_running_loop()
        interval_s = self._mesh.discover_interval_s
        listed: list[RouterAddress] = []
        checked_at = loop.time()
        while True:
            self._wake.clear()
            try:
                async with asyncio.timeout(self._mesh.connect_timeout_s):
                    listed = [
                        RouterAddress(router_id=str(one["router_id"]), host=str(one["host"]), port=int(one["port"]))
                        for one in await self._discover()
                    ]
            except Exception as error:  # whoever knows the routers may be down; those we know still serve
                logger.warning("discovery of routers failed: %s: %s", type(error).__name__, error)
            elapsed_s, checked_at = loop.time() - checked_at, loop.time()
            for address, link in list(self._links.items()):
                link.is_listed = address in listed
                # If this loop itself stood still, the routers' lines are waiting in the socket: count little.
                link.silence_s += min(elapsed_s, 2 * interval_s)
                if link.silence_s > self._mesh.router_silence_s:
                    logger.warning("router %s has been silent for %.1f s: left", address.router_id, link.silence_s)
                    link.drop()
                if not link.is_open:
                    del self._links[address]
            for address in listed:
                if address not in self._links and address not in self._connecting:
                    self._connecting[address] = asyncio.create_task(self._connect(address))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(interval_s if self.links else min(interval_s, RETRY_S)):
                    await self._wake.wait()
                await asyncio.sleep(0.02)  # many requests may wake us at once

    async def _connect(self, address: RouterAddress) -> None:
        try:
            link = await RouterLink.connect(
                address,
                token=self._mesh.token,
                ingress_id=self._ingress_id,
                timeout_s=self._mesh.connect_timeout_s,
                on_change=self._on_change,
            )
        except (OSError, TimeoutError) as error:
            logger.info("router %s: %s", address.router_id, error or type(error).__name__)
        else:
            self._links[address] = link
            self._on_change()
        finally:
            self._connecting.pop(address, None)

    def _on_change(self) -> None:
        self._changed.set()
        if any(not link.is_open for link in self._links.values()):
            self._wake.set()
