"""The agreed membership: one epoch, its shards, and where the experts are.

Only the supervisor makes a new view, always with a higher epoch. A router builds a process group for a view, with the
epoch in its name: rank 0 is the router, rank 1 + i is `shards[i]`. A later view whose members are all in that group is
served by it too; a group in which something may still be under way after a failure is never used again.
"""

from __future__ import annotations

from dataclasses import dataclass

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
