"""The agreed membership: one epoch, its shards, and where the experts are.

Only the supervisor makes a new view, always with a higher epoch. Routers build one process group per view:
rank 0 is the router, rank 1 + i is `shards[i]`. A group that failed is never used again; the next one has the
next epoch's name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cluster.placement import Placement


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One shard as the supervisor knows it."""

    shard_id: str
    actor_name: str
    node_id: str
    host: str
    pid: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MeshView:
    """shards: members in rank order (rank = index + 1). reason: why this epoch was made, for people."""

    epoch: int
    shards: tuple[Member, ...]
    placement: Placement
    reason: str = ""

    @property
    def shard_ids(self) -> tuple[str, ...]:
        return tuple(member.shard_id for member in self.shards)

    def to_dict(self) -> dict[str, Any]:
        """JSON form, without the placement (ask for it apart: it is large)."""
        return {
            "epoch": self.epoch,
            "reason": self.reason,
            "shards": [{name: getattr(m, name) for name in Member.__dataclass_fields__} for m in self.shards],
        }
