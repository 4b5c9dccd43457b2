from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.autoscale import Pressure, decide
from cluster.balance import balancedness, busiest_sum, propose
from cluster.placement import Placement, spread_evenly
from cluster.settings import AutoscalePolicy

NODES = {"shard-0": "n0", "shard-1": "n1"}


def test_balancedness_is_one_when_all_carry_alike_and_a_share_when_one_carries_all():
    placement = Placement({0: (("shard-0",), ("shard-1",))})
    assert balancedness(placement, {0: [3.0, 3.0]}) == 1.0
    assert balancedness(placement, {0: [3.0, 0.0]}) == 0.5
    assert balancedness(placement, {}) == 1.0


def test_the_heaviest_expert_is_copied_where_there_is_a_free_slot():
    placement = Placement({0: (("shard-0",), ("shard-0",), ("shard-1",), ("shard-1",))})
    after, moves = propose(placement, {0: [8.0, 1.0, 1.0, 2.0]}, NODES, max_slots=3, max_moves=1)
    assert [(m.key, m.to, m.source) for m in moves] == [((0, 0), "shard-1", None)]
    assert after.holders[0][0] == ("shard-0", "shard-1")


def test_without_a_free_slot_experts_change_places():
    placement = Placement({0: (("shard-0",), ("shard-0",), ("shard-1",), ("shard-1",))})
    after, moves = propose(placement, {0: [5.0, 5.0, 1.0, 1.0]}, NODES, max_slots=2)
    assert len(moves) == 2
    assert balancedness(after, {0: [5.0, 5.0, 1.0, 1.0]}) == 1.0


def test_a_surplus_copy_makes_room_for_a_heavier_expert():
    placement = Placement({0: (("shard-0", "shard-1"), ("shard-0",), ("shard-1",))})
    after, moves = propose(placement, {0: [1.0, 9.0, 1.0]}, NODES, max_slots=2)
    assert after.holders[0][1] == ("shard-0", "shard-1") and after.holders[0][0] == ("shard-0",)
    assert sum(m.to is not None for m in moves) == 1


def test_small_gains_move_nothing():
    placement = Placement({0: (("shard-0",), ("shard-1",))})
    assert propose(placement, {0: [10.0, 9.5]}, NODES, max_slots=2, min_gain=0.05) == (placement, [])


@st.composite
def meshes(draw: st.DrawFn) -> tuple[Placement, dict[int, list[float]], dict[str, str], int, int, int]:
    num_shards = draw(st.integers(1, 5))
    num_nodes = draw(st.integers(1, num_shards))
    nodes = {f"shard-{i}": f"node-{i % num_nodes}" for i in range(num_shards)}
    replicas = draw(st.integers(1, min(2, num_shards)))
    num_experts = draw(st.integers(num_shards, 9))
    layers = list(range(draw(st.integers(1, 3))))
    placement = spread_evenly(moe_layers=layers, num_experts=num_experts, nodes=nodes, replicas=replicas)
    loads = {i: draw(st.lists(st.floats(0, 1000), min_size=num_experts, max_size=num_experts)) for i in layers}
    max_slots = max(placement.slot_counts().values()) + draw(st.integers(0, 3))
    return placement, loads, nodes, replicas, max_slots, draw(st.integers(1, 6))


@settings(max_examples=150, deadline=None)
@given(mesh=meshes())
def test_a_proposal_breaks_no_limit_and_gains_what_it_promises(mesh):
    placement, loads, nodes, replicas, max_slots, max_moves = mesh
    after, moves = propose(
        placement, loads, nodes, max_slots=max_slots, replicas=replicas, max_moves=max_moves, min_gain=0.05
    )
    if not moves:
        assert after == placement
        return
    assert busiest_sum(after, loads) <= 0.95 * busiest_sum(placement, loads) + 1e-6
    assert balancedness(after, loads) > balancedness(placement, loads)
    assert max(after.slot_counts().values()) <= max_slots
    loaded = sum(len(after.held_by(s) - placement.held_by(s)) for s in nodes)
    assert loaded <= sum(m.to is not None for m in moves) <= max_moves
    for (key, holders), (_, before) in zip(after, placement, strict=True):
        assert len(set(holders)) == len(holders) >= replicas, key
        assert len({nodes[s] for s in holders}) >= min(replicas, len({nodes[s] for s in before}))


@settings(max_examples=50, deadline=None)
@given(mesh=meshes())
def test_proposing_again_and_again_comes_to_rest(mesh):
    placement, loads, nodes, replicas, max_slots, max_moves = mesh
    for _ in range(60):
        placement, moves = propose(placement, loads, nodes, max_slots=max_slots, replicas=replicas, max_moves=max_moves)
        if not moves:
            return
    pytest.fail("the planner keeps moving experts")


POLICY = AutoscalePolicy(enabled=True, min_shards=2, max_shards=4, cooldown_s=60)


@pytest.mark.parametrize(
    ("busy", "wait", "num_shards", "since_s", "expected"),
    [
        (0.9, 0.5, 2, 100, 3),  # too busy, and routers wait
        (0.9, 0.1, 2, 100, 2),  # busy, but nobody waits for it
        (0.9, 0.5, 4, 100, 4),  # the limit
        (0.9, 0.5, 2, 10, 2),  # cooling down
        (0.1, 0.0, 3, 100, 2),  # idle
        (0.1, 0.0, 2, 100, 2),  # the other limit
        (0.1, 0.0, 1, 0, 2),  # below the limit: at once
    ],
)
def test_the_autoscaler_follows_pressure_within_its_limits(busy, wait, num_shards, since_s, expected):
    assert decide(POLICY, Pressure(busy=busy, wait=wait), num_shards, since_s) == expected
