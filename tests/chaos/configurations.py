"""Which meshes the chaos suite runs, and how often which fault strikes each of them."""

from __future__ import annotations

import os
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

SEED = int(os.environ.get("CHAOS_SEED", "5"))
MODEL = os.environ.get("CHAOS_MODEL", "demo")
NUM_FAULTS = int(os.environ["CHAOS_FAULTS"]) if "CHAOS_FAULTS" in os.environ else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Configuration:
    """mesh: settings of that section. faults: how often each kind strikes; in which order, the seed decides."""

    name: str
    words: str
    mesh: Mapping[str, Any]
    faults: Mapping[str, int]

    @property
    def num_shards(self) -> int:
        return int(self.mesh.get("shards", 2))

    @property
    def num_routers(self) -> int:
        return int(self.mesh.get("routers", 1))

    def deal(self, seed: int = SEED, count: int | None = NUM_FAULTS) -> list[str]:
        """All faults in the seed's order, or the first `count` of them."""
        deck = [kind for kind, times in self.faults.items() for _ in range(times)]
        random.Random(f"{seed} {self.name}").shuffle(deck)
        return deck[:count]


@dataclass(slots=True)
class Outcome:
    """What a run measured, in seconds. between_tokens_s: the mean time between two tokens of a stream without faults.

    stalls[kind]: the longest time between two tokens of any stream, for each fault."""

    seed: int = SEED
    model: str = MODEL
    num_cores: int = os.cpu_count() or 1
    num_requests: int = 0
    between_tokens_s: float = 0.0
    stalls: dict[str, list[float]] = field(default_factory=dict)


CONFIGURATIONS = (
    Configuration(
        name="adoption",
        words="3 shards, 2 routers",
        mesh={"shards": 3, "routers": 2},
        faults={
            "kill_shard": 10,
            "stop_shard": 10,
            "kill_router": 10,
            "pause_shard": 2,
            "kill_two_shards": 3,
            "stop_two_shards": 1,
            "kill_during_recovery": 3,
            "kill_during_scale_out": 3,
            "kill_supervisor": 3,
            "kill_supervisor_and_shard": 2,
        },
    ),
    Configuration(
        name="replicas",
        words="3 shards, 2 replicas, 2 routers",
        mesh={"shards": 3, "routers": 2, "replicas": 2},
        faults={"kill_shard": 10, "stop_shard": 2, "kill_two_shards": 2, "kill_during_recovery": 2, "kill_router": 1},
    ),
    Configuration(
        name="spare",
        words="2 shards, 1 spare, 1 router",
        mesh={"shards": 2, "spares": 1},
        faults={"kill_shard": 10, "kill_two_shards": 2, "kill_router": 3},
    ),
    Configuration(
        name="scaling",
        words="2 shards, 1 router",
        mesh={"shards": 2, "rebalance_interval_s": 1.0},
        faults={"scale_out_and_in": 10, "rebalance": 10, "kill_during_rebalance": 3, "kill_shard": 2},
    ),
    Configuration(
        name="all_to_all",
        words="3 shards, 1 router, all_to_all",
        mesh={"shards": 3, "transport": "all_to_all"},
        faults={"kill_shard": 3, "stop_shard": 1},
    ),
    Configuration(
        name="star",
        words="3 shards, 1 router, star",
        mesh={"shards": 3, "transport": "star"},
        faults={"kill_shard": 3, "stop_shard": 1},
    ),
)
