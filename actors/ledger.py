"""What all ingresses share: their counters, so that any one can tell the totals, and each key's use of its limits.

A plain class with a clock; the supervisor's actor holds one. Nothing here is needed for serving: an ingress that can't
reach it counts for itself.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field

Totals = dict[str, list[tuple[str, dict[str, str], float]]]  # family -> (sample, labels, value)
GAUGES = frozenset({"expertmesh_ingress_requests"})  # not kept of an ingress that is gone
SILENT_S = 30.0
MAX_APART = 16  # ingresses that are gone and might come back: one was only quiet; of older ones there is a sum


@dataclass(slots=True)
class _Ingress:
    totals: Totals
    seen: float


@dataclass(slots=True)
class _Key:
    """A token bucket, and the requests in flight with the time until when each is believed."""

    tokens: float
    at: float
    leases: dict[str, float] = field(default_factory=dict)


class Ledger:
    """One per mesh."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._ingresses: dict[str, _Ingress] = {}
        self._departed: dict[str, Totals] = {}  # the oldest first
        self._long_gone: Totals = {}
        self._keys: dict[str, _Key] = {}

    def share(self, ingress_id: str, totals: Totals) -> Totals:
        """Note one ingress' totals; returns the sum of all others', those that are gone included."""
        now = self._clock()
        self._departed.pop(ingress_id, None)
        self._ingresses[ingress_id] = _Ingress(totals, now)
        for gone in [i for i, ingress in self._ingresses.items() if ingress.seen < now - SILENT_S]:
            left = self._ingresses.pop(gone).totals
            self._departed[gone] = {name: samples for name, samples in left.items() if name not in GAUGES}
        while len(self._departed) > MAX_APART:
            self._long_gone = add(self._long_gone, self._departed.pop(next(iter(self._departed))))
        there = [ingress.totals for other, ingress in self._ingresses.items() if other != ingress_id]
        return functools.reduce(add, [*self._departed.values(), *there], self._long_gone)

    def admit(
        self, key: str, request_id: str, *, per_minute: int | None, at_once: int | None, lease_s: float
    ) -> tuple[str, float]:
        """("", 0) when the key may send this request now, else ("rate" or "concurrency", seconds until it may).

        A lease ends with release(), or by itself after lease_s, so that an ingress that dies takes nothing with it.
        """
        now = self._clock()
        account = self._keys.setdefault(key, _Key(math.inf, now))  # full, whatever its rate will be
        account.leases = {r: until for r, until in account.leases.items() if until > now}
        if at_once is not None and len(account.leases) >= at_once:
            return "concurrency", 1.0
        if per_minute is not None:
            account.tokens = min(float(per_minute), account.tokens + (now - account.at) * per_minute / 60.0)
            account.at = now
            if account.tokens < 1.0:
                return "rate", (1.0 - account.tokens) * 60.0 / per_minute
            account.tokens -= 1.0
        account.leases[request_id] = now + lease_s
        if len(self._keys) > 10_000:  # keys are few; guards against our own mistakes
            self._keys = {k: a for k, a in self._keys.items() if a.leases or now - a.at < 120.0}
        return "", 0.0

    def release(self, key: str, request_id: str) -> None:
        """The request is over."""
        if key in self._keys:
            self._keys[key].leases.pop(request_id, None)


def add(left: Totals, right: Totals) -> Totals:
    """Sample by sample."""
    result: Totals = {}
    for family in [*left, *(name for name in right if name not in left)]:
        values: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
        for name, labels, value in [*left.get(family, ()), *right.get(family, ())]:
            key = (name, tuple(sorted(labels.items())))
            values[key] = values.get(key, 0.0) + value
        result[family] = [(name, dict(labels), value) for (name, labels), value in values.items()]
    return result
