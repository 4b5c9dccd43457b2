"""What the mesh should look like, and the placement that gets there with few moves."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from cluster.placement import Placement, shard_order, spread_evenly
from cluster.rebalance import level
from cluster.settings import AutoscalePolicy, BalancePolicy


@dataclass(frozen=True, slots=True, kw_only=True)
class MeshPlan:
    """num_spares: further shards that run empty, ready to take over a lost one's experts.

    num_shards 0: no shards at all, routers hold the experts themselves (`--local`).
    """

    moe_layers: tuple[int, ...]
    num_experts: int
    num_shards: int
    replicas: int = 1
    num_spares: int = 0
    balance: BalancePolicy = BalancePolicy()
    autoscale: AutoscalePolicy = AutoscalePolicy()

    def __post_init__(self) -> None:
        if self.num_shards == 0:
            return
        if not 1 <= self.num_shards <= self.num_experts * self.replicas:
            raise ValueError(
                f"shards={self.num_shards} must lie between 1 and {self.num_experts * self.replicas} "
                f"({self.num_experts} experts a layer, {self.replicas} copies each)"
            )
        if not 1 <= self.replicas <= self.num_shards:
            raise ValueError(
                f"replicas={self.replicas} must lie between 1 and the number of shards ({self.num_shards}); "
                "copies of an expert go to different shards"
            )

    @property
    def total_shards(self) -> int:
        return self.num_shards + self.num_spares

    @property
    def max_slots(self) -> int:
        """The most experts that one shard may hold."""
        slots = len(self.moe_layers) * self.num_experts * min(self.replicas, self.num_shards)
        return math.ceil(slots / self.num_shards) + self.balance.redundant_slots

    def with_shards(self, num_shards: int) -> MeshPlan:
        """Raises ValueError where the number can't be."""
        return replace(self, num_shards=num_shards)


def plan_placement(plan: MeshPlan, nodes: Mapping[str, str], current: Placement) -> Placement:
    """Every expert `replicas` times on the plan's number of shards, moving as little as possible from `current`.

    nodes: live shard id -> node id. Shards that serve now are kept before idle ones, older before newer.
    """
    serving = current.shards()
    ranked = sorted(nodes, key=lambda s: (s not in serving, shard_order(s)))
    chosen = {s: nodes[s] for s in ranked[: plan.num_shards]}
    replicas = min(plan.replicas, len(chosen))
    if not serving & set(chosen):
        return spread_evenly(moe_layers=plan.moe_layers, num_experts=plan.num_experts, nodes=chosen, replicas=replicas)
    return level(current, chosen, replicas, plan.balance.redundant_slots)
