"""The supervisor: which shards there are, what they hold, and the epoch that everybody is on.

It keeps a target (how many shards, where each expert should be) and an actual state (the published view), and works
the difference off: in a hurry when experts are lost, in the background otherwise. It is the only one that makes
views. Serving does not need it: while it is away, nothing changes, and that is all. Its own state is rebuilt from
the shards when it restarts.

    report, ping ──> lose(shards) ──> survivors adopt what is missing ──> publish(epoch + 1)
                                  └─> replacements start, load ─────────> publish(epoch + 2)
    scale(n) ─────> shards start, load / are drained ───────────────────> publish(epoch + 1)
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from actors.mesh_plan import MeshPlan, plan_placement
from cluster.placement import ExpertKey, Placement, adopt, shard_order
from cluster.settings import Timeouts
from cluster.view import Member, MeshView

log = logging.getLogger("expertmesh.supervisor")
T = TypeVar("T")


class ShardHandle(Protocol):
    """A running shard as the supervisor reaches it. All raise an Exception when the shard can't be reached."""

    async def info(self) -> dict[str, Any]: ...

    async def ping(self) -> int: ...

    async def load(self, keys: list[ExpertKey]) -> int: ...

    async def keep_only(self, keys: list[ExpertKey]) -> None: ...

    async def held(self) -> list[ExpertKey]: ...


class ShardStarter(Protocol):
    """Starts, finds and ends shard processes. The real one goes through Ray."""

    async def start(self, shard_id: str, avoid_nodes: Collection[str]) -> ShardHandle: ...

    async def find_all(self) -> dict[str, ShardHandle]: ...

    async def kill(self, shard_id: str) -> None: ...


@dataclass(slots=True)
class _Shard:
    member: Member
    handle: ShardHandle
    misses: int = 0
    offences: deque[float] = field(default_factory=lambda: deque(maxlen=4))


@dataclass(slots=True)
class _Router:
    info: dict[str, Any]
    seen: float
    live_epoch: int = 0


