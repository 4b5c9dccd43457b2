"""Every Ray call of the mesh: how shards and the supervisor become actors, and how they reach each other.

All of them are detached and named, in one namespace, so a Serve replica that dies takes none of them with it:

    expertmesh/<mesh>/supervisor      expertmesh/<mesh>/shard-3
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.mesh_plan import MeshPlan
from actors.supervisor import ShardHandle, Supervisor
from cluster.placement import ExpertKey
from cluster.settings import Timeouts
from cluster.view import MeshView

if TYPE_CHECKING:
    from actors.specs import ShardSpec

log = logging.getLogger("expertmesh.ray")

NAMESPACE = "expertmesh"
WAIT_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardResources:
    """What each shard asks Ray for. spread: "pack" leaves the node to Ray, "strict" gives each shard its own."""

    num_cpus: float = 1.0
    num_gpus: float = 0.0
    resources: Mapping[str, float] = field(default_factory=dict)
    spread: str = "pack"

    def __post_init__(self) -> None:
        if self.spread not in ("pack", "strict"):
            raise ValueError(f"spread={self.spread!r} must be 'pack' or 'strict'")


def worker_environment(num_threads: int) -> dict[str, str]:
    """Environment of processes that compute: set before torch is imported, it makes results repeat bit by bit."""
    return {
        "MKL_CBWR": "AVX512,STRICT" if _has_avx512() else "AVX2,STRICT",
        "OMP_NUM_THREADS": str(num_threads),
        "OMP_WAIT_POLICY": "PASSIVE",
        "TORCH_DISABLE_ADDR2LINE": "1",
    }


def _has_avx512() -> bool:
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="ignore") as file:
            return "avx512f" in file.read(20_000)
    except OSError:
        return False


def actor_name(mesh: str, part: str) -> str:
    return f"expertmesh/{mesh}/{part}"


def node_host() -> str:
    """This node's address on the cluster network, as Ray knows it; loopback where Ray was started on loopback."""
    node_id = ray.get_runtime_context().get_node_id()
    for node in ray.nodes():  # type: ignore[no-untyped-call]
        if node["NodeID"] == node_id:
            return str(node["NodeManagerAddress"])
    raise RuntimeError(f"Ray does not list this node ({node_id})")


class ShardActor:
    """ExpertShard as a Ray actor: finds out where it is, and imports torch only in its own process."""

    def __init__(self, shard_id: str, name: str, spec: ShardSpec) -> None:
        import torch

        from actors.shard import ExpertShard

        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        context = ray.get_runtime_context()
        host = node_host()
        self._name = name
        self._shard = ExpertShard(shard_id, spec, host=host, node_id=context.get_node_id(), device=device)

    def info(self) -> dict[str, Any]:
        return {**self._shard.info(), "actor_name": self._name}

    def ping(self) -> int:
        return self._shard.ping()

    def load(self, keys: list[ExpertKey]) -> int:
        return self._shard.load(keys)

    def keep_only(self, keys: list[ExpertKey]) -> None:
        self._shard.keep_only(keys)

    def held(self) -> list[ExpertKey]:
        return self._shard.held()

    def join(self, **arguments: Any) -> None:
        self._shard.join(**arguments)


