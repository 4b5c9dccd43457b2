"""The shard processes as the supervisor knows them: starting, answering, silent, ended.

start ──> answering ──(no answer)──> silent ──(rejoin_s)──> ended
              ^                        │
              └──────(answers again)───┘        a dead or misbehaving one is ended at once
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from cluster.errors import MeshError
from cluster.placement import ExpertKey, shard_order
from cluster.settings import Timeouts
from cluster.view import Member

log = logging.getLogger("expertmesh.fleet")
T = TypeVar("T")
AT_ONCE_S = 0.03
FIND_S = 5.0  # for shards that nobody has enrolled, at the end
TELL_EVERY_S = 5.0  # how a long load goes
FORGIVEN_S = 30.0
FORGIVEN_TIMES = 2
ALONE_FORGIVEN_TIMES = 10


class ShardLost(MeshError):
    """A shard went away while it was asked for something."""


class ShardHandle(Protocol):
    """A running shard as the supervisor reaches it. All raise an Exception when the shard can't be reached.

    Orders rise; a keep_only below the newest load's order came late and is ignored.
    """

    async def info(self) -> dict[str, Any]: ...

    async def ping(self) -> int: ...

    async def load(self, keys: list[ExpertKey], order: int) -> int: ...

    async def keep_only(self, keys: list[ExpertKey], order: int) -> None: ...

    async def held(self) -> list[ExpertKey]: ...

    async def remember(self, note: dict[str, Any]) -> None: ...


class ShardStarter(Protocol):
    """Starts, finds and ends shard processes. The real one goes through Ray."""

    async def start(self, shard_id: str, avoid_nodes: Collection[str]) -> ShardHandle: ...

    async def find_all(self) -> Mapping[str, ShardHandle | None]:
        """Every shard there is, also of an earlier supervisor; None for one that doesn't answer and was ended."""

    async def kill(self, shard_id: str) -> None: ...


@dataclass(slots=True)
class Shard:
    """misses: pings in a row without an answer. blames: when exchanges failed over it, and it alone, although it
    answers pings; by epoch."""

    member: Member
    handle: ShardHandle
    misses: int = 0
    silent_since: float = 0.0
    blames: dict[int, float] = field(default_factory=dict)


