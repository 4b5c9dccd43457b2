"""The supervisor over shards that are plain objects: what it does when they die, stop, come back, and when it dies."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Self

import pytest

from actors.load_window import LoadWindow
from actors.mesh_plan import MeshPlan
from actors.supervisor import Supervisor
from cluster.settings import AutoscalePolicy, BalancePolicy, Timeouts
from tests.waiting import until

TIMEOUTS = Timeouts(ping_s=5.0, watch_ping_s=5.0)  # no ping comes near it: a fake says at once that it is silent
PLAN = MeshPlan(
    moe_layers=(0, 1), num_experts=6, num_shards=2, balance=BalancePolicy(enabled=False, min_tokens=10, interval_s=0.1)
)


class Clock:
    """Stands still but for the tests that move it."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


class FakeShard:
    """Implements ShardHandle. state: "", "stopped" (each call has timed out already, a load never ends) or "dead"."""

    def __init__(self, shard_id: str, node_id: str) -> None:
        self.shard_id, self.node_id = shard_id, node_id
        self.state = ""
        self.experts: set[tuple[int, int]] = set()
        self.order = 0
        self.note: dict[str, Any] = {}
        self.epoch = 0
        self.load_fails: Exception | None = None
        self.on_load: Callable[[], Awaitable[None]] | None = None

    async def _answer(self) -> None:
        if self.state == "stopped":
            raise TimeoutError(f"{self.shard_id} is silent")
        if self.state == "dead":
            raise ConnectionError(f"{self.shard_id} is dead")

    async def info(self):
        await self._answer()
        facts = {"shard_id": self.shard_id, "node_id": self.node_id, "host": "127.0.0.1", "pid": 1, "busy_s": 0.0}
        return {**facts, "order": self.order, "note": self.note}

    async def ping(self):
        await self._answer()
        return self.epoch

    async def load(self, keys, order):
        if self.on_load is not None:
            await self.on_load()
        if self.state == "stopped":
            await asyncio.Event().wait()
        await self._answer()
        if self.load_fails is not None:
            raise self.load_fails
        self.order = max(self.order, order)
        self.experts |= set(keys)
        return 0

    async def keep_only(self, keys, order):
        await self._answer()
        if order >= self.order:
            self.experts &= set(keys)

    async def held(self):
        await self._answer()
        return sorted(self.experts)

    async def remember(self, note):
        await self._answer()
        self.note = note


class FakeStarter:
    """has_room: set unless a test wants new shards to wait for it."""

    def __init__(self, num_nodes: int = 1) -> None:
        self.shards: dict[str, FakeShard] = {}
        self.ended: list[str] = []
        self.start_fails: Exception | None = None
        self.has_room = asyncio.Event()
        self.has_room.set()
        self._num_nodes = num_nodes

    async def start(self, shard_id, avoid_nodes):
        if self.start_fails is not None:
            raise self.start_fails
        await self.has_room.wait()
        assert shard_id not in self.shards, "an id was used twice"
        self.shards[shard_id] = FakeShard(shard_id, f"node-{len(self.shards) % self._num_nodes}")
        return self.shards[shard_id]

    async def find_all(self):
        return {i: s if s.state == "" else None for i, s in self.shards.items() if i not in self.ended}

    async def kill(self, shard_id):
        self.ended.append(shard_id)
        if shard_id in self.shards:
            self.shards[shard_id].state = "dead"


class Mesh:
    def __init__(self, plan: MeshPlan = PLAN, starter: FakeStarter | None = None) -> None:
        self.starter = starter or FakeStarter()
        self.clock = Clock()
        self.supervisor = Supervisor(plan, self.starter, TIMEOUTS, self.clock)
        self.views: list[Any] = []
        self.watcher: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        await self.supervisor.start()
        self.watcher = asyncio.ensure_future(self._follow())
        await until(lambda: bool(self.views))
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self.watcher is not None
        tasks = [self.watcher, *self.supervisor._tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _follow(self) -> None:
        """A router that goes live on every view at once."""
        epoch = 0
        while True:
            view = await self.supervisor.next_view("router-0", {"router_id": "router-0"}, epoch, epoch, 0.2)
            if view is not None:
                epoch = view.epoch
                self.views.append(view)
                for member in view.shards:
                    self.starter.shards[member.shard_id].epoch = epoch
                self.check(view)

    def check(self, view: Any) -> None:
        """Whatever is published can be served."""
        assert not view.placement.missing()
        for member in view.shards:
            held = self.starter.shards[member.shard_id].experts
            assert view.placement.held_by(member.shard_id) <= held, f"{member.shard_id} was given more than it has"

    @property
    def view(self) -> Any:
        return self.views[-1]

    def shard(self, number: int) -> FakeShard:
        return self.starter.shards[f"shard-{number}"]

    async def settled(self) -> None:
        await until(lambda: self.supervisor.is_settled() and self.views[-1].epoch == self.supervisor.view.epoch)

    async def report(self, *suspects: str, router_id: str = "router-0") -> None:
        await self.supervisor.report(router_id, self.view.epoch, suspects, "closed")


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(scenario(), 120))


