"""Shards as Ray actors: what one asks Ray for, how it is started, found again, reached and ended.

All of them are detached and named, in one namespace, so a Serve replica that dies takes none of them with it:

    expertmesh/<mesh>/supervisor      expertmesh/<mesh>/shard-3
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import threading
from collections.abc import Awaitable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.logs import start_logging
from actors.processes import Process, process
from cluster.errors import root_cause
from cluster.placement import ExpertKey

if TYPE_CHECKING:
    from actors.shard import ExpertShard
    from actors.specs import ShardSpec

log = logging.getLogger("expertmesh.ray")

NAMESPACE = "expertmesh"
AGAIN_S = 0.2
JOINS = "joins"  # threads of a shard's own: routers that wait there for a member hold up nothing else


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardResources:
    """What each shard asks Ray for. spread: "pack" leaves the node to Ray, "strict" gives each shard its own."""

    num_cpus: float = 1.0
    num_gpus: float = 0.0
    resources: Mapping[str, float] = field(default_factory=dict)
    spread: Literal["pack", "strict"] = "pack"


def worker_environment(num_threads: int) -> dict[str, str]:
    """Environment of processes that compute: set before torch is imported, it makes results repeat bit by bit, and
    keeps the pages of a step's tensors for the next one (up to 32 MB each, glibc's most): a fault for every 4 KB cost
    prefill more than the arithmetic of RoPE."""
    return {
        "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
        "MALLOC_TRIM_THRESHOLD_": str(128 << 20),
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
    return str(_this_node()["NodeManagerAddress"])


def granted_cores() -> int:
    """This node's cores, as many as Ray was given (in a pod, its share) and this process may run on; 1 at the least."""
    return max(1, min(int(_this_node()["Resources"].get("CPU", 0)), len(os.sched_getaffinity(0))))


def live_nodes() -> list[dict[str, Any]]:
    """As Ray tells of them: "NodeID", "NodeManagerHostname", "Resources" and more."""
    return [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]


def _this_node() -> dict[str, Any]:
    node_id = ray.get_runtime_context().get_node_id()
    for node in live_nodes():
        if node["NodeID"] == node_id:
            return node
    raise RuntimeError(f"Ray does not list this node ({node_id})")


class ShardActor:
    """ExpertShard as a Ray actor: finds out where it is, and imports torch only in its own process.

    Importing torch takes seconds of CPU: a thread of low priority does it, so that shards and routers that serve on
    the same cores are not held up.
    """

    def __init__(self, shard_id: str, name: str, spec: ShardSpec) -> None:
        start_logging(shard_id, spec.log_format)
        self._name = name
        with ThreadPoolExecutor(1) as background:
            self._shard = background.submit(_new_shard, shard_id, spec).result()

    def info(self) -> dict[str, Any]:
        return {**self._shard.info(), "actor_name": self._name, "process_started": process(os.getpid()).started}

    def ping(self) -> int:
        return self._shard.ping()

    def load(self, keys: list[ExpertKey], order: int) -> int:
        return self._shard.load(keys, order)

    def keep_only(self, keys: list[ExpertKey], order: int) -> None:
        self._shard.keep_only(keys, order)

    def remember(self, note: dict[str, Any]) -> None:
        self._shard.remember(note)

    def held(self) -> list[ExpertKey]:
        return self._shard.held()

    @ray.method(concurrency_group=JOINS)
    def join(self, **arguments: Any) -> None:
        self._shard.join(**arguments)


def _new_shard(shard_id: str, spec: ShardSpec) -> ExpertShard:
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)  # on Linux: this thread's alone
    import torch

    from actors.shard import ExpertShard

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    node_id = ray.get_runtime_context().get_node_id()
    shard = ExpertShard(shard_id, spec, host=node_host(), node_id=node_id, device=device)
    gc.freeze()  # a group's end collects garbage while others compute: 0.2 s less without torch's own objects
    return shard


class RayShardHandle:
    """Implements actors.fleet.ShardHandle."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    async def info(self) -> dict[str, Any]:
        return dict(await _answer(self._actor.info.remote()))

    async def process(self) -> tuple[str, Process]:
        """The node's id, and the process there."""
        info = await self.info()
        return info["node_id"], Process(info["pid"], info["process_started"])

    async def ping(self) -> int:
        return int(await _answer(self._actor.ping.remote()))

    async def load(self, keys: list[ExpertKey], order: int) -> int:
        return int(await _answer(self._actor.load.remote(keys, order)))

    async def keep_only(self, keys: list[ExpertKey], order: int) -> None:
        await _answer(self._actor.keep_only.remote(keys, order))

    async def remember(self, note: dict[str, Any]) -> None:
        await _answer(self._actor.remember.remote(note))

    async def held(self) -> list[ExpertKey]:
        return list(await _answer(self._actor.held.remote()))


async def _answer(call: Awaitable[Any]) -> Any:
    """A connection that broke says nothing about the process behind it: that is silence, which may pass."""
    try:
        return await call
    except ray.exceptions.ActorUnavailableError as error:
        raise TimeoutError(str(error)) from None