class Fleet:
    """shards: those that answer. silent: those that stopped and may come back.

    changed() is called when a shard has come, come back, or was given up.
    """

    def __init__(
        self,
        starter: ShardStarter,
        timeouts: Timeouts,
        *,
        clock: Callable[[], float],
        changed: Callable[[], None],
        progress: Callable[[str], None],
    ) -> None:
        self._starter = starter
        self._timeouts = timeouts
        self._clock = clock
        self._changed = changed
        self._progress = progress
        self._held_bytes: dict[str, int] = {}
        self._next_number = 0
        self._order = 0
        self._last_return = 0.0
        self._note: dict[str, Any] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self.shards: dict[str, Shard] = {}
        self.silent: dict[str, Shard] = {}
        self.starting: set[asyncio.Task[None]] = set()
        self.trouble = ""  # why the last shard did not start

    @property
    def nodes(self) -> dict[str, str]:
        return {shard_id: shard.member.node_id for shard_id, shard in self.shards.items()}

    # ---- coming --------------------------------------------------------------------------------------

    async def find(self) -> dict[str, Any]:
        """Enrol the shards that an earlier supervisor left. Returns the newest note: one of theirs, or what was to be
        remembered meanwhile; empty where there is none."""
        found = await self._starter.find_all()
        for shard_id in found:
            self._next_number = max(self._next_number, shard_order(shard_id)[0] + 1)
        infos = await asyncio.gather(*(self._enrol(s, h) for s, h in found.items() if h is not None))
        known = [info for info in infos if info is not None]
        self._order = max((info.get("order", 0) for info in known), default=0)
        self._note = max((self._note, *(info.get("note", {}) for info in known)), key=_note_time)
        return self._note

    async def start_now(self, count: int) -> None:
        """Start so many at once and wait for them. Raises what one of them raised."""
        tasks = [asyncio.ensure_future(self._start(self._new_id())) for _ in range(count)]
        results = await asyncio.gather(*tasks, return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result

    def begin_start(self) -> None:
        """Start one in the background; `changed` is called when it is there. A failure is logged, and changed too."""
        shard_id = self._new_id()

        async def start() -> None:
            try:
                await self._start(shard_id)
                self.trouble = ""
            except Exception as error:
                self.trouble = f"{shard_id} did not start: {str(error)[:300]}"
                log.warning("%s", self.trouble)
                await asyncio.sleep(1.0)

        def done(task: asyncio.Task[None]) -> None:
            self.starting.discard(task)
            self._changed()

        task = asyncio.ensure_future(start())
        self.starting.add(task)
        task.add_done_callback(done)

    async def _start(self, shard_id: str) -> None:
        try:
            handle = await self._starter.start(shard_id, set(self.nodes.values()))
            if await self._enrol(shard_id, handle) is None:
                raise ShardLost(f"{shard_id} went away right after its start")
        except BaseException:
            self._spawn(self._starter.kill(shard_id))
            raise

    async def _enrol(self, shard_id: str, handle: ShardHandle) -> dict[str, Any] | None:
        info = await self.ask(handle.info(), 5.0)
        if info is None:
            self._spawn(self._starter.kill(shard_id))
            return None
        member = Member(
            shard_id=shard_id,
            actor_name=info.get("actor_name", shard_id),
            node_id=info["node_id"],
            host=info["host"],
            pid=info["pid"],
        )
        self.shards[shard_id] = Shard(member, handle)
        if self._note:
            self._spawn(self.ask(handle.remember(self._note), 5.0))
        return info

    # ---- asking --------------------------------------------------------------------------------------

    async def ask(self, call: Awaitable[T], timeout_s: float | None = None) -> T | None:
        """The answer, or None where the shard fails or stays silent."""
        try:
            async with asyncio.timeout(timeout_s or self._timeouts.ping_s):
                return await call
        except Exception as error:
            log.info("a shard did not answer: %s", str(error)[:200] or type(error).__name__)
            return None

    async def load(self, shard_id: str, keys: Iterable[ExpertKey]) -> None:
        """Have a shard load what it doesn't hold yet. Raises ShardLost when it goes away meanwhile, and whatever the
        checkpoint makes it raise."""
        shard = self.shards.get(shard_id)
        if shard is None:
            raise ShardLost(f"{shard_id} is gone")
        self._order += 1
        wanted = sorted(keys)
        began = self._clock()
        work = asyncio.ensure_future(shard.handle.load(wanted, self._order))
        misses, told = 0, began
        while not (await asyncio.wait({work}, timeout=0.5))[0]:
            misses = 0 if not await self._state(shard.handle, self._timeouts.watch_ping_s) else misses + 1
            if misses >= 2 or self._clock() - began > self._timeouts.load_s:
                work.cancel()
                raise ShardLost(f"{shard_id} stopped answering while it loaded")
            if self._clock() - told > TELL_EVERY_S and (info := await self.ask(shard.handle.info())) is not None:
                told = self._clock()
                held = f"{info['num_experts']} of {len(wanted)} experts"
                self._progress(f"{shard_id}: {held}, {_amount(info['weight_bytes'], told - began)}")
        num_bytes = work.result()
        if self._held_bytes.get(shard_id) == num_bytes:  # it had them all
            return
        self._held_bytes[shard_id] = num_bytes
        self._progress(f"{shard_id}: {len(wanted)} experts, {_amount(num_bytes, self._clock() - began)}")

    async def keep_only(self, wanted: Mapping[str, Iterable[ExpertKey]]) -> None:
        """Have every shard forget what it isn't wanted for."""
        self._order += 1
        await asyncio.gather(
            *(self.ask(s.handle.keep_only(sorted(wanted.get(i, ())), self._order)) for i, s in self.shards.items())
        )

    async def remember(self, note: dict[str, Any]) -> None:
        """Leave a note with every shard, for the next supervisor."""
        self._note = note
        await asyncio.gather(*(self.ask(s.handle.remember(note), 2.0) for s in self.shards.values()))

    # ---- going ---------------------------------------------------------------------------------------

    async def find_lost(self, suspects: Collection[str], members: Collection[str], epoch: int) -> dict[str, str]:
        """Which members of an epoch are gone: shard id -> "dead", "silent" or "unreliable".

        A suspect that doesn't answer is; anybody else only when Ray says at once that it is dead (it may just be
        busy). A suspect that does answer is forgiven twice in half a minute, and always when others were suspected
        with it: then the machine or the router is slow, and nothing would be better without them. The only member,
        whose end stops everything, is forgiven until slowness can't be the reason: deadlines grow with each miss."""
        asks = {
            s: asyncio.ensure_future(self._state(self.shards[s].handle, self._timeouts.ping_s))
            for s in members
            if s in self.shards
        }
        first = {task for s, task in asks.items() if s in suspects} or set(asks.values())
        await asyncio.gather(*first)
        if asks:
            await asyncio.wait({*asks.values()}, timeout=AT_ONCE_S)
        states = {s: task.result() for s, task in asks.items() if task.done()}
        lost = {s: state for s, state in states.items() if state == "dead" or (s in suspects and state == "silent")}
        now = self._clock()
        for shard_id in suspects:
            shard = self.shards.get(shard_id)
            if shard is None or shard_id in lost:
                continue
            if len(suspects) == 1:
                shard.blames = {e: at for e, at in shard.blames.items() if now - at < FORGIVEN_S} | {epoch: now}
                if len(shard.blames) > (FORGIVEN_TIMES if len(members) > 1 else ALONE_FORGIVEN_TIMES):
                    lost[shard_id] = "unreliable"
        return lost

    async def sweep(self) -> dict[str, str]:
        """Ping everybody once. Returns who was lost: dead, or silent twice in a row. Silent ones come back here, or
        are given up."""
        shards = {**self.shards, **self.silent}
        states = await asyncio.gather(*(self._state(s.handle, self._timeouts.watch_ping_s) for s in shards.values()))
        lost = {}
        for (shard_id, shard), state in zip(shards.items(), states, strict=True):
            if shard_id in self.shards:
                shard.misses = shard.misses + 1 if state else 0
                if state == "dead" or shard.misses >= 2:
                    lost[shard_id] = state
            elif shard_id in self.silent:
                if not state:
                    log.warning("%s answers again after %.1f s", shard_id, self._clock() - shard.silent_since)
                    shard.misses = 0
                    if not self.shards:
                        self._last_return = self._clock()
                    self.shards[shard_id] = self.silent.pop(shard_id)
                    self._changed()
                elif state == "dead" or self._is_given_up(shard):
                    del self.silent[shard_id]
                    self._spawn(self._starter.kill(shard_id))
                    self._changed()
        return lost

    def _is_given_up(self, shard: Shard) -> bool:
        """When nobody answers, everything is slow, and ending the shards would only make it worse. When the first one
        is back, the others have their time from then on."""
        rejoin_s = self._timeouts.rejoin_s if self.shards else self._timeouts.patience_s
        return self._clock() - max(shard.silent_since, self._last_return) > rejoin_s

    def remove(self, shard_id: str, state: str) -> None:
        """No member any more. A silent one may come back for a while; any other is ended."""
        shard = self.shards.pop(shard_id, None)
        if shard is None:
            return
        if state == "silent":
            shard.silent_since = self._clock()
            self.silent[shard_id] = shard
        else:
            self._spawn(self._starter.kill(shard_id))

    def end(self, shard_ids: Iterable[str]) -> None:
        """End shards that nobody needs, in the background."""
        for shard_id in shard_ids:
            if self.shards.pop(shard_id, None) is not None:
                self._spawn(self._starter.kill(shard_id))

    async def end_all(self) -> None:
        """Also those that are starting, and those of an earlier supervisor that weren't enrolled."""
        tasks = [*self.starting, *self._tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        everybody = {*self.shards, *self.silent}
        with contextlib.suppress(Exception):  # Ray's head may be away
            async with asyncio.timeout(FIND_S):
                everybody |= {*await self._starter.find_all()}
        await asyncio.gather(*(self._starter.kill(s) for s in everybody), return_exceptions=True)

    async def _state(self, handle: ShardHandle, timeout_s: float) -> str:
        """ "" for a shard that answers, "silent" or "dead"."""
        try:
            async with asyncio.timeout(timeout_s):
                await handle.ping()
        except TimeoutError:
            return "silent"
        except Exception:  # what Ray raises for an actor that is gone; Ray is not known here
            return "dead"
        return ""

    def _spawn(self, work: Awaitable[Any]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _new_id(self) -> str:
        self._next_number += 1
        return f"shard-{self._next_number - 1}"


def _note_time(note: Mapping[str, Any]) -> float:
    return float(note.get("time", 0.0))


def make_note(num_shards: int) -> dict[str, Any]:
    return {"num_shards": num_shards, "time": time.time()}


def _amount(num_bytes: int, seconds: float) -> str:
    """Bytes, time and rate."""
    rate = f" ({num_bytes / 1e6 / seconds:,.0f} MB/s)" if seconds > 0 else ""
    return f"{num_bytes / 1e6:,.1f} MB in {seconds:.1f} s{rate}"