def test_a_dead_shard_is_adopted_at_once_and_replaced_afterwards():
    async def scenario() -> None:
        async with Mesh() as mesh:
            mesh.starter.has_room.clear()
            mesh.shard(1).state = "dead"
            await mesh.report("shard-1")
            await until(lambda: mesh.view.shard_ids == ("shard-0",))
            assert "lost shard-1, 6 experts adopted" in mesh.view.reason
            mesh.starter.has_room.set()
            await mesh.settled()
            assert mesh.view.shard_ids == ("shard-0", "shard-2")
            assert len(mesh.shard(0).experts) == len(mesh.shard(2).experts) == 6

    run(scenario)


def test_a_shard_that_stops_loses_its_place_and_gets_it_back_when_it_wakes():
    async def scenario() -> None:
        async with Mesh() as mesh:
            mesh.shard(1).state = "stopped"
            await mesh.report("shard-1")
            await until(lambda: mesh.view.shard_ids == ("shard-0",))
            mesh.shard(1).state = ""
            await mesh.settled()
            assert mesh.view.shard_ids == ("shard-0", "shard-1")
            assert mesh.starter.ended == []

    run(scenario)


def test_a_shard_that_stays_silent_is_ended_and_replaced_also_without_any_report():
    async def scenario() -> None:
        async with Mesh() as mesh:
            mesh.shard(1).state = "stopped"
            await until(lambda: mesh.view.shard_ids == ("shard-0",))
            mesh.clock.now += TIMEOUTS.rejoin_s
            await mesh.supervisor._fleet.sweep()
            assert mesh.starter.ended == []
            mesh.clock.now += 0.1
            await until(lambda: mesh.starter.ended == ["shard-1"])
            await mesh.settled()
            assert mesh.view.shard_ids == ("shard-0", "shard-2")

    run(scenario)


def test_a_suspect_that_answers_is_forgiven_twice_and_several_at_once_always():
    async def scenario() -> None:
        async with Mesh() as mesh:
            for suspects in (("shard-1",), ("shard-0", "shard-1"), ("shard-0", "shard-1"), ("shard-1",)):
                before = mesh.view.epoch
                await mesh.report(*suspects)
                await until(lambda before=before: mesh.view.epoch > before)
                assert mesh.view.shard_ids == ("shard-0", "shard-1") and mesh.starter.ended == []
            await mesh.report("shard-1")
            await until(lambda: mesh.starter.ended == ["shard-1"])
            await mesh.settled()

    run(scenario)


def test_two_reports_of_one_failure_make_one_epoch():
    async def scenario() -> None:
        async with Mesh() as mesh:
            mesh.shard(0).state = "dead"
            epoch = mesh.view.epoch
            await asyncio.gather(mesh.report("shard-0"), mesh.report("shard-0", router_id="router-1"))
            await until(lambda: mesh.view.epoch > epoch)
            assert mesh.view.epoch == epoch + 1
            await mesh.settled()

    run(scenario)


@pytest.mark.parametrize("how", ["dead", "stopped"])
def test_the_adopter_dies_while_it_adopts(how):
    async def scenario() -> None:
        async with Mesh(MeshPlan(moe_layers=(0, 1), num_experts=6, num_shards=3)) as mesh:

            async def die() -> None:
                mesh.shard(1).state = how

            mesh.starter.has_room.clear()
            mesh.shard(1).on_load = die
            mesh.shard(2).state = "dead"
            await mesh.report("shard-2")
            await until(lambda: mesh.view.shard_ids == ("shard-0",))
            mesh.starter.has_room.set()
            mesh.clock.now += TIMEOUTS.rejoin_s + 0.1  # for a stopped one
            await mesh.settled()
            assert len(mesh.view.shard_ids) == 3

    run(scenario)


