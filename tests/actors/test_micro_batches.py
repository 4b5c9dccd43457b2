"""When steps go in two micro-batches that take turns, and what happens to both when the mesh changes under them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from actors.micro_batches import AGAIN_EVERY, TRIES, MicroBatches
from actors.remote_exchange import RemoteExchange
from actors.request import GenerateRequest
from actors.scheduler import Scheduled
from model.sampling_params import SamplingParams
from tests.actors.conftest import ThreadMesh, after_three_tokens, answers, ask_six, placed
from tests.tiny import prompt_of
from tests.waiting import wait_until


def work_of(*chunks):
    """Scheduled work from (begin, end)."""
    return [Scheduled(SimpleNamespace(token_ids=[0] * end), begin, end) for begin, end in chunks]


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 30)), min_size=1, max_size=8))
def test_two_parts_have_all_tokens_in_order_and_half_of_them_each(chunks):
    work = work_of(*((begin, begin + length) for begin, length in chunks))
    parts = MicroBatches("always", num_lanes=2).split(work)

    def tokens(items):
        return [(id(item.sequence), p) for item in items for p in range(item.begin, item.end)]

    assert [token for part in parts for token in tokens(part)] == tokens(work)
    if len(tokens(work)) > 1:
        assert len(parts) == 2 and 0 <= len(tokens(parts[1])) - len(tokens(parts[0])) <= 1
    assert [item.samples for item in parts[-1]][-1]


def run_steps(batches, work, seconds, num_steps):
    """Micro-batches of each step, when one of n of them takes seconds[n - 1]."""
    chosen = []
    for _ in range(num_steps):
        chosen.append(len(batches.split(work)))
        batches.observe(seconds[chosen[-1] - 1])
    return chosen


def test_both_ways_are_tried_and_the_faster_one_stays():
    decodes, prompt = work_of(*[(9, 10)] * 8), work_of((0, 300))
    batches = MicroBatches("auto", num_lanes=2)
    first = run_steps(batches, decodes, (1.0, 0.8), 2 * TRIES)
    assert first == [1, 2] * TRIES
    assert set(run_steps(batches, decodes, (1.0, 0.8), 50)) == {2}
    assert set(run_steps(batches, prompt, (1.0, 0.99), 100)[2 * TRIES :]) == {1}, "other steps are judged by themselves"
    # The world changes: what was slower is tried again now and then, and what was faster is seen to be slower.
    later = run_steps(batches, decodes, (0.5, 0.9), AGAIN_EVERY + 50)
    assert set(later[-40:]) == {1}
    later = run_steps(batches, decodes, (0.5, 0.9), 4 * AGAIN_EVERY)
    assert later.count(2) == 4 * TRIES
    assert run_steps(batches, decodes, (0.5, 0.1), AGAIN_EVERY + 50)[-1] == 2


def test_never_and_a_single_token_stay_whole():
    assert len(MicroBatches("always", num_lanes=1).split(work_of((3, 4), (5, 6)))) == 1
    assert len(MicroBatches("never", num_lanes=2).split(work_of((3, 4), (5, 6)))) == 1
    assert len(MicroBatches("always", num_lanes=2).split(work_of((3, 4)))) == 1


@pytest.mark.parametrize("transport", ["host", "star", "all_to_all"])
@pytest.mark.parametrize("num_shards", [1, 3])
def test_two_micro_batches_give_the_same_tokens(start_router, tiny_model, expected, transport, num_shards):
    mesh = ThreadMesh(tiny_model)
    mesh.publish(placed(mesh, num_shards))
    router, outputs = start_router(mesh, transport=transport, two_batch_overlap="always")
    ask_six(router.engine)
    assert answers(outputs) == expected
    assert router.engine.stats.num_overlapped_steps >= router.engine.stats.num_steps - 2


@pytest.mark.parametrize("transport", ["host", "star", "all_to_all"])
@pytest.mark.parametrize("replicas", [1, 2])
def test_a_lost_shard_is_survived_by_both(start_router, tiny_model, expected, transport, replicas):
    mesh = ThreadMesh(tiny_model)
    placement = placed(mesh, 3, replicas)
    mesh.publish(placement)
    if replicas == 1 or transport == "all_to_all":
        mesh.on_report = lambda epoch, suspects: mesh.heal(placement, suspects)
    router, outputs = start_router(mesh, transport=transport, two_batch_overlap="always")
    ask_six(router.engine)
    after_three_tokens(router, outputs, lambda: mesh.shards["shard-1"].keep_only([]))
    assert answers(outputs) == expected
    assert router.exchange.num_recoveries == 1 and len(mesh.reports) == 1


def test_a_step_broken_off_under_way_leaves_nothing_to_later_ones(start_router, tiny_model, expected):
    mesh = ThreadMesh(tiny_model)
    placement = placed(mesh, 2)
    mesh.publish(placement)
    mesh.on_report = lambda epoch, suspects: mesh.publish(placement)
    router, outputs = start_router(mesh)
    exchange = router.exchange
    assert isinstance(exchange, RemoteExchange)
    wait_until(lambda: exchange.epoch == 1)
    done = []

    def break_off():
        exchange.begin_step()
        for _ in range(2):
            exchange.dispatch(0, torch.randn(4, 64), torch.zeros(4, 1, dtype=torch.int64), torch.ones(4, 1))
        done.append(True)

    router.engine.call(break_off)
    wait_until(lambda: bool(done))
    ask_six(router.engine)
    assert answers(outputs) == expected and exchange.epoch == 2


def test_routed_experts_are_told_in_the_order_of_the_tokens(start_router, tiny_model):
    mesh = ThreadMesh(tiny_model)
    mesh.publish(placed(mesh, 2))
    told = []
    for setting in ("never", "always"):
        router, outputs = start_router(mesh, two_batch_overlap=setting)
        for i in range(3):
            params = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
            request = GenerateRequest(
                request_id=f"r{i}",
                prompt_ids=tuple(prompt_of(i, 20 + i)),
                sampling=params,
                return_routed_experts=True,
            )
            router.engine.submit("test", request)
        told.append([[chunk.routed_experts for chunk in outputs.wait(f"r{i}")] for i in range(3)])
    assert told[0] == told[1] and told[0][0][0]
