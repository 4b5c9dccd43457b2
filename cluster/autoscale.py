"""When to add or end a shard, from what shards and routers measured. One pure function."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.settings import AutoscalePolicy


@dataclass(frozen=True, slots=True, kw_only=True)
class Pressure:
    """busy: share of time that the busiest shard computed. wait: largest share of time a router waited for shards."""

    busy: float
    wait: float


def decide(policy: AutoscalePolicy, pressure: Pressure, num_shards: int, since_change_s: float) -> int:
    """The number of shards there should be; changes by one at most, but at once into the policy's limits.

    A shard less must leave the others below busy_high still, so that no two decisions follow each other for ever.
    """
    within = min(max(num_shards, policy.min_shards), policy.max_shards)
    if not policy.enabled or within != num_shards:
        return within if policy.enabled else num_shards
    if since_change_s < policy.cooldown_s:
        return num_shards
    if pressure.busy > policy.busy_high and pressure.wait > policy.wait_high:
        return min(num_shards + 1, policy.max_shards)
    would_be = pressure.busy * num_shards / max(num_shards - 1, 1)
    if pressure.busy < policy.busy_low and would_be < policy.busy_high:
        return max(num_shards - 1, policy.min_shards)
    return num_shards