class RayShardHandle:
    """Implements actors.supervisor.ShardHandle."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    async def info(self) -> dict[str, Any]:
        return dict(await self._actor.info.remote())

    async def ping(self) -> int:
        return int(await self._actor.ping.remote())

    async def load(self, keys: list[ExpertKey]) -> int:
        return int(await self._actor.load.remote(keys))

    async def keep_only(self, keys: list[ExpertKey]) -> None:
        await self._actor.keep_only.remote(keys)

    async def held(self) -> list[ExpertKey]:
        return list(await self._actor.held.remote())


class RayShardStarter:
    """Implements actors.supervisor.ShardStarter."""

    def __init__(self, mesh: str, spec: ShardSpec, resources: ShardResources, start_s: float) -> None:
        self._mesh = mesh
        self._spec = spec
        self._resources = resources
        self._start_s = start_s
        self._claimed: dict[str, str] = {}  # shard id -> node id, where nodes are handed out one each
        self._actors: dict[str, Any] = {}

    async def start(self, shard_id: str, avoid_nodes: Collection[str]) -> RayShardHandle:
        name = actor_name(self._mesh, shard_id)
        wanted = self._resources
        options: dict[str, Any] = {
            "name": name,
            "namespace": NAMESPACE,
            "lifetime": "detached",
            "max_concurrency": 32,
            "max_restarts": 0,
            "num_cpus": wanted.num_cpus,
            "num_gpus": wanted.num_gpus,
            "resources": dict(wanted.resources),
            "runtime_env": {"env_vars": worker_environment(self._spec.num_threads)},
        }
        if wanted.spread == "strict":
            options["scheduling_strategy"] = self._own_node(shard_id, set(avoid_nodes))
        actor = ray.remote(ShardActor).options(**options).remote(shard_id, name, self._spec)
        self._actors[shard_id] = actor
        handle = RayShardHandle(actor)
        try:
            async with asyncio.timeout(self._start_s):
                await handle.info()
        except TimeoutError:
            raise ValueError(
                f"{shard_id} did not start within {self._start_s:.0f} s; is there room for "
                f"num_cpus={wanted.num_cpus}, num_gpus={wanted.num_gpus}, {dict(wanted.resources)} (ray status)?"
            ) from None
        except ray.exceptions.RayActorError as error:
            raise ValueError(f"{shard_id} did not start: {_root_cause(error)}") from None
        return handle

    async def find_all(self) -> dict[str, ShardHandle]:
        prefix = actor_name(self._mesh, "shard-")
        found: dict[str, ShardHandle] = {}
        for entry in ray.util.list_named_actors(all_namespaces=True):
            if entry["namespace"] == NAMESPACE and entry["name"].startswith(prefix):
                actor = ray.get_actor(entry["name"], NAMESPACE)
                handle = RayShardHandle(actor)
                try:
                    async with asyncio.timeout(1.0):
                        await handle.info()
                except Exception as error:
                    log.warning("%s is there but doesn't answer: %s", entry["name"], str(error)[:100])
                    ray.kill(actor, no_restart=True)
                    continue
                shard_id = entry["name"].rpartition("/")[2]
                self._actors[shard_id] = actor
                found[shard_id] = handle
        return found

    async def kill(self, shard_id: str) -> None:
        self._claimed.pop(shard_id, None)
        actor = self._actors.pop(shard_id, None)
        if actor is not None:
            ray.kill(actor, no_restart=True)

    def _own_node(self, shard_id: str, avoid: set[str]) -> NodeAffinitySchedulingStrategy:
        taken = avoid | set(self._claimed.values())
        needs = {"CPU": self._resources.num_cpus, "GPU": self._resources.num_gpus, **self._resources.resources}
        for node in ray.nodes():  # type: ignore[no-untyped-call]
            has = node["Resources"]
            if node["Alive"] and node["NodeID"] not in taken and all(has.get(k, 0) >= v for k, v in needs.items()):
                self._claimed[shard_id] = node["NodeID"]
                return NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        raise ValueError(
            f"no node is left for {shard_id}: spread=strict gives each shard a node of its own with {needs}; "
            "add nodes, lower the number of shards, or use spread=pack"
        )


class SupervisorActor:
    """The Supervisor as an async Ray actor. Starting happens in the background; `started` waits for it."""

    def __init__(
        self, mesh: str, plan: MeshPlan, spec: ShardSpec, resources: ShardResources, timeouts: Timeouts
    ) -> None:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
        self._lines: list[str] = []
        starter = RayShardStarter(mesh, spec, resources, start_s=timeouts.start_s)
        self._supervisor = Supervisor(plan, starter, timeouts, progress=self._lines.append)
        self._start: asyncio.Task[None] | None = None

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

    async def forget_router(self, router_id: str) -> None:
        self._supervisor.forget_router(router_id)

    async def routers(self) -> list[dict[str, Any]]:
        return self._supervisor.routers()

    async def mesh(self) -> dict[str, Any]:
        return {**await self._supervisor.mesh(), "supervisor_pid": os.getpid()}

    async def scale(self, num_shards: int) -> dict[str, Any]:
        return await self._supervisor.scale(num_shards)

    async def shutdown(self) -> None:
        await self._supervisor.shutdown()

    def _begin(self) -> asyncio.Task[None]:
        if self._start is None:
            self._start = asyncio.ensure_future(self._supervisor.start())
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
        except Exception:
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
        known = {m.shard_id for m in view.shards} | {"supervisor"}
        self._actors = {part: actor for part, actor in self._actors.items() if part in known}

        def failed() -> tuple[str, ...]:
            names = list(unreachable)
            for shard_id, call in calls.items():
                try:
                    ray.get(call, timeout=self._timeouts.formation_s + 1.0)
                except ray.exceptions.RayTaskError:
                    continue  # it was there, and saw the formation fail
                except Exception:
                    names.append(shard_id)
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


def _root_cause(error: BaseException) -> str:
    """The last line of a remote traceback: the error itself."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__
