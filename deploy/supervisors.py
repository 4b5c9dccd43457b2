"""The supervisors of all meshes that an ingress serves, as it asks them. One of them keeps the ingresses' ledger."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from actors.ledger import Totals
from deploy.errors import ModelNotFound, Unavailable, invalid

log = logging.getLogger("expertmesh.supervisors")


class Supervisors:
    """models: mesh name -> the names under which its models are served; the first mesh keeps the ledger.

    find: a mesh's supervisor, as a Ray actor's handle; it may block and raise. After an error it is looked up again:
    it may be a new one."""

    def __init__(self, models: Mapping[str, Sequence[str]], find: Callable[[str], Any]) -> None:
        self._models = models
        self._first = next(iter(models), "")
        self._find = find
        self._found: dict[str, Any] = {}
        self._listed: dict[str, list[dict[str, Any]]] = {}

    async def routers(self) -> list[dict[str, Any]]:
        """The routers of all meshes. Where a supervisor is away its last answer stands; raises where all are."""
        answers = await asyncio.gather(*(self._ask(mesh, "routers") for mesh in self._models), return_exceptions=True)
        for mesh, answer in zip(self._models, answers, strict=True):
            if not isinstance(answer, BaseException):
                self._listed[mesh] = list(answer)
            elif len(self._models) == 1:
                raise answer
            else:
                log.warning("mesh %s: its supervisor does not answer: %s", mesh, answer)
        return [router for routers in self._listed.values() for router in routers]

    async def mesh(self, model: str | None = None) -> dict[str, Any]:
        """What GET /mesh shows: the mesh of a model, or the first with the others under `further_meshes`.

        Raises Unavailable, or ModelNotFound."""
        names = list(self._models) if model is None else [self._mesh_of(model)]
        try:
            views = await asyncio.gather(*(self._ask(mesh, "mesh") for mesh in names))
        except Exception as error:
            raise _away(error) from None
        first, *further = [
            {"mesh": mesh, "models": list(self._models[mesh]), **view} for mesh, view in zip(names, views, strict=True)
        ]
        return {**first, "further_meshes": {one["mesh"]: one for one in further}} if further else first

    async def scale(self, num_shards: int, model: str | None = None) -> dict[str, Any]:
        """Raises ValueError for a number that can't be, InvalidRequest where it is not clear which mesh is meant."""
        if model is None and len(self._models) > 1:
            choices = ", ".join(names[0] for names in self._models.values())
            raise invalid("model", f"there are several meshes; name the model of one: {choices}")
        mesh = self._first if model is None else self._mesh_of(model)
        try:
            return {"mesh": mesh, **await self._ask(mesh, "scale", num_shards)}
        except ValueError:
            raise
        except Exception as error:
            raise _away(error) from None

    # ---- actors.ledger.Ledger in the first mesh's supervisor: counts over all ingresses and all meshes ----

    async def share(self, ingress_id: str, totals: Totals) -> Totals:
        return dict(await self._ask(self._first, "share", ingress_id, totals))

    async def admit(self, key: str, request_id: str, **limits: Any) -> tuple[str, float]:
        refused, wait_s = await self._ask(self._first, "admit", key, request_id, limits)
        return str(refused), float(wait_s)

    async def release(self, key: str, request_id: str) -> None:
        await self._ask(self._first, "release", key, request_id)

    def _mesh_of(self, model: str) -> str:
        for mesh, names in self._models.items():
            if model in names:
                return mesh
        known = ", ".join(name for names in self._models.values() for name in names)
        raise ModelNotFound(f"The model {model[:200]!r} does not exist; there are: {known}", param="model")

    async def _ask(self, mesh: str, method: str, *args: Any) -> Any:
        try:
            if mesh not in self._found:
                self._found[mesh] = await asyncio.to_thread(self._find, mesh)
            async with asyncio.timeout(5.0):
                return await getattr(self._found[mesh], method).remote(*args)
        except Exception:
            self._found.pop(mesh, None)
            raise


def _away(error: Exception) -> Unavailable:
    log.warning("a supervisor does not answer: %s", str(error)[:300] or type(error).__name__)
    return Unavailable("the mesh's supervisor is away; requests are served meanwhile, ask again", code="no_supervisor")