def test_an_adopter_that_can_not_load_keeps_its_own_experts_and_somebody_else_is_found():
    async def scenario() -> None:
        async with Mesh() as mesh:
            mesh.shard(0).load_fails = OSError("no memory")
            mesh.shard(1).state = "dead"
            await mesh.report("shard-1")
            assert not mesh.supervisor.is_complete()
            assert "6 experts have no holder" in (await mesh.supervisor.mesh())["trouble"]
            mesh.shard(0).load_fails = None
            await mesh.settled()
            assert "shard-0" in mesh.view.shard_ids

    run(scenario)


def test_when_everybody_is_silent_nobody_is_given_up_soon():
    async def scenario() -> None:
        async with Mesh() as mesh:
            for number in (0, 1):
                mesh.shard(number).state = "stopped"
            await mesh.report("shard-0", "shard-1")
            mesh.clock.now += TIMEOUTS.patience_s  # six times what one that is silent alone is given
            await mesh.supervisor._fleet.sweep()
            for number in (0, 1):
                mesh.shard(number).state = ""
            await mesh.settled()
            assert mesh.view.shard_ids == ("shard-0", "shard-1") and mesh.starter.ended == []

    run(scenario)


def test_all_shards_die_and_new_ones_take_their_place():
    async def scenario() -> None:
        async with Mesh() as mesh:
            for number in (0, 1):
                mesh.shard(number).state = "dead"
            await mesh.report("shard-0", "shard-1")
            await mesh.settled()
            assert mesh.view.shard_ids == ("shard-2", "shard-3")

    run(scenario)


def test_a_spare_takes_over_and_a_new_spare_is_started():
    async def scenario() -> None:
        async with Mesh(MeshPlan(moe_layers=(0,), num_experts=4, num_shards=2, num_spares=1)) as mesh:
            assert mesh.view.shard_ids == ("shard-0", "shard-1")
            mesh.starter.has_room.clear()
            mesh.shard(0).state = "dead"
            await mesh.report("shard-0")
            await until(lambda: mesh.view.shard_ids == ("shard-1", "shard-2"))
            assert len(mesh.shard(1).experts) == 2
            mesh.starter.has_room.set()
            await mesh.settled()
            assert mesh.shard(3).experts == set()

    run(scenario)


@pytest.mark.parametrize("numbers", [(3,), (1,), (4, 2), (1, 5, 2)])
def test_scaling_moves_experts_and_ends_what_is_left_over(numbers):
    async def scenario() -> None:
        async with Mesh() as mesh:
            for number in numbers:
                await mesh.supervisor.scale(number)
                await mesh.settled()
                assert len(mesh.view.shard_ids) == number
                counts = mesh.view.placement.slot_counts().values()
                assert max(counts) - min(counts) <= 1
                living = [i for i, s in mesh.starter.shards.items() if s.state == ""]
                assert sorted(living) == sorted(mesh.view.shard_ids)
                assert sum(len(mesh.starter.shards[i].experts) for i in living) == 12

    run(scenario)


@pytest.mark.parametrize("number", [0, -1, 7])
def test_impossible_numbers_of_shards_are_refused(number):
    async def scenario() -> None:
        async with Mesh() as mesh:
            with pytest.raises(ValueError, match=str(number)):
                await mesh.supervisor.scale(number)

    run(scenario)


def test_a_shard_that_dies_during_a_scale_out_is_replaced_too():
    async def scenario() -> None:
        async with Mesh() as mesh:

            async def die() -> None:
                mesh.shard(1).state = "dead"

            mesh.shard(0).on_load = die
            await mesh.supervisor.scale(3)
            await until(lambda: "shard-1" not in mesh.view.shard_ids)
            await mesh.settled()
            assert len(mesh.view.shard_ids) == 3

    run(scenario)


def test_a_restarted_supervisor_goes_on_with_the_shards_and_with_the_number_last_asked_for():
    async def scenario() -> None:
        starter = FakeStarter()
        async with Mesh(starter=starter) as mesh:
            await mesh.supervisor.scale(3)
            await mesh.settled()
            before = mesh.view
        async with Mesh(starter=starter) as mesh:
            await mesh.settled()
            assert mesh.view.shard_ids == before.shard_ids
            assert mesh.view.epoch > 1000 > before.epoch
            assert mesh.view.placement == before.placement
            assert starter.ended == []

    run(scenario)


