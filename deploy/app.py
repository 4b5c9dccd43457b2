"""The Serve application: ingress and router as deployments of their own.

    serve run deploy.app:build_app model.path=/models/qwen mesh.shards=4       (or the same keys under `args` in a YAML)

The supervisor and the shards are detached actors that the first router (or the CLI) starts; they outlive every
replica. Tokens don't travel through Serve: ingresses talk to routers over links of their own, so a replica that dies
is noticed in milliseconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import secrets
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import ray
from ray import serve

from actors.logs import start_logging
from actors.mesh_plan import MeshPlan
from actors.model_source import load_config
from actors.ray_mesh import RayMeshClient, ensure_supervisor
from actors.ray_shards import NAMESPACE, actor_name, node_host, worker_environment
from deploy import specs
from deploy.errors import Unavailable
from deploy.ingress import create_api
from deploy.metrics import Totals
from deploy.router_pool import PoolOptions, RouterPool
from deploy.served_model import ServedModel
from deploy.settings import Settings, load, take_models

if TYPE_CHECKING:
    from fastapi import FastAPI
    from ray.serve.handle import DeploymentHandle

log = logging.getLogger("expertmesh.app")

APP_NAME = "expertmesh"


class RouterReplica:
    """actors.router.Router as a Serve deployment. Healthy as long as its engine runs."""

    def __init__(self, settings: dict[str, Any]) -> None:
        import torch

        from actors.router import Router

        parsed = Settings.model_validate(settings)
        context = serve.get_replica_context()
        router_id = f"router-{context.replica_id.unique_id}"
        start_logging(router_id, parsed.server.log_format)
        ensure_mesh(parsed)
        runtime = ray.get_runtime_context()
        host = node_host()
        info = {"router_id": router_id, "host": host, "port": 0, "pid": os.getpid(), "node_id": runtime.get_node_id()}
        spec = specs.router_spec(parsed)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._router = Router(
            router_id,
            spec,
            host=host,
            device=device,
            client=RayMeshClient(
                parsed.mesh.name,
                lambda: {**info, "port": self._router.port, "figures": self._router.figures()},
                spec.timeouts,
            ),
        )
        self._router.start()
        gc.freeze()  # a failed group is collected in the middle of a recovery: 0.2 s less without torch's own objects

    def check_health(self) -> None:
        """Serve calls this; an exception makes it replace the replica."""
        if not self._router.is_alive:
            raise RuntimeError("the engine's thread has ended")

    def record_autoscaling_stats(self) -> dict[str, float]:
        """For Serve's autoscaling: what runs and waits here."""
        scheduler = self._router.engine.scheduler
        return {"ongoing": float(len(scheduler.running) + len(scheduler.waiting))}

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self._router.stop()


class IngressReplica:
    """The HTTP face as a Serve deployment: deploy.ingress over the links to the routers. Imports no torch."""

    def __init__(self, settings: dict[str, Any], *routers: DeploymentHandle[Any]) -> None:
        self._settings = Settings.model_validate(settings)
        start_logging("ingress", self._settings.server.log_format)
        self._routers = routers  # keeps the routers part of the application; requests go over the links
        self._mesh_names = [one.mesh.name for one in self._settings.each_mesh()]
        self._supervisors: dict[str, Any] = {}
        self._listed: dict[str, list[dict[str, Any]]] = {}
        self._pool: RouterPool | None = None

    def __serve_build_asgi_app__(self) -> FastAPI:
        settings = self._settings
        mesh = settings.mesh
        self._pool = pool = RouterPool(
            self._discover,
            PoolOptions(
                token=mesh.token,
                discover_interval_s=mesh.discover_interval_s,
                connect_timeout_s=mesh.connect_timeout_s,
                router_silence_s=mesh.router_silence_s,
                router_wait_s=settings.limits.router_wait_s,
            ),
        )
        api = create_api(
            settings, served_models(settings), pool, mesh_info=self._mesh, mesh_scale=self._scale, ledger=self
        )
        gc.freeze()  # a full collection would hold up every stream
        return api

    async def _discover(self) -> list[dict[str, Any]]:
        """The routers of all meshes. Where a supervisor is away, its last answer stands."""
        answers = await asyncio.gather(
            *(self._ask("routers", mesh=name) for name in self._mesh_names), return_exceptions=True
        )
        for name, answer in zip(self._mesh_names, answers, strict=True):
            if not isinstance(answer, BaseException):
                self._listed[name] = list(answer)
            elif len(self._mesh_names) == 1:
                raise answer
            else:
                log.warning("mesh %s: its supervisor does not answer: %s", name, answer)
        return [router for routers in self._listed.values() for router in routers]

    async def _mesh(self) -> dict[str, Any]:
        """The supervisor's view, and each router's own figures over its link; further meshes under `further_meshes`."""
        assert self._pool is not None
        views = asyncio.gather(*(self._ask("mesh", mesh=name) for name in self._mesh_names))
        try:
            found, stats = await asyncio.gather(views, self._pool.command("stats", timeout_s=2.0))
        except Exception as error:
            raise _no_supervisor(error) from None
        first, *further = [
            {**mesh, "routers": [{**r, **stats.get(r["router_id"], {})} for r in mesh["routers"]]} for mesh in found
        ]
        return {**first, "further_meshes": dict(zip(self._mesh_names[1:], further, strict=True))} if further else first

    async def _scale(self, num_shards: int) -> dict[str, Any]:
        """Raises ValueError for a number that can't be."""
        try:
            return dict(await self._ask("scale", num_shards))
        except ValueError:
            raise
        except Exception as error:
            raise _no_supervisor(error) from None

    async def share(self, ingress_id: str, totals: Totals) -> Totals:
        return dict(await self._ask("share", ingress_id, totals))

    async def admit(self, key: str, request_id: str, **limits: Any) -> tuple[str, float]:
        refused, wait_s = await self._ask("admit", key, request_id, limits)
        return str(refused), float(wait_s)

    async def release(self, key: str, request_id: str) -> None:
        await self._ask("release", key, request_id)

    async def _ask(self, method: str, *args: Any, mesh: str | None = None) -> Any:
        """Call a mesh's supervisor, the first's by default; after an error look it up again: it may be a new one."""
        mesh = mesh or self._mesh_names[0]
        try:
            if mesh not in self._supervisors:
                name = actor_name(mesh, "supervisor")
                self._supervisors[mesh] = await asyncio.to_thread(ray.get_actor, name, NAMESPACE)
            async with asyncio.timeout(5.0):
                return await getattr(self._supervisors[mesh], method).remote(*args)
        except Exception:
            self._supervisors.pop(mesh, None)
            raise


