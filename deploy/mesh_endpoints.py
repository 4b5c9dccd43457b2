"""Routes that change and draw the mesh. GET /mesh itself is with the other routes for looking around."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from deploy.body import read_json
from deploy.errors import InvalidRequest, Unavailable
from deploy.service import Service
from deploy.sse import JsonAnswer

PAGE = Path(__file__).parent / "pages" / "mesh.html"
Scale = Callable[[int], Awaitable[dict[str, Any]]]


def add_to(api: FastAPI, service: Service, scale: Scale | None) -> None:
    page = PAGE.read_text(encoding="utf-8")

    @api.get("/mesh/view", response_class=HTMLResponse)
    async def view() -> Response:
        """The mesh as a page: who holds what, what is hot, what moved. It asks GET /mesh every second."""
        return HTMLResponse(page)

    @api.post("/mesh/scale", status_code=202)
    async def change_number_of_shards(request: Request) -> Response:
        """{"shards": N}: start or drain shards until there are N, while requests run. Answers at once; GET /mesh says
        `settled` when it is done."""
        body = await read_json(request, service.settings.limits.max_body_bytes)
        number = body.get("shards") if isinstance(body, dict) else None
        if not isinstance(number, int) or isinstance(number, bool):
            raise InvalidRequest('send {"shards": N} with a whole number', param="shards")
        if scale is None:
            raise Unavailable("this service has no mesh to scale", code="no_mesh")
        try:
            return JsonAnswer(await scale(number), status_code=202)
        except ValueError as error:
            raise InvalidRequest(str(error).strip().splitlines()[-1], param="shards") from None
