"""From one placement to a level one on a given set of shards, with few moves. Pure functions.

shards a b, new shard c          a: 0 1 2   b: 3 4 5   c:        fullest gives to emptiest until
                                 a: 0 1     b: 3 4     c: 2 5    they differ by at most one
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping

from cluster.placement import ExpertKey, Placement, keeps_apart, shard_order


def level(current: Placement, nodes: Mapping[str, str], replicas: int, redundant: int = 0) -> Placement:
    """Each expert on `replicas` of the shards in `nodes` (shard id -> node id), slot counts differing by at most one
    where the copies' nodes allow, and layer by layer as even as the moves made along the way.

    Copies on other shards are dropped; surplus copies go from the fullest shards; missing ones to the emptiest.
    Copies of one expert are put on different nodes while there are any left. With `redundant` slots a shard may
    hold so many experts more, or less, than its even share: copies made for load stay.
    """
    share = sum(len(experts) for experts in current.holders.values()) * replicas / len(nodes)
    most, least = math.ceil(share) + redundant, math.floor(share) - redundant
    holders: dict[ExpertKey, list[str]] = {key: [s for s in shards if s in nodes] for key, shards in current}
    counts: Counter[str] = Counter(dict.fromkeys(nodes, 0))
    per_layer: Counter[tuple[str, int]] = Counter()

    def count(shard_id: str, key: ExpertKey, by: int) -> None:
        counts[shard_id] += by
        per_layer[shard_id, key[0]] += by

    for key, shards in holders.items():
        for shard_id in shards:
            count(shard_id, key, 1)
    for key, shards in holders.items():
        while len(shards) > replicas:
            drop = max(shards, key=lambda s: (counts[s], shard_order(s)))
            if redundant and counts[drop] <= most:
                break
            shards.remove(drop)
            count(drop, key, -1)
    for key, shards in holders.items():
        while len(shards) < replicas:
            to = min(
                (s for s in nodes if s not in shards),
                key=lambda s: (nodes[s] in {nodes[h] for h in shards}, counts[s], per_layer[s, key[0]], shard_order(s)),
            )
            shards.append(to)
            count(to, key, 1)
    while max(counts.values()) > most or min(counts.values()) < least:
        if not _move_one(holders, counts, per_layer, nodes, count):
            break
    return Placement(
        {
            layer_idx: tuple(tuple(holders[layer_idx, e]) for e in range(len(experts)))
            for layer_idx, experts in current.holders.items()
        }
    )


def _move_one(
    holders: dict[ExpertKey, list[str]],
    counts: Counter[str],
    per_layer: Counter[tuple[str, int]],
    nodes: Mapping[str, str],
    count: Callable[[str, ExpertKey, int], None],
) -> bool:
    """Move one slot from the fullest to the emptiest shard; False when none may go."""
    fullest = max(nodes, key=lambda s: (counts[s], shard_order(s)))
    for emptiest in sorted(nodes, key=lambda s: (counts[s], shard_order(s))):
        if counts[fullest] - counts[emptiest] <= 1:
            return False
        movable = [
            key
            for key, shards in holders.items()
            if fullest in shards and emptiest not in shards and keeps_apart(shards, fullest, emptiest, nodes)
        ]
        if movable:
            key = max(movable, key=lambda k: (per_layer[fullest, k[0]] - per_layer[emptiest, k[0]], k))
            holders[key][holders[key].index(fullest)] = emptiest
            count(fullest, key, -1)
            count(emptiest, key, 1)
            return True
    return False
