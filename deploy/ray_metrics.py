"""The metrics of GET /metrics once more through ray.util.metrics, for those who scrape Ray's own agents already.

At a node's metrics port they are called `ray_expertmesh_...`. Every sample goes in as a gauge of its own full name, so
that buckets, sums and totals keep theirs and any query works on either with the prefix changed. Ray's come up to
`EVERY_S` and Ray's own interval late and have labels for process and node; GET /metrics is up to date.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from typing import Any

from prometheus_client.metrics_core import Metric

from deploy.mesh_metrics import mesh_families
from deploy.monitoring import known_mesh
from deploy.service import Service
from deploy.supervisors import Supervisors

log = logging.getLogger("expertmesh.metrics")
EVERY_S = 5.0


class RayMetrics:
    """gauge: ray.util.metrics.Gauge. with_mesh: tell of routers and shards too; one ingress of all does."""

    def __init__(self, gauge: Callable[..., Any], *, with_mesh: bool) -> None:
        self._new = gauge
        self._with_mesh = with_mesh
        self._gauges: dict[str, Any] = {}
        self._shown: dict[tuple[str, tuple[tuple[str, str], ...]], str] = {}  # sample -> type of its family

    def publish(self, families: Iterable[Metric]) -> None:
        """Set every sample. A gauge that is no longer there goes to 0: Ray forgets none while the process lives."""
        now = {}
        for family in families:
            for sample in family.samples:
                if sample.name not in self._gauges:
                    tags = tuple(sample.labels)
                    self._gauges[sample.name] = self._new(sample.name, family.documentation, tag_keys=tags)
                self._gauges[sample.name].set(sample.value, tags=dict(sample.labels))
                now[sample.name, tuple(sample.labels.items())] = family.type
        for (name, labels), kind in self._shown.items():
            if kind == "gauge" and (name, labels) not in now:
                self._gauges[name].set(0.0, tags=dict(labels))
        self._shown = now

    async def repeat(self, service: Service, supervisors: Supervisors | None) -> None:
        """Publish what this ingress counts itself, until cancelled."""
        while True:
            try:
                mesh = mesh_families(await known_mesh(service, supervisors)) if self._with_mesh else []
                self.publish([*service.pool.metrics.families({}), *mesh])
            except Exception as error:
                log.warning("no metrics for Ray this time: %s", str(error)[:200])
            await asyncio.sleep(EVERY_S)
