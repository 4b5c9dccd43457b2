"""`expertmesh down`: end what `serve` started."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from typing import Annotated

import typer

from deploy.cli_options import fail


def down(
    port: Annotated[int | None, typer.Option(help="Only the service on this port.")] = None,
    address: Annotated[str | None, typer.Option(help="End the service on this Ray cluster instead.")] = None,
    name: Annotated[
        str | None, typer.Option(help="Only this mesh's supervisor and shards on that cluster; the application stays.")
    ] = None,
    wait: Annotated[float, typer.Option(help="Seconds to wait for the end.")] = 30.0,
) -> None:
    """End the services that this user runs here, or with --address the one on a Ray cluster (Ray itself stays)."""
    if address is not None:
        if port is not None:
            fail("--port is for services here; with --address leave it away")
        _down_on_cluster(address, name)
        return
    if name is not None:
        fail("--name is for a mesh on a Ray cluster; say which with --address (auto: the one of this machine)")
    from deploy.service_record import services

    found = [s for s in services() if port is None or s.url.endswith(f":{port}")]
    if not found:
        fail("no service of yours runs here" + (f" on port {port}" if port is not None else ""))
    for service in found:
        with contextlib.suppress(ProcessLookupError):
            os.kill(service.process.pid, signal.SIGINT)
    deadline = time.monotonic() + wait
    while any(s.process.is_alive for s in found) and time.monotonic() < deadline:
        time.sleep(0.1)
    for service in found:
        if service.process.is_alive:
            fail(f"{service.url} (pid {service.process.pid}) still runs after {wait:.0f} s; kill it")
        typer.echo(f"ended {service.url}")


def _down_on_cluster(address: str, name: str | None) -> None:
    from deploy.app import APP_NAME
    from deploy.cluster_access import connect, end_service

    connect(address)
    ended = end_service(APP_NAME, name)
    if not ended:
        fail(f"no service on {address}" + (f" with a mesh {name!r}" if name is not None else ""))
    typer.echo(f"ended {', '.join(ended)}")
