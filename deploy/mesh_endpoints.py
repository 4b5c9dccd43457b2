"""Routes that show, draw and change the mesh."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from cluster.errors import root_cause
from deploy.endpoints import read_json
from deploy.errors import InvalidRequest, Unavailable, invalid
from deploy.service import Service
from deploy.sse import JsonAnswer
from deploy.supervisors import Supervisors

PAGE = Path(__file__).parent / "pages" / "mesh.html"
# A page brings everything itself; nothing else may run or be loaded, and it may not be framed.
PAGE_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
}


async def show_mesh(service: Service, supervisors: Supervisors | None, model: str | None = None) -> dict[str, Any]:
    """What the supervisors know, and each router's own figures over its link; without supervisors those alone.

    Raises Unavailable or ModelNotFound."""
    figures = service.pool.command("stats", timeout_s=2.0)
    if supervisors is None:
        return {"routers": [{"router_id": name, **stats} for name, stats in (await figures).items()]}
    mesh: dict[str, Any]
    mesh, known = await asyncio.gather(supervisors.mesh(model), figures)
    for one in (mesh, *mesh.get("further_meshes", {}).values()):
        one["routers"] = [{**router, **known.get(router["router_id"], {})} for router in one["routers"]]
    return mesh


def add_to(api: FastAPI, service: Service, supervisors: Supervisors | None) -> None:
    page = PAGE.read_text(encoding="utf-8")

    @api.get("/mesh")
    async def mesh(model: str | None = None) -> Response:
        """The mesh of a model; without one the first, and the others under `further_meshes`."""
        return JsonAnswer(await show_mesh(service, supervisors, model or None))

    @api.get("/mesh/view", response_class=HTMLResponse)
    async def view() -> Response:
        """The mesh as a page: who holds what, what is hot, what moved. It asks GET /mesh every second, with its own
        query, so /mesh/view?model=NAME draws another mesh."""
        return HTMLResponse(page, headers=PAGE_HEADERS)

    @api.post("/mesh/scale", status_code=202)
    async def change_number_of_shards(request: Request) -> Response:
        """{"shards": N}, and "model" where there are several meshes: start or drain shards until there are N, while
        requests run. Answers at once; GET /mesh says `settled` when it is done."""
        body = await read_json(request, service.settings.limits)
        number, model = (body.get("shards"), body.get("model")) if isinstance(body, dict) else (None, None)
        if not isinstance(number, int) or isinstance(number, bool):
            raise InvalidRequest('send {"shards": N} with a whole number', param="shards")
        if model is not None and not isinstance(model, str):
            raise invalid("model", "expected the name of a model")
        if supervisors is None:
            raise Unavailable("this service has no mesh to scale", code="no_mesh")
        try:
            return JsonAnswer(await supervisors.scale(number, model), status_code=202)
        except ValueError as error:
            raise InvalidRequest(root_cause(str(error)), param="shards") from None
