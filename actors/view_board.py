"""What the supervisor publishes, and who has read it: the view of the mesh, its history, and the routers that ask."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cluster.placement import Placement
from cluster.view import Member, MeshView

log = logging.getLogger("expertmesh.supervisor")
HEARD_S = 12.0
FORGET_S = 60.0


@dataclass(slots=True)
class _Router:
    info: dict[str, Any]
    seen: float
    live_epoch: int
    told_epoch: int


class ViewBoard:
    """One view at a time; each has a higher epoch than the one before."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._routers: dict[str, _Router] = {}
        self._changed = asyncio.Condition()
        self._history: deque[dict[str, Any]] = deque(maxlen=200)
        self.view = MeshView(epoch=0, shards=(), placement=Placement({}))

    async def publish(
        self, placement: Placement, members: tuple[Member, ...], reason: str, detected: float | None = None
    ) -> None:
        """Make the next view known. detected: when what it mends was noticed, on the clock."""
        self.view = MeshView(epoch=self.view.epoch + 1, shards=members, placement=placement, reason=reason)
        took_ms = None if detected is None else round((self._clock() - detected) * 1e3, 1)
        self._history.append(
            {"epoch": self.view.epoch, "time": time.time(), "reason": reason, "decided_in_ms": took_ms}
        )
        log.warning("epoch %d: %s", self.view.epoch, reason)
        async with self._changed:
            self._changed.notify_all()

    def go_beyond(
        self, epoch: int, placement: Placement | None = None, members: tuple[Member, ...] | None = None
    ) -> None:
        """Have the next view's epoch lie in a new thousand, above any number that was ever given away."""
        self.view = MeshView(
            epoch=(epoch // 1000 + 1) * 1000,
            shards=self.view.shards if members is None else members,
            placement=self.view.placement if placement is None else placement,
        )

    async def wait_above(self, epoch: int, wait_s: float) -> MeshView | None:
        """The first view above `epoch`; None when there is none within wait_s."""
        try:
            async with self._changed, asyncio.timeout(wait_s):
                await self._changed.wait_for(lambda: self.view.epoch > epoch)
        except TimeoutError:
            return None
        return self.view

    # ---- routers -------------------------------------------------------------------------------------

    def note_router(self, router_id: str, info: dict[str, Any], live_epoch: int, told_epoch: int) -> None:
        """It asks for the next view after told_epoch, and computes with live_epoch, or with none (0)."""
        self._routers[router_id] = _Router(info, self._clock(), live_epoch, told_epoch)

    def note_alive(self, router_id: str) -> None:
        """It has waited until now; nothing when it said goodbye meanwhile."""
        if router_id in self._routers:
            self._routers[router_id].seen = self._clock()

    def forget_router(self, router_id: str) -> None:
        self._routers.pop(router_id, None)

    def long_silent(self) -> list[str]:
        """Ids of the routers to forget."""
        horizon = self._clock() - FORGET_S
        return [router_id for router_id, router in self._routers.items() if router.seen < horizon]

    def _heard(self) -> list[_Router]:
        horizon = self._clock() - HEARD_S
        return [router for router in self._routers.values() if router.seen >= horizon]

    def router_infos(self) -> list[dict[str, Any]]:
        """Of the routers heard from lately."""
        return [router.info for router in self._heard()]

    def all_live(self, epoch: int) -> bool:
        """Whether every router that was heard from lately computes with this epoch or a later one; or with none,
        though it was told of this one, so that it won't use an earlier one any more."""
        return all(
            router.live_epoch >= epoch or (router.live_epoch == 0 and router.told_epoch >= epoch)
            for router in self._heard()
        )

    # ---- for people ----------------------------------------------------------------------------------

    def report(self) -> dict[str, Any]:
        """Its part of GET /mesh."""
        now = self._clock()
        return {
            "epoch": self.view.epoch,
            "reason": self.view.reason,
            "placement": self.view.placement.to_dict(),
            "history": list(self._history),
            "routers": [
                {**r.info, "live_epoch": r.live_epoch, "seen_s_ago": round(now - r.seen, 2)}
                for r in self._routers.values()
            ],
        }
