"""The supervisor when something changes while it is busy with something else. No shard is silent by being slow."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from actors import ray_mesh
from actors.mesh_plan import MeshPlan
from actors.ray_shards import ShardResources
from actors.specs import ShardSpec
from actors.supervisor import TRY_AGAIN_S, Supervisor
from cluster.settings import Timeouts
from tests.actors.test_supervisor import FakeStarter
from tests.waiting import until

PATIENT = Timeouts(ping_s=20.0, watch_ping_s=20.0, rejoin_s=20.0, patience_s=20.0)
PLAN = MeshPlan(moe_layers=(0, 1), num_experts=6, num_shards=2)


@contextlib.asynccontextmanager
async def running(starter: FakeStarter, clock: Callable[[], float] = time.monotonic) -> AsyncIterator[Supervisor]:
    supervisor = Supervisor(PLAN, starter, PATIENT, clock)
    try:
        await supervisor.start()
        await until(supervisor.is_settled)
        yield supervisor
    finally:
        for task in supervisor._tasks:
            task.cancel()


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(scenario())


async def silent() -> int:
    raise TimeoutError


def test_a_shard_that_answers_again_while_the_sweep_waits_for_its_turn_stays() -> None:
    async def scenario() -> None:
        starter = FakeStarter()
        async with running(starter) as supervisor:
            known, epoch = supervisor._fleet.shards, supervisor.view.epoch
            async with supervisor._change:  # as if experts were adopted, which may take minutes
                shard = starter.shards["shard-1"]
                answers, shard.ping = shard.ping, silent
                await until(lambda: known["shard-1"].misses == 2)
                shard.ping = answers
            await until(lambda: "shard-1" in known and known["shard-1"].misses == 0)
            assert supervisor.view.epoch == epoch

    run(scenario)


def test_a_number_of_shards_that_is_asked_for_during_a_restart_stands_also_after_the_next_one() -> None:
    async def scenario() -> None:
        starter = FakeStarter()
        async with running(starter) as supervisor:
            await supervisor.scale(3)  # leaves a note with the shards
            await until(supervisor.is_settled)
        asked, answer, find_all = asyncio.Event(), asyncio.Event(), starter.find_all

        async def find_late():
            asked.set()
            await answer.wait()
            return await find_all()

        starter.find_all = find_late
        restarted = Supervisor(PLAN, starter, PATIENT)
        start = asyncio.ensure_future(restarted.start())
        await asked.wait()
        await restarted.scale(4)
        answer.set()
        await start
        await until(restarted.is_settled)
        assert len(restarted.view.shard_ids) == 4
        for task in restarted._tasks:
            task.cancel()
        async with running(starter) as supervisor:
            assert len(supervisor.view.shard_ids) == 4

    run(scenario)


def test_shards_that_come_after_a_restart_are_told_the_number_too() -> None:
    async def scenario() -> None:
        starter = FakeStarter()
        async with running(starter) as supervisor:
            await supervisor.scale(3)
            await until(supervisor.is_settled)
        async with running(starter):
            starter.shards["shard-0"].state = "dead"
            await until(lambda: "shard-3" in starter.shards and starter.shards["shard-3"].note != {})
            assert starter.shards["shard-3"].note["num_shards"] == 3

    run(scenario)


def test_a_router_without_any_group_does_not_keep_the_others_shards_from_being_tidied_up() -> None:
    async def scenario() -> None:
        starter = FakeStarter()
        async with running(starter) as supervisor:
            await supervisor.scale(3)
            await until(supervisor.is_settled)
            await supervisor.next_view("broken", {"router_id": "broken"}, supervisor.view.epoch - 1, 0, 0.01)
            assert not supervisor._board.all_live(supervisor.view.epoch), "it may just be forming the one before"
            await supervisor.next_view("broken", {"router_id": "broken"}, supervisor.view.epoch, 0, 0.01)
            assert supervisor._board.all_live(supervisor.view.epoch)
            await supervisor.next_view("late", {"router_id": "late"}, 0, supervisor.view.epoch - 1, 0.01)
            assert not supervisor._board.all_live(supervisor.view.epoch)

    run(scenario)


def test_reports_that_suspect_nobody_make_an_epoch_now_and_then_and_others_at_once() -> None:
    async def scenario() -> None:
        starter, now = FakeStarter(), [100.0]
        async with running(starter, lambda: now[0]) as supervisor:
            epoch = supervisor.view.epoch

            async def epochs_made(*suspects: str) -> int:
                await supervisor.report("broken", supervisor.view.epoch, suspects, "can't be formed")
                return supervisor.view.epoch - epoch

            assert await epochs_made() == 1, "the first one may be right"
            now[0] += TRY_AGAIN_S / 2
            assert await epochs_made() == 1
            assert await epochs_made("shard-0") == 2
            now[0] += TRY_AGAIN_S / 2
            assert await epochs_made() == 3
            assert await epochs_made() == 3
            starter.shards["shard-1"].state = "dead"
            assert await epochs_made() > 3

    run(scenario)


def test_a_shutdown_ends_also_the_shards_that_are_starting_and_those_of_a_predecessor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ray_mesh, "start_logging", lambda *_: None)  # the tests' own stays

    async def scenario() -> None:
        starter = FakeStarter()
        left = await starter.start("shard-7", ())
        supervisor = Supervisor(PLAN, starter, PATIENT)
        await supervisor.shutdown()  # it never began
        assert left.state == "dead"

        starter.has_room.clear()
        starter.shards.clear()
        actor = ray_mesh.SupervisorActor("mesh", PLAN, ShardSpec(model="none"), ShardResources(), PATIENT)
        actor._supervisor = supervisor = Supervisor(PLAN, starter, PATIENT)
        started = asyncio.ensure_future(actor.started())
        await until(lambda: supervisor._fleet._next_number == 2)
        await actor.shutdown()
        assert {"shard-0", "shard-1"} <= set(starter.ended)
        assert (await asyncio.gather(started, return_exceptions=True))[0] is not None
        starter.has_room.set()
        await asyncio.sleep(0)
        assert not starter.shards, "nobody begins again"

    run(scenario)


def test_slow_ends_of_surplus_shards_hold_nothing_up() -> None:
    async def scenario() -> None:
        starter, may_end = FakeStarter(), asyncio.Event()
        async with running(starter) as supervisor:
            await supervisor.scale(3)
            await until(lambda: len(supervisor.view.placement.shards()) == 3)
            await until(supervisor.is_settled)
            kill = starter.kill

            async def kill_late(shard_id: str) -> None:
                await may_end.wait()
                await kill(shard_id)

            starter.kill = kill_late  # type: ignore[method-assign]
            await supervisor.scale(2)
            await until(lambda: len(supervisor.view.placement.shards()) == 2 and len(supervisor._fleet.shards) == 2)
            dead = min(supervisor.view.placement.shards())
            starter.shards[dead].state = "dead"
            await until(lambda: dead not in supervisor.view.placement.shards())
            assert not starter.ended
            may_end.set()

    run(scenario)


def test_an_error_in_one_sweep_is_not_the_end_of_all() -> None:
    async def scenario() -> None:
        async with running(FakeStarter()) as supervisor:
            sweep, calls = supervisor._fleet.sweep, 0

            async def fails_once() -> dict[str, str]:
                nonlocal calls
                calls += 1
                if calls == 1:
                    raise KeyError("shard-9")
                return await sweep()

            supervisor._fleet.sweep = fails_once  # type: ignore[method-assign]
            await until(lambda: calls > 2)

    run(scenario)
