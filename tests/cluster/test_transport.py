"""Every transport over real gloo groups and sockets; ranks are threads of this process, or processes to be killed."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import socket
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster import host_transport
from cluster.dispatch import plan_dispatch, routing_tables
from cluster.errors import ExchangeError, FormationError, PeerLost, PeerSilent
from cluster.host_transport import Channels
from cluster.placement import spread_evenly
from cluster.process_group import connect_store, host_store
from cluster.transport import choose_transport, router_transport, shard_transport
from cluster.wire import Header, Opcode
from tests.cluster.shard_process import ask_for_memory, decline, form, serve

CPU = torch.device("cpu")
HIDDEN = 8
TRANSPORTS = ("star", "host", "mixed", "all_to_all")


def exchange(router, rows, deadline_s=5.0, hidden_size=HIDDEN):
    """One exchange with rows[i] rows for shard i; checks what came back."""
    start(router, rows, hidden_size=hidden_size)(deadline_s)


def start(router, rows, lane=0, hidden_size=HIDDEN):
    """Send one; the function that is returned waits for it and checks it."""
    starts = np.cumsum([0, *rows]).tolist()
    whole = Header(Opcode.STEP, 1, 0, 0, hidden_size, 0, starts[-1], 0, starts[-1], starts[-1], starts[-1], lane)
    message = router.prepare(whole)
    message.rows_NH.copy_(torch.arange(message.rows_NH.numel()).view(message.rows_NH.shape) + 1000 * lane)
    message.pair_weights_P.fill_(0.5)
    for i, n in enumerate(rows):
        message.pair_rows_P[starts[i] : starts[i + 1]] = torch.arange(n)
        message.pair_experts_P[starts[i] : starts[i + 1]] = 10 * i + torch.arange(n)
    rows_NH = message.rows_NH.clone()  # what the other lane does must not show
    router.send(
        [whole._replace(first_row=starts[i], num_rows=n, first_pair=starts[i], num_pairs=n) for i, n in enumerate(rows)]
    )

    def finish(deadline_s=5.0):
        router.receive(deadline_s, lane)
        for i, n in enumerate(rows):
            part = slice(starts[i], starts[i + 1])
            expected = rows_NH[part].double() * 2 + 0.5 * n + 10 * i + torch.arange(n)[:, None]
            assert torch.equal(message.sums_NH[part], expected)

    return finish


@contextmanager
def threads(transport, num_shards, far=(), operation_s=20.0):
    """A router whose shards are threads; `far` ones pretend to be on another host."""
    store = host_store("127.0.0.1", timeout_s=10)
    world_size = num_shards + 1
    with ThreadPoolExecutor(num_shards) as pool:
        shards = [
            pool.submit(
                serve, transport, store.port, "g", rank, world_size, is_far=rank - 1 in far, operation_s=operation_s
            )
            for rank in range(1, world_size)
        ]
        group = form(store, "g", 0, world_size)
        router = router_transport(transport, group, [f"shard-{i}" for i in range(num_shards)])
        del group
        yield router
        router.announce(Header(Opcode.IDLE, 1))
        router.announce(Header(Opcode.CLOSE, 1))
        assert all(shard.result(timeout=10) >= 1 for shard in shards)


PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["tests.cluster.shard_process"])


@contextmanager
def processes(transport, num_shards, formation_s=30.0, **options):
    store = host_store("127.0.0.1", timeout_s=10)
    world_size = num_shards + 1
    children = [
        PROCESSES.Process(
            target=serve,
            args=(transport, store.port, "g", rank, world_size),
            kwargs=dict(options, formation_s=formation_s),
        )
        for rank in range(1, world_size)
    ]
    try:
        for child in children:
            child.start()
        group = form(store, "g", 0, world_size, formation_s=formation_s)
        router = [router_transport(transport, group, [f"shard-{i}" for i in range(num_shards)])]
        del group
        yield router, children  # in a list, so that the test can drop it
    finally:
        for child in children:
            child.kill()
            child.join()


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("num_shards", [1, 2, 3])
def test_rows_come_back_from_every_shard_whatever_the_split(transport, num_shards):
    with threads(transport, num_shards) as router:
        for step in range(5):
            exchange(router, [(step + i) % 3 for i in range(num_shards - 1)] + [step + 1])  # some shards get nothing
        exchange(router, [3] * num_shards, hidden_size=40_000)  # more than the arena had room for
        exchange(router, [1] * num_shards)


@pytest.mark.parametrize(("transport", "far"), [*((name, ()) for name in TRANSPORTS), ("mixed", (1,))])
def test_two_exchanges_may_be_under_way_at_once(transport, far):
    with threads(transport, 3, far) as router:
        for step in range(20):
            first = start(router, [step % 3, 1, 4], lane=0)
            second = start(router, [2, 0 if step % 2 else 5, step % 4], lane=1)
            first()
            first = start(router, [3, 2, 0], lane=0)
            second()
            first()


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_killed_shard_fails_both_exchanges_that_wait_for_it(transport):
    with processes(transport, 2) as (router, children):
        exchange(router[0], [1, 2])
        os.kill(children[1].pid, signal.SIGSTOP)
        first, second = start(router[0], [1, 2], lane=0), start(router[0], [2, 1], lane=1)
        children[1].kill()
        for finish in (first, second):
            with pytest.raises(ExchangeError) as failure:
                finish()
            assert "shard-1" in failure.value.suspects
            if not router[0].leave_out(failure.value.suspects):
                break  # the whole group is done for, and the other exchange with it
        else:
            exchange(router[0], [3, 0])


def test_a_shard_dropped_while_it_computes_ends_the_group_unless_it_is_dead():
    """It may wake up and write its sums into the arena, whoever works there by then."""
    for number, ends_group in ((signal.SIGSTOP, True), (signal.SIGKILL, False)):
        with processes("host", 3) as (router, children):
            exchange(router[0], [1, 2, 1])
            os.kill(children[1].pid, signal.SIGSTOP)
            first, second = start(router[0], [1, 0, 2], lane=0), start(router[0], [2, 1, 1], lane=1)
            os.kill(children[1].pid, number)
            if number == signal.SIGKILL:
                children[1].join()
            others = ["shard-0", "shard-2"]
            router[0].keep_only(others, Header(Opcode.CLOSE, 1))
            assert router[0].can_serve(others) is not ends_group
            first()
            with pytest.raises(PeerLost, match="shard-1"):
                second()


def test_near_and_far_shards_serve_one_router_together():
    with threads("mixed", 3, far={1}) as router:
        for step in range(5):
            exchange(router, [(step + i) % 3 for i in range(3)])
        exchange(router, [2, 3, 1], hidden_size=40_000)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can start a process of another user")
def test_another_users_process_gets_no_memory_and_takes_nobodys_place(monkeypatch):
    ask, (ours, theirs) = host_transport._ask, PROCESSES.Pipe()
    strangers = []

    def ask_second(group, name):  # the shards learn the name after the stranger has connected
        strangers.append(PROCESSES.Process(target=ask_for_memory, args=(name, theirs)))
        strangers[0].start()
        assert ours.poll(30) and ours.recv() == "connected"
        return ask(group, name)

    monkeypatch.setattr(host_transport, "_ask", ask_second)
    try:
        with threads("host", 2) as router:
            assert ours.poll(30) and ours.recv() == (0, 0)
            exchange(router, [2, 1])
    finally:
        strangers[0].kill()
        strangers[0].join()


def test_a_shard_takes_no_memory_from_another_users_router(monkeypatch):
    def shared_files():
        with open("/proc/self/maps") as maps:
            return {line.split()[4] for line in maps if "memfd:expertmesh" in line}

    monkeypatch.setattr(host_transport, "_is_same_user", lambda peer: False)
    before = shared_files()  # of other tests, whose last threads may not have ended
    with threads("mixed", 2) as router:
        exchange(router, [2, 1])
        assert shared_files() <= before


def test_a_forced_host_transport_names_the_shards_it_cannot_reach():
    with (
        pytest.raises(ValueError, match=r"shard-1 can't be reached .* set transport to auto"),
        threads("host", 2, far={1}, operation_s=1.0),
    ):
        pass


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_killed_shard_is_found_at_once_and_named(transport):
    with processes(transport, 2) as (router, children):
        exchange(router[0], [1, 1])
        os.kill(children[1].pid, signal.SIGKILL)
        with pytest.raises(PeerLost) as caught:  # at the deadline it would be PeerSilent
            exchange(router[0], [1, 1], deadline_s=15)
        assert caught.value.suspects == (("shard-0", "shard-1") if transport == "all_to_all" else ("shard-1",))


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_stopped_shard_is_found_at_the_deadline_and_its_partner_is_not_blamed(transport):
    with processes(transport, 2) as (router, children):
        exchange(router[0], [1, 1])
        os.kill(children[1].pid, signal.SIGSTOP)
        with pytest.raises(PeerSilent) as caught:
            exchange(router[0], [1, 1], deadline_s=2.0)
        assert caught.value.suspects == (("shard-0", "shard-1") if transport == "all_to_all" else ("shard-1",))


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_router_leaves_a_group_with_a_stopped_shard_at_once(transport):
    """Not when the collective that gloo itself waits in reaches its own deadline, here 60 s."""
    with processes(transport, 2, formation_s=60.0, operation_s=60.0) as (router, children):
        exchange(router[0], [1, 1])
        time.sleep(0.3)  # the shard waits for its next header, which will be sent
        os.kill(children[1].pid, signal.SIGSTOP)
        with pytest.raises(PeerSilent):
            exchange(router[0], [1, 1], deadline_s=1.0)
        leaving = threading.Thread(target=lambda: (router.clear(), gc.collect()), daemon=True)
        leaving.start()
        leaving.join(20)
        assert not leaving.is_alive(), "it waits for gloo's deadline"
        if transport != "all_to_all":  # there it also waits for its stopped partner
            children[0].join(20)
            assert children[0].exitcode is not None


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_shard_ends_when_its_router_is_gone(transport):
    store = host_store("127.0.0.1", timeout_s=10)
    with ThreadPoolExecutor(1) as pool:
        shard = pool.submit(serve, transport, store.port, "g", 1, 2)
        router = router_transport(transport, form(store, "g", 0, 2), ["shard-0"])
        exchange(router, [2])
        del router
        gc.collect()
        with pytest.raises(PeerLost):
            shard.result(timeout=10)


def test_killed_groups_leave_neither_descriptors_nor_memory_behind():
    def traces():
        gc.collect()
        with open("/proc/self/maps") as maps:
            return len(os.listdir("/proc/self/fd")), sum("memfd:expertmesh" in line for line in maps)

    before = None
    for _ in range(4):
        with processes("host", 2) as (router, children):
            exchange(router[0], [1, 2])
            assert traces()[1] > 0
            children[0].kill()
            with pytest.raises(PeerLost):
                exchange(router[0], [1, 2])
            router.clear()
        children.clear()
        before = before or traces()
    num_open, num_mapped = traces()
    assert num_open <= before[0], "fewer where what other tests left has gone meanwhile"
    assert num_mapped == 0


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_the_others_go_on_in_the_same_group_without_a_killed_shard(transport):
    with processes(transport, 3) as (router, children):
        exchange(router[0], [1, 2, 3])
        children[1].kill()
        with pytest.raises(PeerLost):
            exchange(router[0], [1, 2, 3])
        goes_on = router[0].leave_out(["shard-1"])
        assert goes_on == (transport != "all_to_all")
        if goes_on:
            router[0].announce(Header(Opcode.IDLE, 1))
            exchange(router[0], [3, 0, 1])
            assert not router[0].leave_out(["shard-0", "shard-2"])


def test_a_header_beyond_the_shared_memory_ends_the_group():
    store = host_store("127.0.0.1", timeout_s=10)
    with ThreadPoolExecutor(1) as pool:
        shard = pool.submit(serve, "host", store.port, "g", 1, 2)
        router = router_transport("host", form(store, "g", 0, 2), ["shard-0"])
        router.send([Header(Opcode.STEP, 1, 0, 0, HIDDEN, 0, 10**9, 0, 10**9, 10**9, 10**9)])
        with pytest.raises(PeerLost):
            router.receive(10, lane=0)
        with pytest.raises(ExchangeError, match="bytes of an arena"):
            shard.result(timeout=10)


def test_an_answer_out_of_turn_ends_the_channel():
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    channels = Channels({0: ours})
    sent = Header(Opcode.STEP, 7, 3, 2)
    channels.send(0, sent)
    theirs.send(theirs.recv(1000)[:-8] + b"old step")
    [(shard_idx, error)] = channels.wait(0, time.monotonic() + 5)
    assert shard_idx == 0 and "out of turn" in str(error) and not channels.sockets
    theirs.close()


def test_a_member_that_never_comes_fails_the_formation_in_time():
    store = host_store("127.0.0.1", timeout_s=5)
    with pytest.raises(FormationError, match="rank 0 of 2"):
        form(store, "lonely", 0, 2, formation_s=0.3)


def test_unknown_transports_are_refused_and_auto_follows_the_hardware():
    assert choose_transport("auto", CPU, 1) == "mixed"
    assert choose_transport("auto", torch.device("cuda", 0), 1) == "all_to_all"
    assert choose_transport("auto", torch.device("cuda", 0), 2) == "star"
    with pytest.raises(ValueError, match="carrier-pigeon"):
        choose_transport("carrier-pigeon", CPU, 1)
    with pytest.raises(ValueError, match="choose auto"):
        choose_transport("host", torch.device("cuda", 0), 1)


def plan_dispatch_reference(topk_ids: Sequence[Sequence[int]], holders: Any, num_shards: int) -> list[dict[str, Any]]:
    """The same plan, one pair at a time: slow and plain. holders[expert] = shard index."""
    plans: list[dict[str, Any]] = [{"tokens": [], "pairs": []} for _ in range(num_shards)]
    for token, experts in enumerate(topk_ids):
        for expert in experts:
            plan = plans[holders[expert]]
            if token not in plan["tokens"]:
                plan["tokens"].append(token)
            plan["pairs"].append((plan["tokens"].index(token), expert))
    return plans


@settings(max_examples=60, deadline=None)
@given(data=st.data(), num_tokens=st.integers(1, 7), top_k=st.integers(1, 4), num_shards=st.integers(1, 5))
def test_the_plan_equals_the_plain_reference(data, num_tokens, top_k, num_shards):
    num_experts = 8
    ids = [data.draw(st.permutations(range(num_experts)).map(lambda p: p[:top_k])) for _ in range(num_tokens)]
    placement = spread_evenly(
        moe_layers=[0], num_experts=num_experts, nodes={f"shard-{i}": f"node-{i}" for i in range(num_shards)}
    )
    table = routing_tables(placement, [f"shard-{i}" for i in range(num_shards)])[0]
    plan = plan_dispatch(np.array(ids, dtype=np.int64), table, num_shards)
    reference = plan_dispatch_reference(ids, table.holders_ER[:, 0].tolist(), num_shards)
    pairs = list(zip(plan.pair_rows_P.tolist(), plan.pair_experts_P.tolist(), strict=True))
    for i, expected in enumerate(reference):
        assert plan.token_of_row_N[plan.row_starts[i] : plan.row_starts[i + 1]].tolist() == expected["tokens"]
        assert pairs[plan.pair_starts[i] : plan.pair_starts[i + 1]] == expected["pairs"]
    assert plan.is_on_one_shard == (sum(bool(part["pairs"]) for part in reference) == 1)


@settings(max_examples=40, deadline=None)
@given(num_tokens=st.integers(1, 9), replicas=st.integers(1, 3), turn=st.integers(0, 5), seed=st.integers(0, 99))
def test_with_replicas_no_pair_is_lost_and_none_doubled(num_tokens, replicas, turn, seed):
    generator = np.random.default_rng(seed)
    ids = np.stack([generator.permutation(6)[:3] for _ in range(num_tokens)]).astype(np.int64)
    nodes = {f"shard-{i}": f"node-{i}" for i in range(3)}
    placement = spread_evenly(moe_layers=[0], num_experts=6, nodes=nodes, replicas=replicas)
    plan = plan_dispatch(ids, routing_tables(placement, sorted(nodes))[0], 3, turn)
    assert sorted(plan.pair_index_P.tolist()) == list(range(num_tokens * 3))
    assert np.array_equal(ids.reshape(-1)[plan.pair_index_P], plan.pair_experts_P)
    for i in range(3):
        pairs = slice(plan.pair_starts[i], plan.pair_starts[i + 1])
        held = placement.held_by(f"shard-{i}")
        assert all((0, e) in held for e in plan.pair_experts_P[pairs].tolist())
        tokens = plan.token_of_row_N[plan.row_starts[i] :][plan.pair_rows_P[pairs]]
        assert np.array_equal(tokens, plan.pair_index_P[pairs] // 3)


@pytest.mark.parametrize(("transport", "far"), [*((name, ()) for name in TRANSPORTS), ("mixed", (1,))])
def test_only_shards_that_were_sent_nothing_are_told_that_the_router_is_there(transport, far):
    store = host_store("127.0.0.1", timeout_s=10)

    def opcodes(rank):
        group = form(connect_store("127.0.0.1", store.port, timeout_s=10), "g", rank, 3)
        shard = decline(group) if rank - 1 in far else shard_transport(transport, group)
        seen = []
        while (header := shard.next_header()).opcode != Opcode.CLOSE:
            seen.append(header.opcode)
            if header.opcode == Opcode.STEP:
                message = shard.receive(header)
                message.sums_NH.zero_()
                shard.reply(header, message)
        return seen

    with ThreadPoolExecutor(2) as pool:
        shards = [pool.submit(opcodes, rank) for rank in (1, 2)]
        router = router_transport(transport, form(store, "g", 0, 3), ["shard-0", "shard-1"])
        for _ in range(3):
            start(router, [2, 0])
            router.receive(5.0, 0)
        router.keep_alive(Header(Opcode.IDLE, 1))
        router.keep_alive(Header(Opcode.IDLE, 1))
        router.announce(Header(Opcode.CLOSE, 1))
        busy, quiet = [shard.result(timeout=10) for shard in shards]
    assert busy == [Opcode.STEP] * 3 + [Opcode.IDLE]
    assert quiet == (busy if transport == "all_to_all" else [Opcode.IDLE] * 2)
