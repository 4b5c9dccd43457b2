"""A running Ray cluster from a command: connecting, asking every node, ending what runs there."""

from __future__ import annotations

import contextlib
import logging
import socket
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cluster.errors import first_line, root_cause
from deploy.node_report import Source

PROBE_S = 3.0


def connect(address: str) -> None:
    """Raises ValueError with one line where that can't be."""
    import os

    os.environ.setdefault("RAY_AUTH_MODE", "token")
    import ray

    try:
        ray.init(
            address=address, namespace="expertmesh", logging_level=logging.ERROR, log_to_driver=False,
            configure_logging=False, ignore_reinit_error=True,
        )  # fmt: skip
    except Exception as error:
        raise ValueError(
            f"no Ray cluster at {address!r}: {first_line(error, 200)}; start one with `ray start`, and give every "
            "command the same RAY_AUTH_MODE and RAY_AUTH_TOKEN"
        ) from None


def run_on_each_node(
    nodes: Sequence[Mapping[str, Any]], models: Sequence[Source]
) -> Iterator[tuple[str, dict[str, Any] | str]]:
    """(node, {"report", "unreachable"}) or (node, what went wrong)."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from actors.ray_shards import node_host

    # A port of ours too, so that each node tries the way back.
    with socket.create_server((node_host(), 0)) as server:
        others = [(str(node["NodeManagerAddress"]), int(node["NodeManagerPort"])) for node in nodes]
        home = server.getsockname()[:2]
        probe = ray.remote(num_cpus=0, max_retries=0)(_inspect)
        calls = []
        for node in nodes:
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            call = probe.options(scheduling_strategy=there).remote(list(models), [*others, home])
            calls.append((str(node["NodeManagerAddress"]), call))
        for name, call in calls:
            try:
                yield name, ray.get(call, timeout=120)
            except Exception as error:
                yield name, f"no report: {root_cause(str(error))}; is expertmesh installed there?"


def _inspect(models: Sequence[Source], others: Sequence[tuple[str, int]]) -> dict[str, Any]:
    """Runs on a node."""
    from deploy.node_report import node_report

    unreachable = []
    for host, port in others:
        try:
            socket.create_connection((host, port), timeout=PROBE_S).close()
        except OSError as error:
            unreachable.append(f"{host}:{port} ({error.strerror or error})")
    return {"report": node_report(models), "unreachable": unreachable}


def end_service(app: str, mesh: str | None) -> list[str]:
    """End shards and supervisor of one mesh; without a name the Serve application, and those of all meshes. What was
    there, in words."""
    import ray
    from ray import serve

    from actors.ray_shards import NAMESPACE, actor_name

    logging.getLogger("ray.serve").setLevel(logging.ERROR)  # it tells of each step
    ended = []
    with contextlib.suppress(Exception):
        if mesh is None and app in serve.status().applications:
            serve.delete(app)
            ended.append(f"application {app}")

    def names() -> list[str]:
        return [one["name"] for one in ray.util.list_named_actors(all_namespaces=True) if one["namespace"] == NAMESPACE]

    suffix = "/supervisor" if mesh is None else actor_name(mesh, "supervisor")
    for name in (name for name in names() if name.endswith(suffix)):
        supervisor = ray.get_actor(name, NAMESPACE)
        with contextlib.suppress(Exception):
            ray.get(supervisor.shutdown.remote(), timeout=30)
        ray.kill(supervisor, no_restart=True)
        ended.append(f"mesh {name.split('/')[1]}")
    shards = "/shard-" if mesh is None else actor_name(mesh, "shard-")
    for name in (name for name in names() if shards in name):  # left by a supervisor that couldn't end them
        with contextlib.suppress(ValueError):
            ray.kill(ray.get_actor(name, NAMESPACE), no_restart=True)
            ended.append(name.rpartition("/")[2])
    return ended
