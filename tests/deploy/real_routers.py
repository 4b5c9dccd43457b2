"""Routers that hold all experts themselves, in this process, behind their links."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import torch

from actors.membership import MeshClient
from actors.router import Router
from actors.specs import RouterSpec


class NoMesh(MeshClient):
    """There are no shards to hear of."""

    def next_view(self, router_id: str, seen_epoch: int, live_epoch: int) -> None:
        threading.Event().wait(0.5)


class RealRouters:
    """One for each letter of `names`; `entries` names those that live."""

    def __init__(self, directory: Path, names: str = "ab", **options: Any) -> None:
        common: dict[str, Any] = {"served_name": "tiny", "local": True, "token": "t", "num_kv_blocks": 256}
        spec = RouterSpec(model=str(directory), **{**common, **options})
        self.routers = {
            name: Router(name, spec, host="127.0.0.1", device=torch.device("cpu"), client=NoMesh()) for name in names
        }
        self.ports = {name: router.start() for name, router in self.routers.items()}

    async def start(self) -> None:
        pass

    @property
    def entries(self) -> list[dict[str, Any]]:
        return [{"router_id": name, "host": "127.0.0.1", "port": port} for name, port in self.ports.items()]

    def stop(self, name: str) -> None:
        del self.ports[name]
        self.routers.pop(name).stop()

    def kill(self) -> None:
        for name in list(self.ports):
            self.stop(name)
