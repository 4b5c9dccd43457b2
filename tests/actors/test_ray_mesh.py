"""How a router calls shards through Ray."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.exceptions import ActorDiedError

from actors.ray_mesh import RayMeshClient
from cluster.placement import Placement
from cluster.settings import Timeouts
from cluster.view import Member, MeshView


def test_a_handle_to_a_dead_shard_is_not_used_again_for_its_namesake(monkeypatch: pytest.MonkeyPatch) -> None:
    lives = {"dead": False, "alive": True}
    there = ["dead", "alive"]  # what is found by the name, one after the other

    def get_actor(name: str, namespace: str) -> Any:
        life = there.pop(0)
        return SimpleNamespace(join=SimpleNamespace(remote=lambda **_: life))

    def get(life: str) -> None:
        if not lives[life]:
            raise ActorDiedError

    monkeypatch.setattr(ray, "get_actor", get_actor)
    monkeypatch.setattr(ray, "get", get)
    monkeypatch.setattr(ray, "wait", lambda calls, **_: (calls, []))
    member = Member(shard_id="shard-0", actor_name="a", node_id="n", host="127.0.0.1", pid=1)
    client = RayMeshClient("mesh", dict, Timeouts())

    def join(epoch: int) -> tuple[str, ...]:
        view = MeshView(epoch=epoch, placement=Placement({}), shards=(member,), reason="")
        at: dict[str, Any] = {"store_host": "127.0.0.1", "store_port": 1, "group": "g", "transport": "star"}
        return client.join(view, router_id="router-0", **at)()

    assert [join(1), join(2)] == [("shard-0",), ()]