class Supervisor:
    """An asyncio class; one instance, one loop. start() once, then the calls below as they come."""

    def __init__(
        self,
        plan: MeshPlan,
        starter: ShardStarter,
        timeouts: Timeouts,
        clock: Callable[[], float] = time.monotonic,
        progress: Callable[[str], None] = lambda line: None,
    ) -> None:
        self._plan = plan
        self._starter = starter
        self._timeouts = timeouts
        self._clock = clock
        self._progress = progress
        self._shards: dict[str, _Shard] = {}
        self._routers: dict[str, _Router] = {}
        self._view = MeshView(epoch=0, shards=(), placement=Placement({}))
        self._changed = asyncio.Condition()
        self._change = asyncio.Lock()  # held while a view is being made and published
        self._restore_wanted = asyncio.Event()
        self._next_number = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._history: deque[dict[str, Any]] = deque(maxlen=200)
        self._trouble = ""

    # ---- life ----------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Find the shards that are there already, start the others, load, publish, and keep watch from then on."""
        if self._plan.num_shards == 0:
            return
        for shard_id, handle in (await self._starter.find_all()).items():
            await self._enrol(shard_id, handle)
        if self._shards:
            await self._take_over()
        missing = self._plan.num_shards - len(self._shards)
        await self._start_shards(max(0, missing), strict=True)
        target = self._target_placement()
        await self._load_all(target)
        async with self._change:
            await self._publish(target, "start" if self._view.epoch == 0 else "supervisor restarted")
        self._spawn(self._watch_over())
        self._spawn(self._restore_forever())

    # ---- what routers call ---------------------------------------------------------------------------

    async def next_view(
        self, router_id: str, info: dict[str, Any], seen_epoch: int, live_epoch: int, wait_s: float = 5.0
    ) -> MeshView | None:
        """Wait for a view above seen_epoch; None after wait_s. Registers the router."""
        self._routers[router_id] = _Router(info, self._clock(), live_epoch)
        try:
            async with self._changed, asyncio.timeout(wait_s):
                await self._changed.wait_for(lambda: self._view.epoch > seen_epoch)
        except TimeoutError:
            return None
        finally:
            if router_id in self._routers:
                self._routers[router_id].seen = self._clock()
        return self._view

    async def report(self, router_id: str, epoch: int, suspects: tuple[str, ...], reason: str) -> None:
        """A router's exchange failed. Find out who is really gone and make a new epoch."""
        if epoch < self._view.epoch:
            return  # dealt with already
        detected = self._clock()
        async with self._change:
            if epoch < self._view.epoch:
                return
            dead = await self._find_dead(suspects)
            await self._lose(dead, f"{router_id}: {reason}"[:300], detected)

    def forget_router(self, router_id: str) -> None:
        """A router that says goodbye."""
        self._routers.pop(router_id, None)

    # ---- what people and the front call --------------------------------------------------------------

    def routers(self) -> list[dict[str, Any]]:
        """Addresses of the routers heard from lately."""
        horizon = self._clock() - 12.0
        return [r.info for r in self._routers.values() if r.seen >= horizon]

    def is_complete(self) -> bool:
        return bool(self._view.shards) and not self._view.placement.missing()

    async def mesh(self) -> dict[str, Any]:
        """Everything GET /mesh shows."""
        infos = await asyncio.gather(*(self._ask(s.handle.info()) for s in self._shards.values()))
        shards = []
        counts = self._view.placement.slot_counts()
        for shard, info in zip(self._shards.values(), infos, strict=True):
            member = {name: getattr(shard.member, name) for name in Member.__dataclass_fields__}
            in_view = shard.member.shard_id in self._view.shard_ids
            state = ("serving" if in_view else "standby") if info is not None else "unreachable"
            shards.append({**member, **(info or {}), "state": state, "num_slots": counts[shard.member.shard_id]})
        now = self._clock()
        return {
            "epoch": self._view.epoch,
            "reason": self._view.reason,
            "complete": self.is_complete(),
            "trouble": self._trouble,
            "target_shards": self._plan.num_shards,
            "replicas": self._plan.replicas,
            "shards": sorted(shards, key=lambda s: shard_order(s["shard_id"])),
            "routers": [
                {**r.info, "live_epoch": r.live_epoch, "seen_s_ago": round(now - r.seen, 2)}
                for r in self._routers.values()
            ],
            "placement": self._view.placement.to_dict(),
            "history": list(self._history),
        }

    async def scale(self, num_shards: int) -> dict[str, Any]:
        """Change the number of shards while requests run; returns when the new placement serves."""
        if self._plan.num_shards == 0 or num_shards < 1:
            raise ValueError(f"cannot scale to {num_shards} shards: give at least 1, and a mesh that has shards")
        self._plan = self._plan.with_shards(num_shards)
        await self._restore()
        return {"epoch": self._view.epoch, "shards": list(self._view.shard_ids)}

    async def shutdown(self) -> None:
        """End every shard."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*(self._starter.kill(shard_id) for shard_id in self._shards), return_exceptions=True)

    # ---- losing ---------------------------------------------------------------------------------------

    async def _find_dead(self, suspects: Collection[str]) -> list[str]:
        """Which members are gone. A suspect that doesn't answer is; anybody else only when Ray says so at once (it
        may just be busy). A suspect that does answer is forgiven once in half a minute."""
        ids = [s for s in self._view.shard_ids if s in self._shards]
        states = await asyncio.gather(*(self._state(self._shards[s].handle) for s in ids))
        dead = [s for s, state in zip(ids, states, strict=True) if state == "dead" or (s in suspects and state)]
        now = self._clock()
        for shard_id in suspects:
            shard = self._shards.get(shard_id)
            if shard is None or shard_id in dead:
                continue
            if shard.offences and now - shard.offences[-1] < 30.0:
                dead.append(shard_id)
            shard.offences.append(now)
        return dead

    async def _state(self, handle: ShardHandle) -> str:
        """ "" for a shard that answers, "silent" or "dead"."""
        try:
            async with asyncio.timeout(self._timeouts.ping_s):
                await handle.ping()
        except TimeoutError:
            return "silent"
        except Exception:
            return "dead"
        return ""

    async def _lose(self, dead: Collection[str], why: str, detected: float) -> None:
        """Publish a view without the dead. Called with the change lock held."""
        for shard_id in dead:
            self._shards.pop(shard_id, None)
            self._spawn(self._starter.kill(shard_id))
        lost = [s for s in self._view.shard_ids if s not in self._shards]
        rest = self._view.placement.without(lost)
        missing = rest.missing()
        if missing and self._shards:
            rest = await self._adopt(rest)
        if rest.missing():
            self._trouble = f"{len(rest.missing())} experts have no holder: {why}"
            log.error("%s", self._trouble)
        else:
            gone = f"lost {', '.join(lost)}" if lost else "nobody lost"
            how = f", {len(missing)} experts adopted" if missing else ""
            await self._publish(rest, f"{gone}{how}: {why}", detected)
        self._restore_wanted.set()

    async def _adopt(self, rest: Placement) -> Placement:
        """Load the experts that nobody holds any more: on spares where there are any, else on the survivors."""
        serving = rest.shards()
        spares = [s for s in self._shards if s not in serving]
        takers = spares or list(self._shards)
        shares = adopt(rest, takers)
        loaded = await asyncio.gather(
            *(self._ask(self._shards[s].handle.load(keys), self._timeouts.load_s) for s, keys in shares.items())
        )
        done = {s: keys for (s, keys), ok in zip(shares.items(), loaded, strict=True) if ok is not None}
        return rest.adding(done)

    # ---- restoring -----------------------------------------------------------------------------------

    async def _restore_forever(self) -> None:
        while True:
            await self._restore_wanted.wait()
            self._restore_wanted.clear()
            try:
                await self._restore()
            except Exception:
                log.exception("restoring the mesh failed; trying again")
                await asyncio.sleep(1.0)
                self._restore_wanted.set()

    async def _restore(self) -> None:
        """Bring the number of shards and the placement to the target; no hurry, requests go on meanwhile."""
        missing = self._plan.total_shards - len(self._shards)
        if missing > 0:
            await self._start_shards(missing, strict=False)
        if not self._shards:
            return
        target = self._target_placement()
        await self._load_all(target)
        async with self._change:
            if target.shards() - set(self._shards):
                self._restore_wanted.set()  # somebody died meanwhile: plan again
                return
            if target != self._view.placement:
                await self._publish(target, f"{len(target.shards())} shards in place")
        await self._drop_surplus()

    async def _drop_surplus(self) -> None:
        """After all routers moved: end drained shards, unload what the placement doesn't want."""
        epoch = self._view.epoch
        for _ in range(100):
            horizon = self._clock() - 12.0
            if all(r.live_epoch >= epoch for r in self._routers.values() if r.seen >= horizon):
                break
            await asyncio.sleep(0.1)
        if epoch != self._view.epoch:
            return
        placement = self._view.placement
        surplus = sorted((s for s in self._shards if s not in placement.shards()), key=shard_order)
        for shard_id in surplus[self._plan.num_spares :]:
            del self._shards[shard_id]
            await self._starter.kill(shard_id)
        await asyncio.gather(
            *(
                self._ask(shard.handle.keep_only(sorted(placement.held_by(shard_id))))
                for shard_id, shard in self._shards.items()
                if shard_id in placement.shards()
            )
        )

    def _target_placement(self) -> Placement:
        nodes = {s: shard.member.node_id for s, shard in self._shards.items()}
        return plan_placement(self._plan, nodes, self._view.placement)

    async def _load_all(self, placement: Placement) -> None:
        """Every shard loads what the placement gives it. Raises when one can't."""

        async def load(shard_id: str, shard: _Shard) -> None:
            keys = sorted(placement.held_by(shard_id))
            began = self._clock()
            async with asyncio.timeout(self._timeouts.load_s):
                num_bytes = await shard.handle.load(keys)
            self._progress(
                f"{shard_id}: {len(keys)} experts, {num_bytes / 1e6:.1f} MB in {self._clock() - began:.1f} s"
            )

        await asyncio.gather(*(load(s, shard) for s, shard in list(self._shards.items()) if s in placement.shards()))

    async def _start_shards(self, count: int, *, strict: bool) -> None:
        """Start `count` shards at once. strict: an error is raised; otherwise logged, and tried again later."""

        async def start_one(shard_id: str) -> None:
            handle = await self._starter.start(shard_id, {s.member.node_id for s in self._shards.values()})
            await self._enrol(shard_id, handle)

        ids = [self._new_id() for _ in range(count)]
        results = await asyncio.gather(*(start_one(i) for i in ids), return_exceptions=True)
        for shard_id, result in zip(ids, results, strict=True):
            if isinstance(result, BaseException):
                await self._starter.kill(shard_id)
                if strict:
                    raise result
                log.warning("%s did not start: %s", shard_id, str(result)[:300])
                self._restore_wanted.set()

    async def _enrol(self, shard_id: str, handle: ShardHandle) -> None:
        info = await handle.info()
        self._next_number = max(self._next_number, shard_order(shard_id)[0] + 1)
        member = Member(
            shard_id=shard_id,
            actor_name=info.get("actor_name", shard_id),
            node_id=info["node_id"],
            host=info["host"],
            pid=info["pid"],
        )
        self._shards[shard_id] = _Shard(member, handle)

    async def _take_over(self) -> None:
        """After a restart: continue with what the shards hold, above the highest epoch any of them has seen."""
        epochs = await asyncio.gather(*(self._ask(s.handle.ping()) for s in self._shards.values()))
        held = {s: await shard.handle.held() for s, shard in self._shards.items()}
        empty = Placement(dict.fromkeys(self._plan.moe_layers, ((),) * self._plan.num_experts))
        epoch = max((e for e in epochs if e is not None), default=0)
        self._view = MeshView(epoch=epoch, shards=(), placement=empty.adding(held))

    # ---- watching ------------------------------------------------------------------------------------

    async def _watch_over(self) -> None:
        """Ping all shards; one that misses twice in a row is lost, also while nobody sends it anything."""
        while True:
            await asyncio.sleep(0.5)
            shards = dict(self._shards)
            answers = await asyncio.gather(*(self._ask(s.handle.ping(), 1.0) for s in shards.values()))
            silent = []
            for (shard_id, shard), answer in zip(shards.items(), answers, strict=True):
                shard.misses = 0 if answer is not None else shard.misses + 1
                if shard.misses >= 2:
                    silent.append(shard_id)
            if silent:
                async with self._change:
                    still = [s for s in silent if s in self._shards]
                    if still:
                        await self._lose(still, "no answer to pings", self._clock())
            horizon = self._clock() - 60.0
            for router_id in [r for r, router in self._routers.items() if router.seen < horizon]:
                del self._routers[router_id]

    async def _publish(self, placement: Placement, reason: str, detected: float | None = None) -> None:
        """Make the next view known. Called with the change lock held."""
        members = tuple(self._shards[s].member for s in sorted(placement.shards(), key=shard_order))
        self._view = MeshView(epoch=self._view.epoch + 1, shards=members, placement=placement, reason=reason)
        self._trouble = ""
        took_ms = None if detected is None else round((self._clock() - detected) * 1e3, 1)
        self._history.append(
            {"epoch": self._view.epoch, "time": time.time(), "reason": reason, "decided_in_ms": took_ms}
        )
        log.warning("epoch %d: %s", self._view.epoch, reason)
        async with self._changed:
            self._changed.notify_all()

    async def _ask(self, call: Awaitable[T], timeout_s: float | None = None) -> T | None:
        """The answer, or None where the shard fails or stays silent."""
        try:
            async with asyncio.timeout(timeout_s or self._timeouts.ping_s):
                return await call
        except Exception as error:
            log.info("a shard did not answer: %s", str(error)[:200] or type(error).__name__)
            return None

    def _spawn(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _new_id(self) -> str:
        self._next_number += 1
        return f"shard-{self._next_number - 1}"