def _no_supervisor(error: Exception) -> Unavailable:
    log.warning("the supervisor does not answer: %s", str(error)[:300] or type(error).__name__)
    return Unavailable("the mesh's supervisor is away; requests are served meanwhile, ask again", code="no_supervisor")


def build_app(args: Mapping[str, Any]) -> serve.Application:
    """The application from settings: nested as in the YAML ({"mesh": {"shards": 4}}) or dotted ("mesh.shards": 4).

    EXPERTMESH_* variables fill in what is not given. Raises ValueError with one line.
    """
    args = dict(args)
    further_models = take_models(args, "arguments")
    return bind(load(environ=os.environ, flags=_dotted(args), further_models=further_models).settings)


def bind(settings: Settings) -> serve.Application:
    """The deployments with their resources, bound to these settings: routers for each mesh, and one ingress."""
    if settings.mesh.token is None:
        settings = settings.model_copy(
            update={"mesh": settings.mesh.model_copy(update={"token": secrets.token_hex(16)})}
        )
    ingress = serve.deployment(
        name="ingress",
        num_replicas=settings.server.num_ingresses,
        max_ongoing_requests=4 * settings.limits.max_queue,  # our own limits answer first, with a reason
        health_check_period_s=5,
        graceful_shutdown_timeout_s=5,
        ray_actor_options={"num_cpus": settings.server.ingress_cpus},
    )(serve.ingress()(IngressReplica))
    meshes = settings.each_mesh()
    routers = [_bind_router(mesh, "router" if mesh is meshes[0] else f"router-{mesh.mesh.name}") for mesh in meshes]
    application: serve.Application = ingress.bind(settings.model_dump(mode="json"), *routers)
    return application


def _bind_router(settings: Settings, name: str) -> serve.Application:
    """The routers of one mesh."""
    specs.router_spec(settings)  # contradictions show here, not in a replica's log
    router = serve.deployment(
        name=name,
        num_replicas=settings.mesh.routers,
        max_ongoing_requests=1000,
        health_check_period_s=2,
        health_check_timeout_s=10,
        graceful_shutdown_timeout_s=5,
        ray_actor_options={
            "num_cpus": settings.mesh.router_cpus,
            "num_gpus": settings.mesh.router_gpus,
            "resources": settings.mesh.router_resources,
            "runtime_env": {"env_vars": worker_environment(settings.engine.threads)},
        },
    )(RouterReplica)
    bound: serve.Application = router.bind(settings.model_dump(mode="json"))
    return bound


def served_models(settings: Settings) -> list[ServedModel]:
    """The models of all meshes as the API sees them. Raises ValueError for one that can't be served."""
    return [model for mesh in settings.each_mesh() for model in _models_of_mesh(mesh)]


def _models_of_mesh(settings: Settings) -> list[ServedModel]:
    directory = specs.model_directory(settings)
    tokenizer = settings.model.tokenizer
    use_defaults = settings.model.generation_config == "auto"
    models = [
        ServedModel.from_directory(
            directory,
            names=specs.served_names(settings),
            tokenizer_directory=tokenizer,
            chat_template_file=settings.model.chat_template,
            max_model_len=settings.model.max_model_len,
            use_generation_config=use_defaults,
        )
    ]
    for name, path in specs.heads(settings).items():
        models.append(ServedModel.from_directory(path, names=(name,), tokenizer_directory=tokenizer or str(directory)))
    return models


def plan_of(settings: Settings) -> MeshPlan:
    """The mesh these settings ask for. Raises ValueError where the model doesn't allow it."""
    return specs.mesh_plan(settings, load_config(specs.model_directory(settings), None))


def ensure_mesh(settings: Settings) -> Any:
    """The mesh's supervisor; started, with its shards, if there is none."""
    return ensure_supervisor(
        settings.mesh.name,
        plan_of(settings),
        specs.shard_spec(settings),
        specs.shard_resources(settings),
        specs.timeouts(settings),
    )


def _dotted(args: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in args.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}.{field}": inner for field, inner in value.items()}
        else:
            flat[name] = value
    return flat
