"""Routes for those who watch: GET /metrics, and the page at /."""

from __future__ import annotations

import asyncio
import logging
import uuid
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import HTMLResponse, Response

from actors.ledger import Totals
from deploy.mesh_endpoints import PAGE_HEADERS, show_mesh
from deploy.metrics import ServingMetrics, render
from deploy.service import Service
from deploy.supervisors import Supervisors

logger = logging.getLogger(__name__)
PAGE = Path(__file__).parent / "pages" / "index.html"
SHARE_WITHIN_S = 5.0


class Sharing:
    """This ingress' counters, to the others and back. With no ledger there are no others."""

    def __init__(self, metrics: ServingMetrics, ledger: Supervisors | None) -> None:
        self._metrics = metrics
        self._ledger = ledger
        self._ingress_id = uuid.uuid4().hex
        self._known: Totals = {}
        self._soon: asyncio.Task[Totals] | None = None

    def soon(self) -> None:
        """Something was counted: tell it within SHARE_WITHIN_S. Call from the event loop."""
        if self._ledger is not None and (self._soon is None or self._soon.done()):
            self._soon = asyncio.create_task(self.share(SHARE_WITHIN_S))

    async def share(self, delay_s: float = 0.0) -> Totals:
        """The other ingresses' totals; the last ones known while they can't be had."""
        await asyncio.sleep(delay_s)
        if self._ledger is not None:
            try:
                async with asyncio.timeout(2.0):
                    self._known = await self._ledger.share(self._ingress_id, self._metrics.totals())
            except Exception as error:
                logger.info("the other ingresses' metrics can't be had: %s", str(error)[:200])
        return self._known


async def known_mesh(service: Service, supervisors: Supervisors | None) -> dict[str, Any]:
    """All that can be learnt of the meshes now."""
    try:
        async with asyncio.timeout(3.0):
            return await show_mesh(service, supervisors)
    except Exception as error:  # a supervisor is away; the routers still tell
        logger.info("no word from the supervisor: %s", str(error)[:200])
        return await show_mesh(service, None)


def add_to(api: FastAPI, service: Service, supervisors: Supervisors | None, sharing: Sharing) -> None:
    @api.get("/metrics")
    async def metrics() -> Response:
        others, now = await asyncio.gather(sharing.share(), known_mesh(service, supervisors))
        return Response(render(service.pool.metrics, others, now), media_type=CONTENT_TYPE_LATEST)

    @api.get("/", include_in_schema=False)
    async def page() -> Response:
        return HTMLResponse(PAGE.read_text(encoding="utf-8"), headers=PAGE_HEADERS)
