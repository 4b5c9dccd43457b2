"""`expertmesh serve`: Ray, the mesh and the HTTP front on this machine, and all of it gone again at Ctrl-C."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.processes import descendants, end
from cluster.errors import root_cause
from deploy.http_client import CallError, Client
from deploy.listener import family_of, open_port, shown
from deploy.log_tail import WithoutRay, followed, repeating
from deploy.settings import Settings
from deploy.tracing import exporter_to

log = logging.getLogger("expertmesh.launch")

START_S = 600.0


class StartError(RuntimeError):
    """The service did not come up; the message is one line that says what to do."""


@dataclass(frozen=True, slots=True)
class Running:
    """A service that is up. url: where it listens; endpoints: the paths to POST to with `model`, the plainest first."""

    url: str
    model: str
    endpoints: tuple[str, ...]
    start_s: float


@contextlib.contextmanager
def running(settings: Settings, say: Callable[[str], None]) -> Iterator[Running]:
    """Start everything, yield when the first request can be answered, and end every process afterwards.

    Raises ValueError for settings or a model that can't be served, StartError for what went wrong on the way.
    """
    began = time.monotonic()
    if (problem := port_problem(settings.server.host, settings.server.port)) is not None:
        raise ValueError(problem)
    exporter_to(settings.server.otlp_traces_endpoint)
    _quiet_environment()
    import ray
    from ray import serve

    from deploy import app as application
    from deploy import specs

    models = application.served_models(settings)  # config and tokenizer: refused before anything is started
    meshes = settings.each_mesh()
    for mesh in meshes:
        specs.router_spec(mesh)
        application.plan_of(mesh)
    for name in ("ray.serve", "ray"):
        logging.getLogger(name).setLevel(logging.ERROR)
    say("starting Ray")
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(WithoutRay(sys.stdout)))
        stack.enter_context(contextlib.redirect_stderr(WithoutRay(sys.stderr)))
        stack.callback(_end)
        context: Any = ray.init(
            address="local",  # never somebody else's cluster
            num_cpus=max(os.cpu_count() or 1, sum(map(_cpus_wanted, meshes))),
            resources=_custom_resources(meshes),
            include_dashboard=False,
            logging_level=logging.ERROR,
            log_to_driver=False,
            _node_ip_address="127.0.0.1",
            namespace="expertmesh",
        )
        if settings.server.log_format == "json":
            stack.enter_context(followed(Path(context.address_info["session_dir"], "logs"), sys.stderr))
        say(f"Ray is up after {time.monotonic() - began:.1f} s; loading {models[0].names[0]}")
        supervisors = [application.ensure_mesh(mesh) for mesh in meshes]
        with contextlib.ExitStack() as progress:
            for supervisor in supervisors:
                progress.enter_context(_progress(supervisor, say))
            # On one machine the ingress answers by itself: Serve's proxy would add 30 ms to TTFT with 64 streams.
            serve.start(proxy_location="Disabled", logging_config={"log_level": "ERROR", "enable_access_log": False})
            port_path = stack.enter_context(open_port(settings.server.host, settings.server.port))
            bound = application.bind(settings, port_path=port_path)
            serve.run_many(
                [serve.RunTarget(bound, name=application.APP_NAME, route_prefix="/")],
                wait_for_ingress_deployment_creation=False,
                wait_for_applications_running=False,
            )
            for supervisor in supervisors:
                _wait_for_mesh(supervisor)
            url = f"http://{shown(settings.server.host, settings.server.port)}"
            _wait_until_ready(url, application.APP_NAME)
        yield Running(url, models[0].names[0], models[0].endpoints, time.monotonic() - began)


def wait_for_interrupt(meanwhile: Callable[[], None] = lambda: None, every_s: float = 2.0) -> None:
    """Return at SIGINT or SIGTERM."""
    done = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: done.set())
    while not done.wait(every_s):
        meanwhile()


def port_problem(host: str, port: int) -> str | None:
    """Why nobody can listen there, or None."""
    try:
        with socket.socket(family_of(host)) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        return f"{shown(host, port)}: {error.strerror}; choose another with --port"
    return None


def _quiet_environment() -> None:
    """Before Ray is imported: token authentication on, no usage reports, no chatter."""
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_SERVE_LOG_TO_STDERR", "0")
    os.environ.setdefault("RAY_DEDUP_LOGS", "1")
    os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"  # or a call after the end would start another cluster
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 lets any other program starve the service
    # Ray's switch for one machine alone (named after where it is the default): every one of its ports is on loopback.
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"


def _cpus_wanted(settings: Settings) -> int:
    """Ray's count of CPUs is only bookkeeping here: on one machine everything shares the cores that there are."""
    mesh = settings.mesh
    shards = 0 if mesh.local else 2 * (mesh.shards + mesh.spares) + 4  # room to replace and to scale
    return int(shards * mesh.shard_cpus + 2 * mesh.routers * mesh.router_cpus) + 4


def _custom_resources(meshes: Sequence[Settings]) -> dict[str, float]:
    wanted: dict[str, float] = defaultdict(float)
    server = meshes[0].server  # that of all
    for name, amount in server.ingress_resources.items():
        wanted[name] += amount * 2 * server.num_ingresses
    for mesh in (settings.mesh for settings in meshes):
        for name, amount in mesh.router_resources.items():
            wanted[name] += amount * 2 * mesh.routers
        for name, amount in mesh.shard_resources.items():
            wanted[name] += amount * 4 * (mesh.shards + mesh.spares + 1)
    return dict(wanted)


@contextlib.contextmanager
def _progress(supervisor: Any, say: Callable[[str], None]) -> Iterator[None]:
    """Repeat what the supervisor says about loading while the body runs."""
    import ray

    num_seen = 0

    def tell_news() -> None:
        nonlocal num_seen
        with contextlib.suppress(Exception):  # it is not up yet
            for line in ray.get(supervisor.progress.remote(num_seen), timeout=5):
                say(line)
                num_seen += 1

    with repeating(tell_news, every_s=0.2):
        yield


def _wait_for_mesh(supervisor: Any) -> None:
    import ray

    try:
        ray.get(supervisor.started.remote(), timeout=START_S)
    except ray.exceptions.RayError as error:
        raise StartError(root_cause(str(error))) from None


def _wait_until_ready(url: str, app: str) -> None:
    """The ingress is up and has found its routers."""
    from ray import serve

    client, end = Client(url=url, timeout_s=2.0, direct=True), time.monotonic() + START_S
    while time.monotonic() < end:
        status = serve.status().applications[app]
        errors = [one.message for one in status.deployments.values() if "Error" in one.message]
        if errors or status.status == "DEPLOY_FAILED":
            raise StartError(root_cause((errors or [status.message])[0]))
        with contextlib.suppress(CallError):
            client.get("/ready")
            return
        time.sleep(0.1)
    raise StartError(f"the service was not up within {START_S:.0f} s; see /tmp/ray/session_latest/logs")


def _end() -> None:
    """This Ray cluster is ours alone, so everything in it ends with it; asking each part nicely takes half a minute."""
    import ray

    below = descendants(os.getpid())
    with contextlib.suppress(Exception):
        ray.shutdown()
    end(below, grace_s=3.0)
