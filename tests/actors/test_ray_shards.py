"""What Ray's errors mean to the supervisor."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError

from actors.fleet import Fleet
from actors.processes import Process
from actors.ray_shards import RayShardHandle, reach
from cluster.settings import Timeouts
from tests.actors.test_supervisor import FakeStarter


def actor_that_raises(error: Exception) -> Any:
    async def remote(*_: Any) -> Any:
        raise error

    names = ("info", "ping", "load", "keep_only", "remember", "held")
    return SimpleNamespace(**{name: SimpleNamespace(remote=remote) for name in names})


@pytest.mark.parametrize(
    ("error", "state"), [(ActorUnavailableError("connection reset", None), "silent"), (ActorDiedError(), "dead")]
)
def test_an_actor_that_is_unavailable_for_a_while_is_silent_and_not_dead(error: Exception, state: str) -> None:
    handle = RayShardHandle(actor_that_raises(error))
    fleet = Fleet(FakeStarter(), Timeouts(), clock=lambda: 0.0, changed=lambda: None, progress=lambda line: None)
    assert asyncio.run(fleet._state(handle, 60.0)) == state


def test_every_call_to_an_unavailable_actor_times_out() -> None:
    handle = RayShardHandle(actor_that_raises(ActorUnavailableError("connection reset", None)))
    for call in (handle.info, handle.held, lambda: handle.load([], 1), lambda: handle.keep_only([], 1)):
        with pytest.raises(TimeoutError, match="connection reset"):
            asyncio.run(call())
    with pytest.raises(TimeoutError):
        asyncio.run(handle.remember({}))


def test_a_shard_is_found_although_its_connection_broke_at_first() -> None:
    answers = [ActorUnavailableError("connection reset", None), None]

    async def remote() -> dict[str, Any]:
        if (now := answers.pop(0)) is not None:
            raise now
        return {"node_id": "n", "pid": 7, "process_started": 8}

    handle = RayShardHandle(SimpleNamespace(info=SimpleNamespace(remote=remote)))
    assert asyncio.run(reach(handle)) == ("n", Process(7, 8)) and not answers


def test_a_dead_shard_is_not_asked_again() -> None:
    with pytest.raises(ActorDiedError):
        asyncio.run(reach(RayShardHandle(actor_that_raises(ActorDiedError()))))
