"""How much each expert was used lately, from the running totals that routers send."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence

Totals = Mapping[int, Sequence[float]]  # layer_idx -> count of each expert


class LoadWindow:
    """Sums over the last window_s seconds, in tenths of the window."""

    def __init__(self, window_s: float, clock: Callable[[], float]) -> None:
        self._bucket_s = window_s / 10
        self._clock = clock
        self._seen: dict[str, dict[int, list[float]]] = {}
        self._buckets: deque[tuple[float, dict[int, list[float]]]] = deque(maxlen=10)

    def add(self, router_id: str, totals: Totals) -> None:
        """A router's counts since its start. Its first ones count in full."""
        now = self._clock()
        if not self._buckets or now - self._buckets[-1][0] >= self._bucket_s:
            self._buckets.append((now, {}))
        bucket = self._buckets[-1][1]
        before = self._seen.setdefault(router_id, {})
        for layer_idx, counts in totals.items():
            old = before.get(layer_idx) or [0.0] * len(counts)
            sums = bucket.setdefault(layer_idx, [0.0] * len(counts))
            for expert_id, count in enumerate(counts):
                sums[expert_id] += count - old[expert_id]
            before[layer_idx] = list(counts)

    def forget(self, router_id: str) -> None:
        self._seen.pop(router_id, None)

    def loads(self) -> dict[int, list[float]]:
        """layer_idx -> count of each expert within the window."""
        horizon = self._clock() - 10 * self._bucket_s
        total: dict[int, list[float]] = {}
        for started, bucket in self._buckets:
            if started < horizon:
                continue
            for layer_idx, counts in bucket.items():
                sums = total.setdefault(layer_idx, [0.0] * len(counts))
                for expert_id, count in enumerate(counts):
                    sums[expert_id] += count
        return total
