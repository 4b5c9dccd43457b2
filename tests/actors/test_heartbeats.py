"""Shards hear from a router also when it has no rows for them, and while it waits for the mesh."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

from actors.remote_exchange import Connection, RemoteExchange
from cluster.errors import MeshUnavailable, PeerLost
from cluster.placement import spread_evenly
from cluster.settings import Timeouts
from cluster.view import MeshView
from cluster.wire import Header, Opcode
from tests.actors.conftest import PATIENT, ThreadMesh, ask, placed
from tests.tiny import prompt_of

SHARDS = ("shard-0", "shard-1")


@dataclass
class Group:
    """A transport that notes when its shards were kept alive, or has lost one of them."""

    clock: Any
    lost: tuple[str, ...] = ()
    beats: list[float] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    shard_ids: tuple[str, ...] = SHARDS

    def keep_alive(self, header: Header) -> None:
        assert header.opcode == Opcode.IDLE and header.epoch == 1
        if self.lost:
            raise PeerLost("closed", self.lost)
        self.beats.append(self.clock())

    def leave_out(self, suspects: tuple[str, ...]) -> bool:
        self.left_out += suspects
        return False

    def keep_only(self, shard_ids: tuple[str, ...], goodbye: Header) -> None:
        pass


class Mesh:
    """A membership whose every connection stands for one epoch; waiting lets the exchange's clock go on."""

    def __init__(self) -> None:
        self.now = 100.0
        self.group = Group(lambda: self.now)
        self.current: Connection | None = self.connection(1)
        self.left: Connection | None = self.current
        self.comes_at = 0.0
        self.reports: list[tuple[str, ...]] = []
        self.exchange = RemoteExchange(
            self,
            num_experts=4,
            hidden_size=8,
            timeouts=Timeouts(heartbeat_s=2.0),
            device=torch.device("cpu"),
            clock=lambda: self.now,
        )

    def connection(self, epoch: int) -> Connection:
        placement = spread_evenly(moe_layers=[0], num_experts=4, nodes={s: s for s in SHARDS})
        return Connection.over(MeshView(epoch=epoch, shards=(), placement=placement), self.group, 1)

    def newest(self) -> Connection | None:
        return self.current

    def kept(self) -> Connection | None:
        return self.left

    def report(self, failed: Connection, suspects: tuple[str, ...], reason: str, **_: Any) -> None:
        self.reports.append(suspects)
        self.current = self.left = None

    def wait_newer(self, epoch: int, deadline_s: float) -> Connection:
        self.now += deadline_s
        if self.now < self.comes_at:
            raise MeshUnavailable("not yet")
        self.current = self.connection(epoch + 1)
        return self.current


def test_a_busy_router_keeps_its_shards_alive() -> None:
    mesh = Mesh()
    for _ in range(100):
        mesh.exchange.begin_step()
        mesh.now += 0.125
    assert mesh.group.beats == [100.0 + 2.0 * i for i in range(7)]


def test_a_group_kept_for_a_later_epoch_is_kept_alive_while_that_is_waited_for() -> None:
    mesh = Mesh()
    mesh.current, mesh.comes_at = None, 140.0
    mesh.exchange.begin_step()
    beats = mesh.group.beats
    assert mesh.exchange.epoch == 1 and mesh.now >= 140.0
    assert all(later - earlier < 3.0 for earlier, later in zip(beats, [*beats[1:], 140.0], strict=True))


def test_a_shard_of_a_kept_group_that_is_lost_is_left_out_there() -> None:
    mesh = Mesh()
    mesh.current, mesh.comes_at = None, 110.0
    mesh.group.lost = ("shard-1",)
    mesh.exchange.begin_step()
    assert set(mesh.group.left_out) == {"shard-1"} and mesh.reports == []


def test_a_shard_that_is_lost_without_having_had_rows_is_reported_before_the_step() -> None:
    mesh = Mesh()
    mesh.exchange.begin_step()
    mesh.group.lost = ("shard-1",)
    mesh.now += 2.0
    mesh.exchange.begin_step()
    assert mesh.reports == [("shard-1",)] and mesh.exchange.epoch == 1


@pytest.mark.parametrize("overlap", ["never", "always"])
@pytest.mark.parametrize("transport", ["host", "star", "all_to_all", "auto"])
def test_heartbeats_between_all_steps_change_no_token(start_router, tiny_model, transport, overlap) -> None:
    mesh = ThreadMesh(tiny_model)
    mesh.publish(placed(mesh, 4))
    router, outputs = start_router(
        mesh, transport=transport, two_batch_overlap=overlap, timeouts=replace(PATIENT, heartbeat_s=0.0)
    )
    local, expected = start_router()
    for engine in (router.engine, local.engine):
        for i in range(3):
            ask(engine, f"r{i}", prompt_of(i, 5 + 9 * i), 12 + i, seed=i)
    for i in range(3):
        assert outputs.tokens(f"r{i}") == expected.tokens(f"r{i}")
    assert mesh.reports == []