def test_a_restarted_supervisor_mends_what_broke_while_it_was_away():
    async def scenario() -> None:
        starter = FakeStarter()
        async with Mesh(starter=starter):
            pass
        starter.shards["shard-0"].state = "dead"
        async with Mesh(starter=starter) as mesh:
            assert "supervisor restarted" in mesh.views[0].reason
            await mesh.settled()
            assert mesh.view.shard_ids == ("shard-1", "shard-2")

    run(scenario)


def test_a_supervisor_that_lost_all_its_shards_goes_beyond_the_epochs_that_routers_have_seen():
    async def scenario() -> None:
        async with Mesh() as mesh:
            view = await mesh.supervisor.next_view("router-9", {"router_id": "router-9"}, 4321, 4321, 30.0)
            assert view is not None and view.epoch > 4321
            await until(lambda: mesh.view.epoch == view.epoch)

    run(scenario)


def test_without_room_for_a_replacement_the_survivors_share_the_work():
    async def scenario() -> None:
        plan = MeshPlan(moe_layers=(0, 1), num_experts=6, num_shards=3, replicas=2)
        async with Mesh(plan) as mesh:
            mesh.starter.start_fails = ValueError("no node is left")
            mesh.shard(2).state = "dead"
            await mesh.report("shard-2")
            await until(lambda: mesh.view.shard_ids == ("shard-0", "shard-1"))
            await until(lambda: all(len(shards) == 2 for _, shards in mesh.view.placement))
            assert mesh.supervisor.is_complete()
            assert "no node is left" in (await mesh.supervisor.mesh())["trouble"]

    run(scenario)


@pytest.mark.parametrize("num_spares", [0, 1])
def test_a_hot_expert_is_copied_and_the_mesh_tells(num_spares):
    async def scenario() -> None:
        policy = BalancePolicy(min_tokens=10, redundant_slots=1, max_moves=4)
        plan = MeshPlan(moe_layers=(0,), num_experts=4, num_shards=2, num_spares=num_spares, balance=policy)
        async with Mesh(plan) as mesh:
            hot = next(e for (_, e), shards in mesh.view.placement if shards == ("shard-0",))
            counts = [1000 if e == hot else 10 for e in range(4)]
            figures = {"tokens": {0: counts}, "activated": {0: counts}, "wait_s": 1.0, "time_s": 10.0}
            await mesh.supervisor.next_view("router-1", {"router_id": "router-1", "figures": figures}, 0, 10**6, 0.01)
            before = (await mesh.supervisor.mesh())["balancedness"]
            mesh.clock.now += policy.interval_s
            await until(lambda: len(mesh.view.placement.holders[0][hot]) == 2)
            await mesh.settled()
            seen = await mesh.supervisor.mesh()
            assert seen["balancedness"] > before
            assert {"layer": 0, "expert": hot, "to": "shard-1", "from": None} in seen["last_moves"]
            assert "rebalanced" in seen["reason"]
            assert mesh.view.placement.shards() == {"shard-0", "shard-1"}, "a spare is a spare"
            epoch = mesh.view.epoch
            await mesh.supervisor._rebalance()
            assert mesh.supervisor.view.epoch == epoch, "it moves experts for nothing"

    run(scenario)


def test_the_autoscaler_adds_a_shard_under_pressure():
    async def scenario() -> None:
        policy = AutoscalePolicy(enabled=True, min_shards=3, max_shards=3)
        plan = MeshPlan(moe_layers=(0,), num_experts=6, num_shards=2, autoscale=policy)
        async with Mesh(plan) as mesh:
            mesh.clock.now += policy.interval_s
            await until(lambda: len(mesh.view.shard_ids) == 3)

    run(scenario)


def test_the_load_window_forgets_and_counts_each_router_once():
    now = [0.0]
    window = LoadWindow(10.0, lambda: now[0])
    window.add("a", {0: [1, 2]})
    window.add("a", {0: [3, 2]})
    window.add("b", {0: [0, 5]})
    assert window.loads() == {0: [3.0, 7.0]}
    now[0] = 5.0
    window.add("a", {0: [4, 2]})
    assert window.loads() == {0: [4.0, 7.0]}
    now[0] = 12.0
    assert window.loads() == {0: [1.0, 0.0]}
