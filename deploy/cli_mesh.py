"""`expertmesh scale`: another number of shards, while requests run."""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer

from deploy.cli_options import LOCAL_URL, ApiKey, MeshModel, Url, fail, mesh_path
from deploy.http_client import Client


def scale(
    shards: Annotated[int, typer.Argument(min=1, help="How many shards there should be.")],
    model: MeshModel = None,
    url: Url = LOCAL_URL,
    api_key: ApiKey = None,
    wait: Annotated[float, typer.Option(min=0.0, help="Seconds to wait until it is done; 0: don't.")] = 300.0,
) -> None:
    """Start or drain shards until there are so many. Requests go on meanwhile."""
    client = Client(url=url, api_key=api_key, timeout_s=30.0)
    client.post("/mesh/scale", {"shards": shards, "model": model})
    end = time.monotonic() + wait
    while wait and not _is_done(mesh := client.get(mesh_path(model)), shards):
        if time.monotonic() > end:
            fail(f"not done after {wait:g} s: {mesh['trouble'] or 'still under way'}; GET /mesh shows how it goes")
        time.sleep(0.2)
    typer.echo(f"{shards} shards" if wait else f"going to {shards} shards")


def _is_done(mesh: dict[str, Any], shards: int) -> bool:
    serving = [shard for shard in mesh["shards"] if shard["state"] == "serving"]
    return bool(mesh["settled"]) and len(serving) == shards
