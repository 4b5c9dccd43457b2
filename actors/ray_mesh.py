"""The supervisor as a Ray actor, and how routers reach it and the shards. Shards: see actors.ray_shards."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import ray

from actors.ledger import Ledger, Totals
from actors.logs import start_logging
from actors.mesh_plan import MeshPlan
from actors.ray_shards import NAMESPACE, RayShardStarter, ShardResources, actor_name
from actors.supervisor import Supervisor
from cluster.settings import Timeouts
from cluster.view import MeshView

if TYPE_CHECKING:
    from actors.specs import ShardSpec

log = logging.getLogger("expertmesh.ray")

WAIT_S = 1.0


class SupervisorActor:
    """The Supervisor as an async Ray actor. Starting happens in the background; `started` waits for it."""

    def __init__(
        self, mesh: str, plan: MeshPlan, spec: ShardSpec, resources: ShardResources, timeouts: Timeouts
    ) -> None:
        start_logging("supervisor", spec.log_format)
        self._lines: list[str] = []  # of the start; nobody asks for later ones
        self._ledger = Ledger(time.monotonic)  # of the ingresses; here since all of them know this actor
        starter = RayShardStarter(mesh, spec, resources, start_s=timeouts.start_s)
        self._supervisor = Supervisor(plan, starter, timeouts, progress=self._note_progress)
        self._start: asyncio.Task[None] | None = None

    def _note_progress(self, line: str) -> None:
        if self._start is None or not self._start.done():
            self._lines.append(line)

    async def started(self) -> None:
        """Returns when epoch 1 is published; raises what went wrong at the start."""
        await asyncio.shield(self._begin())

    async def progress(self, seen: int) -> list[str]:
        """What has been loaded so far, from line `seen` on."""
        return self._lines[seen:]

    async def next_view(
        self, router_id: str, info: dict[str, Any], seen_epoch: int, live_epoch: int
    ) -> MeshView | None:
        self._begin()
        return await self._supervisor.next_view(router_id, info, seen_epoch, live_epoch, WAIT_S)

    async def report(self, router_id: str, epoch: int, suspects: tuple[str, ...], reason: str) -> None:
        await self._supervisor.report(router_id, epoch, suspects, reason)

    async def routers(self) -> list[dict[str, Any]]:
        return self._supervisor.routers()

    async def mesh(self) -> dict[str, Any]:
        return {**await self._supervisor.mesh(), "supervisor_pid": os.getpid()}

    async def scale(self, num_shards: int) -> dict[str, Any]:
        return await self._supervisor.scale(num_shards)

    async def shutdown(self) -> None:
        if self._start is not None:
            self._start.cancel()
            await asyncio.gather(self._start, return_exceptions=True)
        await self._supervisor.shutdown()

    async def share(self, ingress_id: str, totals: Totals) -> Totals:
        return self._ledger.share(ingress_id, totals)

    async def admit(self, key: str, request_id: str, limits: dict[str, Any]) -> tuple[str, float]:
        return self._ledger.admit(key, request_id, **limits)

    async def release(self, key: str, request_id: str) -> None:
        self._ledger.release(key, request_id)

    def _begin(self) -> asyncio.Task[None]:
        """Start, or try again after a start that failed."""
        task = self._start
        if task is None or (task.done() and not task.cancelled() and task.exception() is not None):
            self._start = asyncio.ensure_future(self._supervisor.start())
        assert self._start is not None
        return self._start


def ensure_supervisor(mesh: str, plan: MeshPlan, spec: ShardSpec, resources: ShardResources, timeouts: Timeouts) -> Any:
    """The mesh's supervisor, started if there is none yet."""
    return (
        ray.remote(SupervisorActor)
        .options(
            name=actor_name(mesh, "supervisor"),
            namespace=NAMESPACE,
            lifetime="detached",
            get_if_exists=True,
            max_restarts=-1,
            max_concurrency=1000,
            num_cpus=0,
            resources={"node:__internal_head__": 0.001},  # where Ray's own head is: never cut off from it alone
        )
        .remote(mesh, plan, spec, resources, timeouts)
    )


class RayMeshClient:
    """Implements actors.membership.MeshClient. info: what the supervisor tells others about this router."""

    def __init__(self, mesh: str, info: Callable[[], dict[str, Any]], timeouts: Timeouts) -> None:
        self._mesh = mesh
        self._info = info
        self._timeouts = timeouts
        self._actors: dict[str, Any] = {}

    def next_view(self, router_id: str, seen_epoch: int, live_epoch: int) -> MeshView | None:
        try:
            call = self._actor("supervisor").next_view.remote(router_id, self._info(), seen_epoch, live_epoch)
            view: MeshView | None = ray.get(call, timeout=WAIT_S + 5.0)
        except Exception:  # the handle may be of a dead actor: looked up anew next time
            self._actors.pop("supervisor", None)
            raise
        return view

    def join(
        self, view: MeshView, *, router_id: str, store_host: str, store_port: int, group: str, transport: str
    ) -> Callable[[], tuple[str, ...]]:
        calls = {}
        unreachable = []
        for i, member in enumerate(view.shards):
            try:
                calls[member.shard_id] = self._actor(member.shard_id).join.remote(
                    router_id=router_id,
                    store_host=store_host,
                    store_port=store_port,
                    group=group,
                    epoch=view.epoch,
                    rank=i + 1,
                    world_size=len(view.shards) + 1,
                    transport=transport,
                )
            except Exception as error:
                log.warning("%s can't be asked to join: %s", member.shard_id, str(error)[:200])
                unreachable.append(member.shard_id)
        for part in {*self._actors} - {m.shard_id for m in view.shards} - {"supervisor"}:
            self._actors.pop(part, None)

        def failed() -> tuple[str, ...]:
            """As soon as one is known to have failed; those that never answered only at the end."""
            names, pending = list(unreachable), {call: shard_id for shard_id, call in calls.items()}
            end = time.monotonic() + self._timeouts.formation_s + 1.0
            while pending and not names:
                left_s = max(end - time.monotonic(), 0.0)
                ready, _ = ray.wait(list(pending), num_returns=1, timeout=left_s)
                for call in ready:
                    shard_id = pending.pop(call)
                    try:
                        ray.get(call)
                    except ray.exceptions.RayTaskError:
                        continue  # it was there, and saw the formation fail
                    except Exception as error:  # the actor is gone, or can't be asked: either way it didn't join
                        names.append(shard_id)
                        if not isinstance(error, ray.exceptions.ActorUnavailableError):
                            self._actors.pop(shard_id, None)  # another may have its name after a total loss
                if not ready:
                    names += pending.values()
            return tuple(names)

        return failed

    def report(self, router_id: str, epoch: int, suspects: tuple[str, ...], reason: str) -> None:
        try:
            self._actor("supervisor").report.remote(router_id, epoch, suspects, reason)
        except Exception as error:
            log.warning("no report to the supervisor: %s", str(error)[:200])
            self._actors.pop("supervisor", None)

    def _actor(self, part: str) -> Any:
        if part not in self._actors:
            self._actors[part] = ray.get_actor(actor_name(self._mesh, part), NAMESPACE)
        return self._actors[part]
