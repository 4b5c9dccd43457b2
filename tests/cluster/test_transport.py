"""Both transports over real gloo groups; ranks are threads of this process."""

from __future__ import annotations

import gc
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.dispatch import plan_dispatch, plan_dispatch_reference, routing_tables
from cluster.errors import ExchangeError, FormationError, PeerLost
from cluster.placement import spread_evenly
from cluster.process_group import connect_store, form_group, host_store
from cluster.transport import TRANSPORTS, choose_transport
from cluster.wire import Header, Opcode, new_message

CPU = torch.device("cpu")


def form(store, name, rank, world_size, formation_s=5.0):
    return form_group(
        store,
        name,
        rank=rank,
        world_size=world_size,
        host="127.0.0.1",
        device=CPU,
        formation_s=formation_s,
        operation_s=20,
    )


def serve(transport_cls, store_port, name, rank, world_size, work):
    """One shard: answers every STEP with `work(message)` until CLOSE or until the router is gone."""
    shard = transport_cls(form(connect_store("127.0.0.1", store_port, timeout_s=5), name, rank, world_size))
    served = 0
    while True:
        header = shard.next_header()
        if header.opcode == Opcode.CLOSE:
            return served
        if header.opcode == Opcode.STEP:
            shard.reply(header, work(shard.receive(header)))
            served += 1


def double(message):
    return message.rows_NH.double() * 2


@pytest.mark.parametrize("name", sorted(TRANSPORTS))
@pytest.mark.parametrize("num_shards", [1, 2, 3])
def test_rows_come_back_from_every_shard_whatever_the_split(name, num_shards):
    router_cls, shard_cls = TRANSPORTS[name]
    store = host_store("127.0.0.1", timeout_s=5)
    world_size = num_shards + 1
    with ThreadPoolExecutor(num_shards) as pool:
        shards = [
            pool.submit(serve, shard_cls, store.port, "g", rank, world_size, double) for rank in range(1, world_size)
        ]
        router = router_cls(form(store, "g", 0, world_size), [f"shard-{i}" for i in range(num_shards)])
        for step in range(5):
            rows = [(step + i) % 3 for i in range(num_shards)]  # some shards get nothing
            messages, headers = [], []
            for i, n in enumerate(rows):
                headers.append(Header(opcode=Opcode.STEP, epoch=1, num_rows=n, num_pairs=n, hidden_size=8))
                if n == 0:
                    messages.append(None)
                    continue
                message = new_message(n, n, 8, CPU)
                message.rows_NH.copy_(torch.arange(n * 8).view(n, 8) + 100 * i)
                messages.append(message)
            replies = router.receive(router.send(headers, messages), deadline_s=5)
            for message, reply in zip(messages, replies, strict=True):
                if message is None:
                    assert reply is None
                else:
                    assert torch.equal(reply, message.rows_NH.double() * 2)
        router.announce(Header(opcode=Opcode.IDLE, epoch=1))
        router.announce(Header(opcode=Opcode.CLOSE, epoch=1))
        assert all(shard.result(timeout=5) >= 1 for shard in shards)


def test_a_shard_that_goes_away_is_named_and_found_at_once():
    router_cls, shard_cls = TRANSPORTS["star"]
    store = host_store("127.0.0.1", timeout_s=5)
    gone = threading.Event()

    def leave(message):
        gone.set()
        raise EOFError  # the thread ends and drops its group: its sockets close

    def run(rank, work):
        try:
            return serve(shard_cls, store.port, "g", rank, 3, work)
        except (EOFError, ExchangeError) as error:
            return type(error)

    with ThreadPoolExecutor(2) as pool:
        shards = [pool.submit(run, 1, double), pool.submit(run, 2, leave)]
        router = router_cls(form(store, "g", 0, 3), ["shard-a", "shard-b"])
        header = Header(opcode=Opcode.STEP, epoch=1, num_rows=1, num_pairs=1, hidden_size=4)
        messages = [new_message(1, 1, 4, CPU) for _ in range(2)]
        started = time.monotonic()
        with pytest.raises(PeerLost) as caught:
            router.receive(router.send([header, header], messages), deadline_s=15)
        assert caught.value.suspects == ("shard-b",)
        assert gone.is_set() and time.monotonic() - started < 10
        caught = None
        del router
        gc.collect()  # the survivor sees the router's sockets close and ends too
        assert shards[0].result(timeout=10) is PeerLost


def test_a_member_that_never_comes_fails_the_formation_in_time():
    store = host_store("127.0.0.1", timeout_s=5)
    with pytest.raises(FormationError, match="rank 0 of 2"):
        form(store, "lonely", 0, 2, formation_s=0.3)


def test_unknown_transports_are_refused_and_auto_follows_the_hardware():
    assert choose_transport("auto", CPU, 1) == "star"
    assert choose_transport("auto", torch.device("cuda", 0), 1) == "all_to_all"
    assert choose_transport("auto", torch.device("cuda", 0), 2) == "star"
    with pytest.raises(ValueError, match="carrier-pigeon"):
        choose_transport("carrier-pigeon", CPU, 1)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), num_tokens=st.integers(1, 7), top_k=st.integers(1, 4), num_shards=st.integers(1, 5))
def test_the_plan_equals_the_plain_reference(data, num_tokens, top_k, num_shards):
    num_experts = 8
    ids = [data.draw(st.permutations(range(num_experts)).map(lambda p: p[:top_k])) for _ in range(num_tokens)]
    placement = spread_evenly(
        moe_layers=[0], num_experts=num_experts, nodes={f"shard-{i}": f"node-{i}" for i in range(num_shards)}
    )
    table = routing_tables(placement, [f"shard-{i}" for i in range(num_shards)])[0]
    plans = plan_dispatch(np.array(ids, dtype=np.int64), table, num_shards)
    reference = plan_dispatch_reference(ids, table.holders_ER[:, 0].tolist(), num_shards)
    for plan, expected in zip(plans, reference, strict=True):
        if plan is None:
            assert not expected["pairs"]
            continue
        assert plan.token_of_row_N.tolist() == expected["tokens"]
        assert list(zip(plan.pair_rows_P.tolist(), plan.pair_experts_P.tolist(), strict=True)) == expected["pairs"]


@settings(max_examples=40, deadline=None)
@given(num_tokens=st.integers(1, 9), replicas=st.integers(1, 3), turn=st.integers(0, 5), seed=st.integers(0, 99))
def test_with_replicas_no_pair_is_lost_and_none_doubled(num_tokens, replicas, turn, seed):
    generator = np.random.default_rng(seed)
    ids = np.stack([generator.permutation(6)[:3] for _ in range(num_tokens)]).astype(np.int64)
    nodes = {f"shard-{i}": f"node-{i}" for i in range(3)}
    placement = spread_evenly(moe_layers=[0], num_experts=6, nodes=nodes, replicas=replicas)
    plans = plan_dispatch(ids, routing_tables(placement, sorted(nodes))[0], 3, turn)
    seen = sorted(i for plan in plans if plan is not None for i in plan.pair_index_P.tolist())
    assert seen == list(range(num_tokens * 3))
    for shard_idx, plan in enumerate(plans):
        if plan is not None:
            held = placement.held_by(f"shard-{shard_idx}")
            assert all((0, e) in held for e in plan.pair_experts_P.tolist())
            flat = ids.reshape(-1)[plan.pair_index_P]
            assert np.array_equal(flat, plan.pair_experts_P)
            assert np.array_equal(plan.token_of_row_N[plan.pair_rows_P], plan.pair_index_P // 3)
