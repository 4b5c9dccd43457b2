"""The Serve application: ingress and router as deployments of their own.

    serve run deploy.app:build_app model.path=/models/qwen mesh.shards=4       (or the same keys under `args` in a YAML)

The supervisor and the shards are detached actors that the first router (or the CLI) starts; they outlive every
replica. Tokens don't travel through Serve: ingresses talk to routers over links of their own, so a replica that dies
is noticed in milliseconds.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import secrets
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import ray
from ray import serve
from ray.util.metrics import Gauge

from actors.kv_budget import kv_budget
from actors.logs import start_logging
from actors.mesh_plan import MeshPlan
from actors.model_source import load_config
from actors.ray_mesh import RayMeshClient, ensure_supervisor
from actors.ray_shards import NAMESPACE, actor_name, granted_cores, node_host, worker_environment
from deploy import specs
from deploy.ingress import create_api
from deploy.ray_metrics import RayMetrics
from deploy.router_pool import RouterPool
from deploy.served_model import ServedModel
from deploy.settings import Settings, load
from deploy.supervisors import Supervisors

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
        spec = specs.router_spec(parsed, granted_cores())
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

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self._router.stop()


class IngressReplica:
    """The HTTP face as a Serve deployment: deploy.ingress over the links to the routers. Imports no torch.

    port_path: of deploy.listener, where it answers by itself; None: Serve's proxies are before it."""

    def __init__(self, settings: dict[str, Any], port_path: str | None, *routers: DeploymentHandle[Any]) -> None:
        self._settings = Settings.model_validate(settings)
        self._port_path = port_path
        start_logging("ingress", self._settings.server.log_format)
        self._routers = routers  # keeps the routers part of the application; requests go over the links

    def __serve_build_asgi_app__(self) -> FastAPI:
        settings = self._settings
        by_mesh = {one.mesh.name: _models_of_mesh(one) for one in settings.each_mesh()}
        supervisors = Supervisors(
            {mesh: [name for model in models for name in model.names] for mesh, models in by_mesh.items()},
            lambda mesh: ray.get_actor(actor_name(mesh, "supervisor"), NAMESPACE),
        )
        return create_api(
            settings,
            [model for models in by_mesh.values() for model in models],
            RouterPool(supervisors.routers, settings),
            supervisors=supervisors,
            ray_metrics=RayMetrics(Gauge, with_mesh=serve.get_replica_context().rank.rank == 0),
            port_path=self._port_path,
            behind_serve=self._port_path is None,
        )


def build_app(args: Mapping[str, Any]) -> serve.Application:
    """The application from settings: nested as in the YAML ({"mesh": {"shards": 4}}) or dotted ("mesh.shards": 4).

    EXPERTMESH_* variables fill in what is not given. Raises ValueError with one line.
    """
    return bind(load(environ=os.environ, flags=args).settings)


def bind(settings: Settings, *, port_path: str | None = None) -> serve.Application:
    """The deployments with their resources, bound to these settings: routers for each mesh, and one ingress, behind
    Serve's proxies or at the port that deploy.listener gives at this path.

    Raises ValueError where Ray would run anybody's code."""
    if os.environ.get("RAY_AUTH_MODE") != "token" and not settings.server.allow_open_ray:
        raise ValueError(
            "Ray runs without token authentication, so whoever reaches its ports can run code: set RAY_AUTH_MODE=token "
            "and RAY_AUTH_TOKEN for `ray start` and for this, or server.allow_open_ray where nobody else is"
        )
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
        ray_actor_options={
            "num_cpus": settings.server.ingress_cpus,
            "resources": settings.server.ingress_resources,
        },
    )(serve.ingress()(IngressReplica))
    meshes = settings.each_mesh()
    routers = [_bind_router(mesh, "router" if mesh is meshes[0] else f"router-{mesh.mesh.name}") for mesh in meshes]
    application: serve.Application = ingress.bind(settings.model_dump(mode="json"), port_path, *routers)
    return application


def _bind_router(settings: Settings, name: str) -> serve.Application:
    """The routers of one mesh."""
    specs.router_spec(settings)  # contradictions show here, not in a replica's log
    router = serve.deployment(
        name=name,
        num_replicas=settings.mesh.routers,
        max_ongoing_requests=1000,
        health_check_period_s=0.5,  # how soon a dead one is noticed
        health_check_timeout_s=10,
        graceful_shutdown_timeout_s=5,
        ray_actor_options={
            "num_cpus": settings.mesh.router_cpus,
            "num_gpus": settings.mesh.router_gpus,
            "resources": settings.mesh.router_resources,
            "runtime_env": {"env_vars": worker_environment(settings.engine.threads or 1)},
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
    models = [
        ServedModel.from_directory(
            directory,
            names=specs.served_names(settings),
            tokenizer_directory=tokenizer,
            chat_template_file=settings.model.chat_template,
            max_model_len=settings.model.max_model_len,
            use_generation_config=settings.model.generation_config == "auto",
        )
    ]
    if settings.engine.seed is not None:
        defaults = {**models[0].sampling_defaults, "seed": settings.engine.seed}
        models = [replace(models[0], sampling_defaults=defaults)]
    for name, path in specs.heads(settings).items():
        models.append(ServedModel.from_directory(path, names=(name,), tokenizer_directory=tokenizer or str(directory)))
    room = kv_budget(specs.router_spec(settings), load_config(directory, None)).max_model_len
    if room < models[0].max_model_len:
        log.warning(
            "%s: contexts of %d tokens and not the checkpoint's %d: that is what the KV cache holds; "
            "--kv-cache-bytes (or --num-kv-blocks, where that is set) gives it more",
            *(models[0].names[0], room, models[0].max_model_len),
        )
    return [replace(model, max_model_len=min(model.max_model_len, room)) for model in models]


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
