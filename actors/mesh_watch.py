"""What the supervisor knows of the load: per expert, per shard, per router; and what follows from it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypedDict

from actors.fleet import Fleet
from actors.load_window import LoadWindow
from actors.mesh_plan import MeshPlan
from cluster.autoscale import Pressure, decide
from cluster.balance import Move, balancedness, shard_loads
from cluster.placement import Placement


class RouterFigures(TypedDict):
    """A router's running totals. tokens: pairs sent per expert; activated: exchanges in which it got any; wait_s:
    time spent waiting for shards; time_s: the router's own clock."""

    tokens: dict[int, list[int]]
    activated: dict[int, list[int]]
    wait_s: float
    time_s: float


class LoadWatch:
    def __init__(self, plan: MeshPlan, clock: Callable[[], float]) -> None:
        self._balance = plan.balance
        self._autoscale = plan.autoscale
        self._clock = clock
        self._tokens = LoadWindow(plan.balance.window_s, clock)
        self._activated = LoadWindow(plan.balance.window_s, clock)
        self._waits: dict[str, tuple[float, float]] = {}  # router -> (wait_s, time_s) at the last look
        self._latest: dict[str, tuple[float, float]] = {}
        self._busy: dict[str, tuple[float, float]] = {}  # shard -> (busy_s, time) at the last look
        self._next_look = clock() + plan.autoscale.interval_s
        self._next_balance = clock() + plan.balance.interval_s
        self._changed_at = clock()
        self._moves: Sequence[Move] = ()
        self.pressure = Pressure(busy=0.0, wait=0.0)

    # ---- what comes in -------------------------------------------------------------------------------

    def note_router(self, router_id: str, figures: RouterFigures) -> None:
        self._tokens.add(router_id, figures["tokens"])
        self._activated.add(router_id, figures["activated"])
        self._latest[router_id] = (figures["wait_s"], figures["time_s"])

    def forget_router(self, router_id: str) -> None:
        self._tokens.forget(router_id)
        self._activated.forget(router_id)
        self._latest.pop(router_id, None)

    def note_scaled(self) -> None:
        """The number of shards has just been changed, by whomever: the autoscaler holds back for its cooldown."""
        self._changed_at = self._clock()

    def note_moves(self, moves: Sequence[Move]) -> None:
        self._moves = moves

    # ---- what follows --------------------------------------------------------------------------------

    def rebalance_due(self) -> bool:
        """Once every interval_s, where it is on."""
        if not self._balance.enabled or self._clock() < self._next_balance:
            return False
        self._next_balance = self._clock() + self._balance.interval_s
        return True

    def balance_loads(self) -> dict[int, list[float]]:
        """The loads to balance; nothing while too little was seen."""
        tokens = self._tokens.loads()
        if sum(sum(counts) for counts in tokens.values()) < self._balance.min_tokens * max(len(tokens), 1):
            return {}
        return tokens if self._balance.objective == "tokens" else self._activated.loads()

    async def wanted_shards(self, fleet: Fleet, plan: MeshPlan) -> int:
        """What the autoscaler makes of the last interval's pressure."""
        if self._clock() < self._next_look or plan.num_shards == 0:
            return plan.num_shards
        self._next_look = self._clock() + self._autoscale.interval_s
        shards = dict(fleet.shards)
        infos = await asyncio.gather(*(fleet.ask(s.handle.info(), 2.0) for s in shards.values()))
        now = self._clock()
        busy = {s: (info["busy_s"], now) for s, info in zip(shards, infos, strict=True) if info is not None}
        self.pressure = Pressure(busy=_rate(self._busy, busy), wait=_rate(self._waits, self._latest))
        self._busy, self._waits = busy, dict(self._latest)
        return decide(self._autoscale, self.pressure, plan.num_shards, now - self._changed_at)

    def report(self, placement: Placement) -> dict[str, Any]:
        """What GET /mesh shows of it. balancedness: see cluster.balance, over the window."""
        tokens = self._tokens.loads()
        ids = sorted(placement.shards())
        totals = dict.fromkeys(ids, 0.0)
        for layer_idx, experts in placement.holders.items():
            if layer_idx in tokens:
                for shard_id, load in shard_loads(experts, tokens[layer_idx], ids).items():
                    totals[shard_id] += load
        return {
            "window_s": self._balance.window_s,
            "expert_load": {str(i): [round(c) for c in counts] for i, counts in tokens.items()},
            "shard_load": {s: round(load) for s, load in totals.items()},
            "balancedness": round(balancedness(placement, tokens), 4),
            "pressure": {"busy": round(self.pressure.busy, 4), "wait": round(self.pressure.wait, 4)},
            "last_moves": [{"layer": m.key[0], "expert": m.key[1], "to": m.to, "from": m.source} for m in self._moves],
        }


def _rate(before: Mapping[str, tuple[float, float]], after: Mapping[str, tuple[float, float]]) -> float:
    """The largest growth per second of time."""
    rates = [
        (value - before[name][0]) / (time_s - before[name][1])
        for name, (value, time_s) in after.items()
        if name in before and time_s > before[name][1]
    ]
    return max(rates, default=0.0)
