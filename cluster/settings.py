"""Deadlines of the mesh, and when it changes by itself. Waits that depend on the machines take one of these."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeouts:
    """All in seconds.

    An exchange's deadline is `exchange_factor` times the slowest recent one, within
    [exchange_min_s, exchange_max_s]. A shard's wait for the next header is `idle_s`; routers send a
    heartbeat header every `heartbeat_s`, so only a dead or cut-off router lets it run out.
    A suspect must answer within `ping_s`, anybody within two times `watch_ping_s`. A shard that went silent may come
    back for `rejoin_s`, then it is ended. The placement waits `patience_s` for replacements before it does without.
    """

    exchange_min_s: float = 1.0
    exchange_max_s: float = 30.0
    exchange_factor: float = 4.0
    heartbeat_s: float = 2.0
    idle_s: float = 30.0
    formation_s: float = 5.0
    ping_s: float = 0.4
    watch_ping_s: float = 0.8
    rejoin_s: float = 5.0
    patience_s: float = 30.0
    recovery_s: float = 60.0
    load_s: float = 600.0
    start_s: float = 300.0

    def __post_init__(self) -> None:
        if not 0 < self.exchange_min_s <= self.exchange_max_s:
            raise ValueError(
                f"exchange_min_s={self.exchange_min_s} must be above 0 and at most exchange_max_s={self.exchange_max_s}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class BalancePolicy:
    """When experts move by themselves.

    objective: "tokens" balances rows to compute, "activated" how often an expert is read at all (what counts for a
    decode bound by memory). Loads are those of the last window_s. A plan is made every interval_s and carried out
    when it lowers the summed load of each layer's busiest shard by min_gain (a share), with at most max_moves experts
    loaded. redundant_slots: copies beyond its even share that a shard has memory for.
    """

    enabled: bool = True
    objective: Literal["tokens", "activated"] = "tokens"
    interval_s: float = 30.0
    window_s: float = 120.0
    max_moves: int = 8
    min_gain: float = 0.05
    min_tokens: int = 2000
    redundant_slots: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class AutoscalePolicy:
    """When shards come and go by themselves: one at a time, with cooldown_s between changes; into the limits at once.

    busy: the share of time that the busiest shard computes. wait: the share of their time that routers wait for
    shards. Both above *_high: one more; busy below busy_low, also with one shard less: one less.
    """

    enabled: bool = False
    min_shards: int = 1
    max_shards: int = 8
    busy_high: float = 0.6
    wait_high: float = 0.3
    busy_low: float = 0.2
    interval_s: float = 10.0
    cooldown_s: float = 60.0

    def __post_init__(self) -> None:
        if not 1 <= self.min_shards <= self.max_shards:
            raise ValueError(f"min_shards={self.min_shards} must lie between 1 and max_shards={self.max_shards}")
