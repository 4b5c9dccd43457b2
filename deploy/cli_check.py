"""`expertmesh check`: is everything in place before anything is started?"""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from deploy.http_client import LOOPBACK
from deploy.launch import port_problem
from deploy.listener import shown
from deploy.node_report import Source

GB = 1e9


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report."""

    level: Literal["ok", "warn", "fail"]
    subject: str
    detail: str


def check(
    model: Annotated[str | None, typer.Argument(help="Directory, hub id, or nothing for the demo.")] = None,
    config: Annotated[Path | None, typer.Option(help="Settings file (YAML).")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on.")] = None,
    address: Annotated[str | None, typer.Option(envvar="RAY_ADDRESS", help="Ray cluster to look at too.")] = None,
) -> None:
    """Check versions, devices, ports, memory and the checkpoint here, and with --address on every node."""
    from rich.console import Console

    from deploy.settings import load

    flags = {"model.path": model, "server.host": host, "server.port": port}
    settings = load(file=config, environ=os.environ, flags=flags).settings
    screen = Console(highlight=False)
    levels = []
    for finding in findings(settings, address):
        colour = {"ok": "green", "warn": "yellow", "fail": "red"}[finding.level]
        screen.print(f"[{colour}]{finding.level:>4}[/{colour}]  [bold]{finding.subject:12}[/bold] ", end="")
        screen.print(finding.detail, markup=False, soft_wrap=True)
        levels.append(finding.level)
    if "fail" in levels:
        raise typer.Exit(1)


def findings(settings: Any, address: str | None) -> Iterator[Finding]:
    """Settings (deploy.settings.Settings) against this machine and, where an address is given, a Ray cluster."""
    from deploy import app, specs
    from deploy.auth import all_keys

    yield requirements()
    server = settings.server
    try:
        all_keys(server.api_keys, server.api_key_file)
    except ValueError as error:
        yield Finding("fail", "keys", str(error))
    yield listening(server.host, server.port, has_keys=bool(server.api_keys or server.api_key_file))
    directories, models = [], []
    for one in settings.each_mesh():
        try:
            directories.append(str(specs.model_directory(one)))
            models.append(specs.model_everywhere(one))
            app.served_models(one)
            app.plan_of(one)
            shards = "no shards" if one.mesh.local else f"shards: {one.mesh.shards}"
            text = f"model {one.model.path}, routers: {one.mesh.routers}, {shards}"
            yield Finding("ok", "settings", text)
        except ValueError as error:
            yield Finding("fail", "settings", str(error))
    local = subprocess.run(
        [sys.executable, "-m", "deploy.node_report", *directories],
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
        cwd=Path(__file__).parent.parent,
    )
    if local.returncode:
        yield Finding("fail", "this node", (local.stderr.strip().splitlines() or ["no report"])[-1])
        return
    here = json.loads(local.stdout.splitlines()[-1])
    yield from of_node("this node", here, here)
    if address is not None:
        yield from of_cluster(address, models, here)


def requirements() -> Finding:
    """The installed packages against what this version of ours asks for."""
    from packaging.requirements import Requirement

    wrong = []
    needed = [Requirement(text) for text in importlib.metadata.requires("expertmesh") or ()]
    needed = [r for r in needed if r.marker is None or r.marker.evaluate({"extra": ""})]
    for requirement in needed:
        try:
            found = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing")
            continue
        if not requirement.specifier.contains(found, prereleases=True):
            wrong.append(f"{requirement.name} is {found}, needed {requirement.specifier}")
    if wrong:
        return Finding("fail", "packages", "; ".join(wrong) + "; pip install -c constraints.txt expertmesh")
    ray, torch = importlib.metadata.version("ray"), importlib.metadata.version("torch")
    return Finding("ok", "packages", f"{len(needed)} as required; Ray {ray}, torch {torch}")


def listening(host: str, port: int, *, has_keys: bool) -> Finding:
    if (problem := port_problem(host, port)) is not None:
        return Finding("fail", "port", problem)
    if host not in LOOPBACK and not has_keys:
        return Finding("warn", "port", f"{shown(host, port)} is free, and others can reach it: set API keys")
    return Finding("ok", "port", f"{shown(host, port)} is free")


def of_node(name: str, report: Mapping[str, Any], expected: Mapping[str, Any]) -> Iterator[Finding]:
    """What a node reports, against what this one has."""
    gpus = ", ".join(report["gpus"]) or "no GPU"
    detail = f"{report['cpus']} CPUs ({report['vectors']}), {gpus}, {report['memory_bytes'] / GB:.1f} GB free"
    level: Literal["ok", "warn"] = "ok" if report["kernels"] == "native" or report["gpus"] else "warn"
    yield Finding(level, name, f"{detail}, kernels: {report['kernels']}")
    theirs, ours = report["versions"], expected["versions"]
    differing = [f"{n} {v} (here {ours.get(n)})" for n, v in theirs.items() if v != ours.get(n)]
    if differing:
        yield Finding("fail", name, f"other versions: {', '.join(differing)}; install the same ones")
    if report["code"] != expected["code"]:
        yield Finding("fail", name, f"other code: {report['code']}, here {expected['code']}; install the same wheel")
    for error in report["checkpoint_errors"]:
        yield Finding("fail", name, error)
    for model in report["not_fetched"]:
        yield Finding("warn", name, f"{model} is not fetched yet; this node fetches it when it starts")
    for found in report["checkpoints"]:
        size = found["bytes"] / GB
        text = f"{found['tensors']} tensors, {size:.3f} GB, {found['layers']} layers of {found['experts']} experts"
        room = report["memory_bytes"] > found["bytes"]
        yield Finding("ok" if room else "warn", name, text + ("" if room else "; more than this node's free memory"))


def of_cluster(address: str, models: Sequence[Source], here: Mapping[str, Any]) -> Iterator[Finding]:
    """A report from each node of a running Ray cluster, and whether each can be reached from here."""
    import ray

    from actors.ray_shards import live_nodes
    from deploy.cluster_access import connect, run_on_each_node

    try:
        connect(address)
    except ValueError as error:
        yield Finding("fail", "Ray", str(error))
        return
    nodes = live_nodes()
    cpus, gpus = (sum(node["Resources"].get(kind, 0) for node in nodes) for kind in ("CPU", "GPU"))
    yield Finding("ok", "Ray", f"{len(nodes)} nodes, {cpus:.0f} CPUs, {gpus:.0f} GPUs at {address}")
    for name, outcome in run_on_each_node(nodes, models):
        if isinstance(outcome, str):
            yield Finding("fail", name, outcome)
            continue
        yield from of_node(name, outcome["report"], here)
        unreachable = outcome["unreachable"]
        if unreachable:
            yield Finding(
                "fail", name, f"can't connect to {', '.join(unreachable)}; open the nodes' ports to each other"
            )
    ray.shutdown()
