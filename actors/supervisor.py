"""The supervisor: which shards there are, what they hold, and the epoch that everybody is on.

It keeps a target (how many shards, where each expert should be) and an actual state (the published view), and works
the difference off: in a hurry when experts are lost, in the background otherwise. It is the only one that makes
views. Serving does not need it: while it is away, nothing changes, and that is all. Its own state is rebuilt from
the shards when it restarts.

    report, sweep ──> lose(shards) ──> survivors adopt what is missing ──> publish(epoch + 1)
                                   └─> replacements start, load ─────────> publish(epoch + 2)
    scale(n) ──────> shards start, load / are drained ───────────────────> publish(epoch + 1)
    loads ─────────> propose ──> shards load the moved experts ──────────> publish(epoch + 1)

Two locks order all this: `_restoring` for changes that take their time, `_change` for making one view.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from actors.fleet import Fleet, ShardLost, ShardStarter, make_note
from actors.mesh_plan import MeshPlan, plan_placement
from actors.mesh_watch import LoadWatch, RouterFigures
from actors.view_board import ViewBoard
from cluster.balance import propose
from cluster.placement import ExpertKey, Placement, adopt, shard_order
from cluster.settings import Timeouts
from cluster.view import Member, MeshView

log = logging.getLogger("expertmesh.supervisor")
SWEEP_EVERY_S = 0.25
TRY_AGAIN_S = 3.0  # between epochs for routers that can't form a group and can't say why: others have work to do


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
        self._timeouts = timeouts
        self._clock = clock
        self._fleet = Fleet(
            starter, timeouts, clock=clock, changed=lambda: self._restore_wanted.set(), progress=progress
        )
        self._board = ViewBoard(clock)
        self._restoring = asyncio.Lock()
        self._change = asyncio.Lock()
        self._restore_wanted = asyncio.Event()
        self._watch = LoadWatch(plan, clock)
        self._tasks: set[asyncio.Task[None]] = set()
        self._num_rebalances = 0
        self._next_tries: dict[str, float] = {}  # by router
        self._trouble = ""

    @property
    def view(self) -> MeshView:
        """The one that everybody should be on."""
        return self._board.view

    # ---- life ----------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Take over the shards that are there already, or start a mesh; keep watch from then on. Raises what kept the
        first shards from starting."""
        if self._plan.num_shards == 0:
            return
        note = await self._fleet.find()
        self._plan = self._plan.with_shards(note.get("num_shards", self._plan.num_shards))
        if self._fleet.shards:
            await self._take_over()
        else:
            await self._fleet.start_now(self._plan.total_shards)
            target = self._target_placement()
            await self._load_all(target)
            async with self._change:
                await self._publish(target, "start")
        self._restore_wanted.set()
        for work in (self._sweep_forever(), self._restore_forever(), self._tune_forever()):
            self._spawn(work)

    async def _take_over(self) -> None:
        """After a restart: go on with what the shards hold. The epoch starts at the next thousand, so that no number
        that the predecessor gave away, and that no shard saw, is used again."""
        shards = dict(self._fleet.shards)
        epochs = await asyncio.gather(*(self._fleet.ask(s.handle.ping(), 2.0) for s in shards.values()))
        held = await asyncio.gather(*(self._fleet.ask(s.handle.held(), 2.0) for s in shards.values()))
        empty = Placement(dict.fromkeys(self._plan.moe_layers, ((),) * self._plan.num_experts))
        placement = empty.adding({s: keys for s, keys in zip(shards, held, strict=True) if keys})
        members = tuple(shards[s].member for s in sorted(placement.shards(), key=shard_order))
        newest = max((e for e in epochs if e is not None), default=0)
        self._board.go_beyond(newest, placement, members)
        async with self._change:
            await self._lose({}, "supervisor restarted", self._clock())

    async def shutdown(self) -> None:
        """End every shard."""
        for task in self._tasks:
            task.cancel()
        await self._fleet.end_all()

    # ---- what routers call ---------------------------------------------------------------------------

    async def next_view(
        self, router_id: str, info: dict[str, Any], seen_epoch: int, live_epoch: int, wait_s: float = 5.0
    ) -> MeshView | None:
        """Wait for a view above seen_epoch; None after wait_s. Registers the router and takes note of its figures."""
        info = dict(info)
        figures: RouterFigures | None = info.pop("figures", None)
        if figures is not None:
            self._watch.note_router(router_id, figures)
        self._board.note_router(router_id, info, live_epoch, seen_epoch)
        if seen_epoch > self.view.epoch and self.view.shards:
            await self._outrun(seen_epoch)
        try:
            return await self._board.wait_above(seen_epoch, wait_s)
        finally:
            self._board.note_alive(router_id)

    async def report(self, router_id: str, epoch: int, suspects: tuple[str, ...], reason: str) -> None:
        """A router's exchange failed. Find out who is really gone and make a new epoch. May be said twice, and is said
        again until there is one."""
        if epoch < self.view.epoch:
            return  # dealt with already
        detected = self._clock()
        async with self._change:
            if epoch == self.view.epoch:
                lost = await self._fleet.find_lost(suspects, self.view.shard_ids, epoch)
                if not suspects and not lost:
                    if detected < self._next_tries.get(router_id, 0.0):
                        return
                    self._next_tries[router_id] = detected + TRY_AGAIN_S
                await self._lose(lost, f"{router_id}: {reason}"[:300], detected)

    def _forget_router(self, router_id: str) -> None:
        self._board.forget_router(router_id)
        self._watch.forget_router(router_id)
        self._next_tries.pop(router_id, None)

    async def _outrun(self, seen_epoch: int) -> None:
        """A router knows a later epoch than we do (all shards that saw it are gone): go beyond it."""
        async with self._change:
            if seen_epoch > self.view.epoch:
                self._board.go_beyond(seen_epoch)
                await self._lose({}, f"a router has seen epoch {seen_epoch}", self._clock())

    # ---- what people and the front call --------------------------------------------------------------

    def routers(self) -> list[dict[str, Any]]:
        """Addresses of the routers heard from lately."""
        return self._board.router_infos()

    def is_complete(self) -> bool:
        return bool(self.view.shards) and not self.view.placement.missing() and not self._trouble

    async def mesh(self) -> dict[str, Any]:
        """Everything GET /mesh shows."""
        fleet, counts = self._fleet, self.view.placement.slot_counts()
        everybody = {**fleet.shards, **fleet.silent}
        infos = await asyncio.gather(*(fleet.ask(s.handle.info()) for s in everybody.values()))
        shards = []
        for (shard_id, shard), info in zip(everybody.items(), infos, strict=True):
            member = {name: getattr(shard.member, name) for name in Member.__dataclass_fields__}
            state = "serving" if shard_id in self.view.shard_ids else "standby"
            state = "silent" if shard_id in fleet.silent else state if info is not None else "unreachable"
            shards.append({**member, **(info or {}), "state": state, "num_slots": counts[shard_id]})
        return {
            **self._board.report(),
            "complete": self.is_complete(),
            "settled": self.is_settled(),
            "trouble": self._trouble or fleet.trouble,
            "target_shards": self._plan.num_shards,
            "replicas": self._plan.replicas,
            "shards": sorted(shards, key=lambda s: shard_order(s["shard_id"])),
            "starting": len(fleet.starting),
            **self._watch.report(self.view.placement),
            "num_rebalances": self._num_rebalances,
        }

    def is_settled(self) -> bool:
        """Complete, as many shards as wanted, and nothing under way."""
        enough = len(self._fleet.shards) == self._plan.total_shards and not self._fleet.silent
        busy = self._restoring.locked() or self._restore_wanted.is_set() or self._fleet.starting
        return self.is_complete() and enough and not busy

    async def scale(self, num_shards: int) -> dict[str, Any]:
        """Begin to change the number of shards, while requests run; `mesh` says "settled" when it is done.

        Raises ValueError for a number that can't be.
        """
        if self._plan.num_shards == 0 or num_shards < 1:
            raise ValueError(f"cannot scale to {num_shards} shards: give at least 1, and a mesh that has shards")
        self._plan = self._plan.with_shards(num_shards)
        self._watch.note_scaled()
        self._restore_wanted.set()
        await self._fleet.remember(make_note(num_shards))
        return {"target_shards": num_shards, "epoch": self.view.epoch, "shards": list(self.view.shard_ids)}

    # ---- losing ---------------------------------------------------------------------------------------

    async def _lose(self, lost: Mapping[str, str], why: str, detected: float) -> None:
        """Publish a view without the lost (shard id -> state). Called with the change lock held."""
        adopted = 0
        while True:
            for shard_id, state in lost.items():
                self._fleet.remove(shard_id, state)
            gone = [s for s in self.view.shard_ids if s not in self._fleet.shards]
            rest = self.view.placement.without(gone)
            if not rest.missing() or not self._fleet.shards:
                break
            adopted = len(rest.missing())
            rest, lost = await self._adopt(rest)
            if not lost:
                break
        if missing := rest.missing():
            self._trouble = f"{len(missing)} experts have no holder: {why}"
            log.error("%s", self._trouble)
        else:
            who = f"lost {', '.join(gone)}" if gone else "nobody lost"
            how = f", {adopted} experts adopted" if adopted else ""
            await self._publish(rest, f"{who}{how}: {why}", detected)
        self._restore_wanted.set()

    async def _adopt(self, rest: Placement) -> tuple[Placement, dict[str, str]]:
        """Load the experts that nobody holds any more: on spares where there are any, else on the survivors. Returns
        also the takers that were lost over it."""
        serving = rest.shards()
        spares = [s for s in self._fleet.shards if s not in serving]
        shares = adopt(rest, spares or list(self._fleet.shards))
        results = await asyncio.gather(
            *(self._fleet.load(s, keys) for s, keys in shares.items()), return_exceptions=True
        )
        done: dict[str, list[ExpertKey]] = {}
        lost: dict[str, str] = {}
        for (shard_id, keys), result in zip(shares.items(), results, strict=True):
            if result is None:
                done[shard_id] = keys
                continue
            log.warning("%s could not adopt %d experts: %s", shard_id, len(keys), str(result)[:300])
            if isinstance(result, ShardLost):
                lost[shard_id] = "silent"
            elif await self._fleet.find_lost((), [shard_id], self.view.epoch):
                lost[shard_id] = "dead"
        return rest.adding(done), lost

    # ---- restoring -----------------------------------------------------------------------------------

    async def _restore_forever(self) -> None:
        while True:
            await self._restore_wanted.wait()
            self._restore_wanted.clear()
            try:
                async with self._restoring:
                    await self._restore()
            except Exception as error:
                log.warning("restoring the mesh failed, trying again: %s", str(error)[:300] or type(error).__name__)
                await asyncio.sleep(0.5)
                self._restore_wanted.set()

    async def _restore(self) -> None:
        """Bring the number of shards and the placement to the target; no hurry, requests go on meanwhile."""
        fleet = self._fleet
        while fleet.silent:  # it may come back, with all its experts
            await asyncio.sleep(0.1)
        for _ in range(self._plan.total_shards - len(fleet.shards) - len(fleet.starting)):
            fleet.begin_start()
        if fleet.starting:
            await asyncio.wait(fleet.starting, timeout=self._timeouts.patience_s)
        if not fleet.shards:
            return
        target = self._target_placement()
        if await self._move_to(target, f"{len(target.shards())} shards in place"):
            await self._drop_surplus()

    async def _move_to(self, target: Placement, reason: str) -> bool:
        """Have everything loaded, then switch. False when somebody was lost meanwhile: another plan is needed."""
        await self._load_all(target)
        async with self._change:
            if target.shards() - set(self._fleet.shards):
                self._restore_wanted.set()
                return False
            if target != self.view.placement or self._trouble:
                await self._publish(target, reason)
        return True

    async def _drop_surplus(self) -> None:
        """After all routers moved: end drained shards, unload what the placement doesn't want."""
        epoch, waited = self.view.epoch, 0.0
        while waited < 10.0 and not self._board.all_live(epoch):
            await asyncio.sleep(0.1)
            waited += 0.1
        async with self._change:
            if epoch != self.view.epoch:
                self._restore_wanted.set()
                return
            placement = self.view.placement
            idle = sorted((s for s in self._fleet.shards if s not in placement.shards()), key=shard_order)
            self._fleet.end(idle[max(0, self._plan.total_shards - len(placement.shards())) :])
            await self._fleet.keep_only({s: placement.held_by(s) for s in placement.shards()})

    def _target_placement(self) -> Placement:
        return plan_placement(self._plan, self._fleet.nodes, self.view.placement)

    async def _load_all(self, placement: Placement) -> None:
        """Every shard loads what the placement gives it. Raises when one can't."""
        await asyncio.gather(*(self._fleet.load(s, placement.held_by(s)) for s in placement.shards()))

    # ---- tuning --------------------------------------------------------------------------------------

    async def _tune_forever(self) -> None:
        """Now and then: the right number of shards, and the hot experts where they belong."""
        while True:
            await asyncio.sleep(1.0)
            try:
                wanted = await self._watch.wanted_shards(self._fleet, self._plan)
                if wanted != self._plan.num_shards and self.is_settled():
                    log.warning("autoscaling from %d to %d shards", self._plan.num_shards, wanted)
                    await self.scale(wanted)
                elif self._watch.rebalance_due() and self.is_settled():
                    async with self._restoring:
                        await self._rebalance()
            except Exception as error:
                log.warning("tuning the mesh failed: %s", str(error)[:300] or type(error).__name__)

    async def _rebalance(self) -> None:
        """Carry out what the planner proposes, if anything."""
        loads = self._watch.balance_loads()
        policy, placement = self._plan.balance, self.view.placement
        if not loads:
            return
        serving = placement.shards()  # spares stay empty, and whoever is about to leave
        target, moves = await asyncio.to_thread(
            propose,
            placement,
            loads,
            {shard_id: node for shard_id, node in self._fleet.nodes.items() if shard_id in serving},
            max_slots=self._plan.max_slots,
            replicas=self._plan.replicas,
            max_moves=policy.max_moves,
            min_gain=policy.min_gain,
        )
        if not moves or placement is not self.view.placement:
            return
        self._watch.note_moves(moves)
        if await self._move_to(target, f"rebalanced: {len(moves)} moves"):
            self._num_rebalances += 1
            await self._drop_surplus()

    # ---- watching ------------------------------------------------------------------------------------

    async def _sweep_forever(self) -> None:
        """Notice who is gone also while nobody sends it anything."""
        while True:
            await asyncio.sleep(SWEEP_EVERY_S)
            try:
                await self._sweep()
            except Exception:  # the next round may go well
                log.exception("looking for lost shards failed")

    async def _sweep(self) -> None:
        lost = await self._fleet.sweep()
        if lost:
            async with self._change:  # which may have taken minutes: are they still?
                still = await self._fleet.find_lost(lost, lost, self.view.epoch)
                if still:
                    await self._lose(still, "no answer to pings", self._clock())
        for router_id in self._board.long_silent():
            self._forget_router(router_id)

    async def _publish(self, placement: Placement, reason: str, detected: float | None = None) -> None:
        """Make the next view known. Called with the change lock held."""
        members = tuple(self._fleet.shards[s].member for s in sorted(placement.shards(), key=shard_order))
        self._trouble = ""
        await self._board.publish(placement, members, reason, detected)

    def _spawn(self, work: Awaitable[None]) -> None:
        async def guarded() -> None:
            try:
                await work
            except Exception:  # said here, as nobody awaits it
                log.exception("a task of the supervisor ended")

        task = asyncio.ensure_future(guarded())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