async def reach(handle: RayShardHandle) -> tuple[str, Process]:
    """The node's id and the process, asked again after a connection broke; how long is the caller's to say."""
    while True:
        try:
            return await handle.process()
        except TimeoutError:
            await asyncio.sleep(AGAIN_S)


class RayShardStarter:
    """Implements actors.fleet.ShardStarter."""

    def __init__(self, mesh: str, spec: ShardSpec, resources: ShardResources, start_s: float) -> None:
        self._mesh = mesh
        self._spec = spec
        self._resources = resources
        self._start_s = start_s
        self._claimed: dict[str, str] = {}  # shard id -> node id, where nodes are handed out one each
        self._actors: dict[str, Any] = {}
        self._processes: dict[str, tuple[str, Process]] = {}  # shard id -> node id and process

    async def start(self, shard_id: str, avoid_nodes: Collection[str]) -> RayShardHandle:
        name = actor_name(self._mesh, shard_id)
        wanted = self._resources
        options: dict[str, Any] = {
            "name": name,
            "namespace": NAMESPACE,
            "lifetime": "detached",
            "max_concurrency": 32,
            "concurrency_groups": {JOINS: 32},
            "max_restarts": 0,
            "num_cpus": wanted.num_cpus,
            "num_gpus": wanted.num_gpus,
            "resources": dict(wanted.resources),
            "runtime_env": {"env_vars": worker_environment(self._spec.num_threads)},
        }
        if wanted.spread == "strict":
            options["scheduling_strategy"] = self._own_node(shard_id, set(avoid_nodes))
        create = ray.remote(**options)(ShardActor).remote
        self._actors[shard_id] = actor = await asyncio.to_thread(create, shard_id, name, self._spec)
        handle = RayShardHandle(actor)
        try:
            async with asyncio.timeout(self._start_s):
                self._processes[shard_id] = await reach(handle)
        except TimeoutError:
            raise ValueError(
                f"{shard_id} did not start within {self._start_s:.0f} s; is there room for "
                f"num_cpus={wanted.num_cpus}, num_gpus={wanted.num_gpus}, {dict(wanted.resources)} (ray status)?"
            ) from None
        except ray.exceptions.RayActorError as error:
            raise ValueError(f"{shard_id} did not start: {root_cause(str(error))}") from None
        return handle

    async def find_all(self) -> dict[str, RayShardHandle | None]:
        prefix = actor_name(self._mesh, "shard-")
        entries = await asyncio.to_thread(ray.util.list_named_actors, all_namespaces=True)
        names = [e["name"] for e in entries if e["namespace"] == NAMESPACE and e["name"].startswith(prefix)]

        async def find(name: str) -> RayShardHandle | None:
            shard_id = name.rpartition("/")[2]
            try:
                self._actors[shard_id] = actor = await asyncio.to_thread(ray.get_actor, name, NAMESPACE)
                handle = RayShardHandle(actor)
                async with asyncio.timeout(2.0):
                    self._processes[shard_id] = await reach(handle)
            except Exception as error:
                log.warning("%s is there but doesn't answer: %s", name, str(error)[:100])
                await self.kill(shard_id)
                return None
            return handle

        handles = await asyncio.gather(*(find(name) for name in names))
        return {name.rpartition("/")[2]: handle for name, handle in zip(names, handles, strict=True)}

    async def kill(self, shard_id: str) -> None:
        """End the process. ray.kill alone asks the process itself, which a stopped one does not hear."""
        self._claimed.pop(shard_id, None)
        actor, found = self._actors.pop(shard_id, None), self._processes.pop(shard_id, None)
        if actor is None:
            return
        with contextlib.suppress(Exception):  # it may be dead already, or Ray's head away
            async with asyncio.timeout(10.0):
                await asyncio.to_thread(ray.kill, actor, no_restart=True)
        if found is None:
            return
        node_id, process = found
        if node_id == ray.get_runtime_context().get_node_id():
            process.kill()
        else:
            on_its_node = NodeAffinitySchedulingStrategy(node_id, soft=False)
            ray.remote(Process.kill).options(num_cpus=0, scheduling_strategy=on_its_node).remote(process)

    def _own_node(self, shard_id: str, avoid: set[str]) -> NodeAffinitySchedulingStrategy:
        taken = avoid | set(self._claimed.values())
        needs = {"CPU": self._resources.num_cpus, "GPU": self._resources.num_gpus, **self._resources.resources}
        for node in live_nodes():
            has = node["Resources"]
            if node["NodeID"] not in taken and all(has.get(k, 0) >= v for k, v in needs.items()):
                self._claimed[shard_id] = node["NodeID"]
                return NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        raise ValueError(
            f"no node is left for {shard_id}: spread=strict gives each shard a node of its own with {needs}; "
            "add nodes, lower the number of shards, or use spread=pack"
        )
