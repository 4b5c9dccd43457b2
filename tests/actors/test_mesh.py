"""The engine over a mesh whose shards are threads: same answers as with local experts, also when shards come and go."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from actors import membership
from actors.remote_exchange import DeadlineEstimate, RemoteExchange
from cluster.placement import Placement
from cluster.settings import Timeouts
from model.moe import LocalExchange
from tests.actors.conftest import (
    PATIENT,
    ThreadMesh,
    after_three_tokens,
    answers,
    ask,
    ask_six,
    between_steps,
    formed,
    placed,
)
from tests.waiting import wait_until


@pytest.mark.parametrize("transport", ["host", "star", "all_to_all"])
def test_a_mesh_with_replicas_gives_the_same_tokens_as_local_experts(start_router, tiny_model, expected, transport):
    """One without: see test_same_bits."""
    mesh = ThreadMesh(tiny_model)
    mesh.publish(placed(mesh, 3, replicas=2))
    router, outputs = start_router(mesh, transport=transport)
    ask_six(router.engine)
    assert answers(outputs) == expected
    rows = [shard.info()["tokens"] for shard in mesh.shards.values()]
    assert all(count > 0 for count in rows)


@pytest.mark.parametrize("transport", ["host", "star", "all_to_all"])
def test_one_exchange_agrees_with_the_local_one_bit_by_bit(start_router, tiny_model, transport):
    mesh = ThreadMesh(tiny_model)
    mesh.publish(placed(mesh, 3))
    router, _ = start_router(mesh, transport=transport)
    exchange = router.exchange
    assert isinstance(exchange, RemoteExchange)
    wait_until(lambda: exchange.epoch > 0 and not router.engine.scheduler.has_work)
    local, _ = start_router()
    assert isinstance(local.exchange, LocalExchange)
    generator = torch.Generator().manual_seed(0)
    results = []

    def compare():
        for num_tokens in (1, 2, 5, 33):
            x = torch.randn(num_tokens, 64, generator=generator)
            weights, ids = torch.rand(num_tokens, 8, generator=generator).topk(3)
            for layer in range(3):
                over_mesh = exchange.combine(exchange.dispatch(layer, x, ids, weights))
                here = local.exchange.combine(local.exchange.dispatch(layer, x, ids, weights))
                results.append(torch.equal(over_mesh, here))

    router.engine.call(compare)
    wait_until(lambda: len(results) == 12)
    assert all(results)


def test_a_planned_epoch_change_loses_nothing(start_router, tiny_model, expected):
    mesh = ThreadMesh(tiny_model)
    mesh.publish(placed(mesh, 2))
    router, outputs = start_router(mesh)

    def change() -> None:
        mesh.publish(placed(mesh, 3))
        wait_until(lambda: formed(router, 2))

    ask_six(router.engine)
    after_three_tokens(router, outputs, change)
    assert answers(outputs) == expected
    assert router.exchange.epoch == 2 and mesh.shards["shard-2"].info()["tokens"] > 0 and mesh.reports == []


def test_an_epoch_that_adds_nobody_needs_no_new_group_and_who_leaves_is_told(start_router, tiny_model, expected):
    mesh = ThreadMesh(tiny_model)
    wide = placed(mesh, 3)
    mesh.publish(wide)
    router, outputs = start_router(mesh)

    def swap() -> None:
        mesh.publish(Placement({i: (experts[1], experts[0], *experts[2:]) for i, experts in wide.holders.items()}))
        wait_until(lambda: formed(router, 2))
        between_steps(router.engine, lambda: router.exchange.epoch == 2, narrow)

    def narrow() -> None:
        mesh.publish(placed(mesh, 2))
        wait_until(lambda: formed(router, 3))

    ask_six(router.engine)
    after_three_tokens(router, outputs, swap)
    assert answers(outputs) == expected
    wait_until(lambda: router.exchange.epoch == 3 and mesh.shards["shard-2"].info()["num_groups"] == 0)
    assert all(shard.info()["epoch"] == 1 for shard in mesh.shards.values()) and mesh.reports == []


def test_a_member_that_never_comes_holds_up_its_own_epoch_and_no_later_one(start_router, tiny_model):
    patient = replace(PATIENT, formation_s=120.0)  # longer than anything here waits
    mesh = ThreadMesh(tiny_model, timeouts=patient)
    both = placed(mesh, 2)
    mesh.shards["shard-1"].join = lambda **_: None  # as if it were stopped: it was asked, and says nothing
    mesh.publish(both)
    router, outputs = start_router(mesh, timeouts=patient)
    ask(router.engine, "r", [3, 4, 5], 4)
    wait_until(lambda: router.membership.num_store_keys() >= 2)  # both others wait for it
    mesh.publish(placed(mesh, 1))
    wait_until(lambda: router.exchange.epoch == 2)
    assert len(outputs.tokens("r")) == 4


@pytest.mark.parametrize(("transport", "formed"), [("auto", 1), ("all_to_all", 2)])
def test_a_lost_shard_costs_a_pause_and_no_token(start_router, tiny_model, expected, transport, formed):
    mesh = ThreadMesh(tiny_model)
    placement = placed(mesh, 3)
    mesh.publish(placement)
    mesh.on_report = lambda epoch, suspects: mesh.heal(placement, suspects)
    router, outputs = start_router(mesh, transport=transport)
    # In the middle of an answer, shard-1 forgets its experts: its next exchange fails and its group closes.
    ask_six(router.engine)
    after_three_tokens(router, outputs, lambda: mesh.shards["shard-1"].keep_only([]))
    assert answers(outputs) == expected
    assert mesh.reports[0][0] == 1 and router.exchange.epoch == 2 and router.exchange.num_recoveries == 1
    assert mesh.shards["shard-0"].info()["epoch"] == formed, "the epoch of its newest group"


@pytest.mark.parametrize("transport", ["host", "star"])
def test_where_replicas_hold_what_is_lost_nobody_is_waited_for(start_router, tiny_model, expected, transport):
    mesh = ThreadMesh(tiny_model)  # nobody heals it
    mesh.publish(placed(mesh, 3, replicas=2))
    router, outputs = start_router(mesh, transport=transport)
    ask_six(router.engine)
    after_three_tokens(router, outputs, lambda: mesh.shards["shard-1"].keep_only([]))
    assert answers(outputs) == expected
    assert mesh.reports == [(1, ("shard-1",))] and router.is_ready
    assert router.exchange.epoch == 1 and router.exchange.num_recoveries == 1
    mesh.publish(placed(mesh, 2))
    ask(router.engine, "after", [3, 4, 5])
    outputs.tokens("after")
    wait_until(lambda: router.exchange.epoch == 2)


def test_an_epoch_whose_store_fails_is_reported_and_the_next_one_serves(
    start_router, tiny_model, expected, monkeypatch
):
    mesh = ThreadMesh(tiny_model)
    placement = placed(mesh, 2)
    real, calls = membership.connect_store, []

    def fail_once(*arguments, **options):
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("Broken pipe")
        return real(*arguments, **options)

    monkeypatch.setattr(membership, "connect_store", fail_once)
    mesh.on_report = lambda epoch, suspects: mesh.publish(placement)
    router, outputs = start_router(mesh)
    mesh.publish(placement)
    ask_six(router.engine)
    assert answers(outputs) == expected and mesh.reports[0] == (1, ())


def test_without_any_mesh_requests_are_refused_by_name_and_served_once_it_is_there(start_router, tiny_model):
    mesh = ThreadMesh(tiny_model)
    router, outputs = start_router(mesh, timeouts=replace(PATIENT, recovery_s=0.5))
    ask(router.engine, "early", [3, 4, 5])
    assert outputs.wait("early")[-1].error["code"] == "mesh_unavailable"
    assert outputs.wait("early")[-1].error["status"] == 503
    mesh.publish(placed(mesh, 2))
    wait_until(lambda: router.is_ready)
    ask(router.engine, "later", [3, 4, 5])
    assert len(outputs.tokens("later")) == 24


def test_exchange_deadlines_follow_what_exchanges_take():
    now = [100.0]
    timeouts = Timeouts(exchange_min_s=1.0, exchange_max_s=30.0, exchange_factor=4.0)
    estimate = DeadlineEstimate(timeouts, lambda: now[0])
    assert estimate.deadline_s(1) == 30.0
    for _ in range(7):
        estimate.observe(2.0, 1)
        assert estimate.deadline_s(1) == 30.0, "the first few say nothing"
    estimate.observe(2.0, 1)
    assert estimate.deadline_s(1) == 8.0
    for _ in range(1000):  # a moment of decoding, and twenty seconds of it
        estimate.observe(0.001, 1)
    assert estimate.deadline_s(1) == 8.0
    for _ in range(1000):
        now[0] += 0.02
        estimate.observe(0.001, 1)
    assert estimate.deadline_s(1) == pytest.approx(2.0)
    now[0] += 3600.0
    estimate.observe(0.001, 1)
    assert estimate.deadline_s(1) == 1.0
    assert estimate.deadline_s(1000) == pytest.approx(4.0, rel=0.1)


def test_aborts_and_deadlines_go_on_while_a_step_waits_for_the_mesh(start_router, tiny_model):
    mesh = ThreadMesh(tiny_model)
    mesh.publish(placed(mesh, 2))
    router, outputs = start_router(mesh)
    ask(router.engine, "held", [3, 4, 5], 400)
    ask(router.engine, "left", [3, 4, 6], 400)

    def lose_all() -> None:
        for shard in mesh.shards.values():
            shard.keep_only([])  # nobody heals this mesh

    between_steps(router.engine, lambda: len(outputs.chunks["left"]) > 2, lose_all)
    wait_until(lambda: len(mesh.reports) > 0)
    router.engine.abort("test", "left")
    wait_until(lambda: len(list(router.engine.scheduler)) == 1)
    mesh.publish(placed(mesh, 3))
    assert len(outputs.tokens("held")) == 400
