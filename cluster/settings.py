"""Deadlines of the mesh. Every wait in the system takes one of these."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeouts:
    """All in seconds.

    An exchange's deadline is `exchange_factor` times the slowest recent one, within
    [exchange_min_s, exchange_max_s]. A shard's wait for the next header is `idle_s`; routers send a
    heartbeat header every `heartbeat_s`, so only a dead or cut-off router lets it run out.
    """

    exchange_min_s: float = 1.0
    exchange_max_s: float = 30.0
    exchange_factor: float = 4.0
    heartbeat_s: float = 2.0
    idle_s: float = 30.0
    formation_s: float = 5.0
    ping_s: float = 0.4
    recovery_s: float = 60.0
    load_s: float = 600.0
    start_s: float = 300.0

    def __post_init__(self) -> None:
        if self.heartbeat_s * 3 > self.idle_s:
            raise ValueError(
                f"idle_s={self.idle_s} must be at least three times heartbeat_s={self.heartbeat_s}; raise idle_s"
            )
        if not 0 < self.exchange_min_s <= self.exchange_max_s:
            raise ValueError(
                f"exchange_min_s={self.exchange_min_s} must be above 0 and at most exchange_max_s={self.exchange_max_s}"
            )
