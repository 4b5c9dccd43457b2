"""Which shards hold which experts. Pure functions over one immutable map.

A placement of 2 layers x 4 experts on shards a, b with every expert once:

    layer 0   expert 0 1 2 3        layer 1   expert 0 1 2 3
       a             x   x             a               x   x
       b               x   x           b             x   x

Layers start at another shard each, so that no shard gets the first (often busiest) expert of all layers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

ExpertKey = tuple[int, int]  # (layer_idx, expert_id)


@dataclass(frozen=True, slots=True)
class Placement:
    """holders[layer_idx][expert_id] = ids of the shards that hold a copy, in no particular order of merit."""

    holders: Mapping[int, tuple[tuple[str, ...], ...]]

    def __iter__(self) -> Iterator[tuple[ExpertKey, tuple[str, ...]]]:
        for layer_idx, experts in self.holders.items():
            for expert_id, shards in enumerate(experts):
                yield (layer_idx, expert_id), shards

    def held_by(self, shard_id: str) -> frozenset[ExpertKey]:
        """All experts that the shard holds."""
        return frozenset(key for key, shards in self if shard_id in shards)

    def shards(self) -> frozenset[str]:
        return frozenset(shard_id for _, shards in self for shard_id in shards)

    def missing(self) -> list[ExpertKey]:
        """Experts without any holder."""
        return [key for key, shards in self if not shards]

    def slot_counts(self) -> Counter[str]:
        return Counter(shard_id for _, shards in self for shard_id in shards)

    def without(self, lost: Collection[str]) -> Placement:
        """The same map after the shards `lost` are gone; experts may be missing from it."""
        gone = frozenset(lost)
        return Placement(
            {
                layer_idx: tuple(tuple(s for s in shards if s not in gone) for shards in experts)
                for layer_idx, experts in self.holders.items()
            }
        )

    def adding(self, extra: Mapping[str, Iterable[ExpertKey]]) -> Placement:
        """Shard ids mapped to experts that they hold in addition."""
        more: dict[ExpertKey, list[str]] = {}
        for shard_id, keys in extra.items():
            for key in keys:
                more.setdefault(key, []).append(shard_id)
        return Placement(
            {
                layer_idx: tuple(
                    shards + tuple(s for s in more.get((layer_idx, expert_id), []) if s not in shards)
                    for expert_id, shards in enumerate(experts)
                )
                for layer_idx, experts in self.holders.items()
            }
        )

    def to_dict(self) -> dict[str, list[list[str]]]:
        """JSON form: {"layer": [[shard, ...] per expert]}."""
        return {str(layer): [list(shards) for shards in experts] for layer, experts in self.holders.items()}


def spread_evenly(
    *,
    moe_layers: Sequence[int],
    num_experts: int,
    nodes: Mapping[str, str],
    replicas: int = 1,
) -> Placement:
    """The placement of a mesh that has no load figures yet: every expert `replicas` times, slots dealt in turn.

    nodes maps shard id to node id. Copies of one expert go to different shards, and to different nodes while
    there are any left. Raises ValueError when there are fewer shards than replicas.
    """
    shard_ids = sorted(nodes, key=shard_order)
    if not 1 <= replicas <= len(shard_ids):
        raise ValueError(
            f"replicas={replicas} must lie between 1 and the number of shards ({len(shard_ids)}); "
            "add shards or lower --replicas"
        )
    counts: Counter[str] = Counter()
    holders: dict[int, tuple[tuple[str, ...], ...]] = {}
    for layer_position, layer_idx in enumerate(moe_layers):
        experts = []
        for expert_id in range(num_experts):
            turn = (expert_id + layer_position) % len(shard_ids)
            in_turn = shard_ids[turn:] + shard_ids[:turn]
            chosen: list[str] = []
            for _ in range(replicas):
                used_nodes = {nodes[s] for s in chosen}
                free = [s for s in in_turn if s not in chosen]
                chosen.append(min(free, key=lambda s: (nodes[s] in used_nodes, counts[s])))
                counts[chosen[-1]] += 1
            experts.append(tuple(chosen))
        holders[layer_idx] = tuple(experts)
    return Placement(holders)


def adopt(placement: Placement, survivors: Sequence[str]) -> dict[str, list[ExpertKey]]:
    """Who takes the experts that `placement` is missing: each in turn to the survivor with the fewest slots."""
    counts = placement.slot_counts()
    taken: dict[str, list[ExpertKey]] = {s: [] for s in survivors}
    for key in placement.missing():
        to = min(survivors, key=lambda s: (counts[s], shard_order(s)))
        counts[to] += 1
        taken[to].append(key)
    return {s: keys for s, keys in taken.items() if keys}


def shard_order(shard_id: str) -> tuple[int, str]:
    """Sort key: shard-2 before shard-10."""
    digits = shard_id.rpartition("-")[2]
    return (int(digits) if digits.isdigit() else 0, shard_id)


def keeps_apart(holders: Sequence[str], source: str, target: str, nodes: Mapping[str, str]) -> bool:
    """Whether an expert's copies are on as many nodes after a move of one as before."""
    others = {nodes[s] for s in holders if s != source}
    return nodes[target] not in others or nodes[source] in others
