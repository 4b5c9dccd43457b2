from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.placement import spread_evenly
from cluster.rebalance import level


@settings(max_examples=80, deadline=None)
@given(
    before=st.integers(1, 5),
    after=st.integers(1, 5),
    replicas=st.integers(1, 2),
    redundant=st.integers(0, 3),
    num_nodes=st.integers(1, 3),
)
def test_levelling_gives_every_expert_its_copies_and_every_shard_its_share(
    before, after, replicas, redundant, num_nodes
):
    nodes = {f"shard-{i}": f"node-{i % num_nodes}" for i in range(5)}
    old = spread_evenly(
        moe_layers=[0, 1],
        num_experts=6,
        nodes={f"shard-{i}": nodes[f"shard-{i}"] for i in range(before)},
        replicas=min(replicas, before),
    )
    chosen = {f"shard-{5 - after + i}": nodes[f"shard-{5 - after + i}"] for i in range(after)}  # others than before
    copies = min(replicas, after)
    new = level(old, chosen, copies, redundant)
    assert all(len(set(shards)) == len(shards) >= copies for _, shards in new)
    assert new.shards() <= set(chosen)
    if num_nodes == 1:
        counts = [new.slot_counts()[s] for s in chosen]
        assert max(counts) - min(counts) <= 1 + 2 * redundant
    assert level(new, chosen, copies, redundant) == new


def test_copies_made_for_load_stay_while_there_are_slots_for_them():
    nodes = {"shard-0": "a", "shard-1": "b"}
    old = spread_evenly(moe_layers=[0], num_experts=4, nodes=nodes)
    hot = next(key for key, shards in old if shards == ("shard-0",))
    copied = old.adding({"shard-1": [hot]})
    assert level(copied, nodes, 1, redundant=1) == copied
    assert level(copied, nodes, 1) == old
