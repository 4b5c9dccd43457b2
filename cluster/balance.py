"""Which experts to copy or move so that no shard has more to do than it must. Pure functions; the idea is EPLB's
(replicate the heaviest, pack greedily), made incremental: few experts move at a time, and none for nothing.

Every layer is an exchange that waits for its busiest shard, so what is lowered is the sum over the layers of the
busiest shard's load. An expert's load is split evenly over its copies.

    layer 0   loads 8 1 1 2       a: 0 1   b: 2 3         a 9, b 3         busiest 9
    b has a slot more             a: 0 1   b: 2 3 0'      a 5, b 7         busiest 7: one expert loaded
    or, with no slot more         a: 0 2   b: 1 3         the same loads: no move worth it
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cluster.placement import ExpertKey, Placement, keeps_apart, shard_order

Loads = Mapping[int, Sequence[float]]  # layer_idx -> load of each expert


@dataclass(frozen=True, slots=True)
class Move:
    """Shard `to` loads the expert (None: nobody does), shard `source` gives its copy up (None: nobody does)."""

    key: ExpertKey
    to: str | None
    source: str | None = None


def shard_loads(experts: Sequence[Sequence[str]], loads: Sequence[float], shard_ids: Sequence[str]) -> dict[str, float]:
    """What each shard has to do in one layer. experts[e] = holders of expert e."""
    totals = dict.fromkeys(shard_ids, 0.0)
    for holders, load in zip(experts, loads, strict=True):
        for shard_id in holders:
            totals[shard_id] += load / len(holders)
    return totals


def busiest_sum(placement: Placement, loads: Loads) -> float:
    """Sum over the layers of the load of the layer's busiest shard: what the exchanges wait for."""
    ids = sorted(placement.shards())
    return sum(
        max(shard_loads(experts, loads[layer_idx], ids).values(), default=0.0)
        for layer_idx, experts in placement.holders.items()
        if layer_idx in loads
    )


def balancedness(placement: Placement, loads: Loads) -> float:
    """Mean shard load by busiest shard load, summed over the layers before dividing.

    1.0: all shards always have the same to do. 1 / shards: one shard has everything. Without any load 1.0.
    """
    ids = placement.shards()
    busiest = busiest_sum(placement, loads)
    if busiest == 0:
        return 1.0
    return sum(sum(loads[layer]) for layer in placement.holders if layer in loads) / (len(ids) * busiest)


def propose(
    placement: Placement,
    loads: Loads,
    nodes: Mapping[str, str],
    *,
    max_slots: int,
    replicas: int = 1,
    max_moves: int = 8,
    min_gain: float = 0.05,
) -> tuple[Placement, list[Move]]:
    """A better placement on the same shards, and how to get there; (placement, []) when none is worth it.

    nodes: shard id -> node id of every shard that serves. max_slots: the most any shard may hold. replicas: copies
    that every expert keeps at least. Copies never end up on fewer nodes than before. Each step is the best there is
    at that point; all together load at most max_moves experts and lower `busiest_sum` by min_gain, or nothing moves.
    """
    before = busiest_sum(placement, loads)
    current, moves, num_loaded = placement, list[Move](), 0
    while num_loaded < max_moves:
        step = _best_step(current, loads, nodes, max_slots, replicas, max_moves - num_loaded)
        if step is None or step[0] < 0.002 * before:
            break
        current = _apply(current, step[1])
        moves += step[1]
        num_loaded += _num_loaded(step[1])
    if not moves or before - busiest_sum(current, loads) < min_gain * before:
        return placement, []
    return current, moves


def _best_step(
    placement: Placement, loads: Loads, nodes: Mapping[str, str], max_slots: int, replicas: int, room: int
) -> tuple[float, list[Move]] | None:
    """The copy, move or swap that lowers a layer's busiest load most, per expert loaded; with what it gains."""
    slots = Counter(dict.fromkeys(nodes, 0))
    slots.update(placement.slot_counts())
    best: tuple[float, list[Move]] | None = None
    best_rate = 0.0
    for layer_idx, experts in placement.holders.items():
        if layer_idx not in loads:
            continue
        totals = shard_loads(experts, loads[layer_idx], sorted(nodes, key=shard_order))
        heavy = max(totals, key=lambda s: totals[s])
        for light in sorted(totals, key=lambda s: totals[s])[:2]:
            if totals[heavy] <= totals[light]:
                continue
            has_room = slots[light] < max_slots
            for made in _candidates(layer_idx, experts, loads[layer_idx], (heavy, light), nodes, has_room, replicas):
                if _num_loaded(made) > room:
                    continue
                after = max(shard_loads(_apply_layer(experts, made), loads[layer_idx], list(totals)).values())
                rate = (totals[heavy] - after) / _num_loaded(made)
                if rate > best_rate:
                    best, best_rate = (totals[heavy] - after, made), rate
    return best


def _candidates(
    layer_idx: int,
    experts: Sequence[Sequence[str]],
    loads: Sequence[float],
    shards: tuple[str, str],
    nodes: Mapping[str, str],
    has_room: bool,
    replicas: int,
) -> list[list[Move]]:
    """What can take load from the first of `shards` to the second in one layer without breaking a limit.

    Only the heaviest few on the one side and the lightest few on the other are looked at.
    """
    heavy, light = shards
    by_load = sorted(range(len(experts)), key=lambda e: loads[e] / max(len(experts[e]), 1))
    given = [e for e in reversed(by_load) if heavy in experts[e] and light not in experts[e]][:8]
    taken = [e for e in by_load if light in experts[e] and heavy not in experts[e]][:8]
    surplus = [e for e in by_load if light in experts[e] and _may_drop(experts[e], light, nodes, replicas)][:8]
    goes = [e for e in given if keeps_apart(experts[e], heavy, light, nodes)]
    found: list[list[Move]] = []
    if has_room:
        found += [[Move((layer_idx, e), light)] for e in given]
        found += [[Move((layer_idx, e), light, heavy)] for e in goes]
    else:  # a surplus copy makes room for one that takes more load
        found += [[Move((layer_idx, f), None, light), Move((layer_idx, e), light)] for e in given for f in surplus]
    return found + [
        [Move((layer_idx, e), light, heavy), Move((layer_idx, f), heavy, light)]
        for e in goes
        for f in taken
        if keeps_apart(experts[f], light, heavy, nodes)
    ]


def _may_drop(holders: Sequence[str], shard_id: str, nodes: Mapping[str, str], replicas: int) -> bool:
    """Whether enough copies, on enough nodes, are left without this one."""
    left = {nodes[s] for s in holders if s != shard_id}
    return len(holders) > replicas and len(left) >= min(replicas, len({nodes[s] for s in holders}))


def _num_loaded(moves: Sequence[Move]) -> int:
    return sum(move.to is not None for move in moves)


def _apply_layer(experts: Sequence[Sequence[str]], moves: Sequence[Move]) -> list[tuple[str, ...]]:
    changed = [tuple(holders) for holders in experts]
    for move in moves:
        expert_id = move.key[1]
        kept = tuple(s for s in changed[expert_id] if s != move.source)
        changed[expert_id] = kept if move.to is None else (*kept, move.to)
    return changed


def _apply(placement: Placement, moves: Sequence[Move]) -> Placement:
    layer_idx = moves[0].key[0]
    return Placement({**placement.holders, layer_idx: tuple(_apply_layer(placement.holders[layer_idx], moves))})
