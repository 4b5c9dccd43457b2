from __future__ import annotations

import pytest

from cluster.dispatch import routing_tables
from cluster.placement import adopt, spread_evenly

TWO_NODES = {"shard-0": "node-a", "shard-1": "node-a", "shard-2": "node-b", "shard-3": "node-b"}


def test_every_expert_is_held_once_and_shards_carry_alike():
    placement = spread_evenly(moe_layers=[0, 1, 3], num_experts=8, nodes=TWO_NODES)
    assert all(len(shards) == 1 for _, shards in placement)
    assert set(placement.slot_counts().values()) == {6}


def test_replicas_of_an_expert_never_share_a_node_while_nodes_allow():
    placement = spread_evenly(moe_layers=[0, 1], num_experts=5, nodes=TWO_NODES, replicas=2)
    for _, shards in placement:
        assert len({TWO_NODES[s] for s in shards}) == 2


def test_more_replicas_than_shards_are_refused():
    with pytest.raises(ValueError, match=r"replicas=3 must lie between 1 and the number of shards \(2\)"):
        spread_evenly(moe_layers=[0], num_experts=4, nodes={"shard-0": "a", "shard-1": "a"}, replicas=3)


def test_survivors_adopt_the_lost_experts_evenly():
    placement = spread_evenly(moe_layers=[0, 1], num_experts=9, nodes={f"shard-{i}": "n" for i in range(3)})
    rest = placement.without(["shard-1"])
    assert len(rest.missing()) == 6
    taken = adopt(rest, ["shard-0", "shard-2"])
    assert sorted(len(keys) for keys in taken.values()) == [3, 3]
    whole = rest.adding(taken)
    assert not whole.missing()
    assert whole.shards() == {"shard-0", "shard-2"}


def test_routing_without_a_holder_names_the_expert():
    placement = spread_evenly(moe_layers=[4], num_experts=2, nodes={"shard-0": "n"})
    with pytest.raises(ValueError, match="expert 0 of layer 4"):
        routing_tables(placement, ["shard-9"])
