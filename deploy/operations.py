"""Routes for operators and for looking around: health, models, settings."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.requests import Request
from starlette.responses import Response

from deploy.endpoints import Endpoints
from deploy.errors import Unavailable
from deploy.openai_requests import RequestBody
from deploy.served_model import ServedModel
from deploy.service import VERSION
from deploy.settings import SECRETS
from deploy.sse import JsonAnswer, event


class LoadModelRequest(RequestBody):
    model: str | None = None


def add_to(endpoints: Endpoints) -> None:
    api, service = endpoints.api, endpoints.service

    def refuse_without_routers(models: Sequence[ServedModel]) -> None:
        missing = [model.names[0] for model in models if not service.pool.serves(model.names[0])]
        if missing:
            raise Unavailable(
                f"no router is up for {', '.join(missing)}; the mesh is starting or recovering", code="no_router"
            )

    @api.get("/health")
    async def health() -> Response:
        """Requests for the first model can finish. That this process lives is /ping."""
        refuse_without_routers(service.models.models[:1])
        return Response(status_code=200)

    @api.get("/ping")
    @api.post("/ping", include_in_schema=False)
    async def ping() -> Response:
        return Response(status_code=200)

    @api.get("/ready")
    async def ready() -> Response:
        """Every model is served and there is room: new requests are welcome."""
        refuse_without_routers(service.models.models)
        if service.num_active >= service.settings.limits.max_queue:
            raise Unavailable("the queue is full", code="queue_full")
        return JsonAnswer({"routers": len(service.pool.links)})

    @api.get("/version")
    async def version() -> Response:
        return JsonAnswer({"version": VERSION})

    @api.get("/load")
    async def load() -> Response:
        return JsonAnswer({"server_load": service.num_active})

    @api.get("/v1/models")
    async def list_models() -> Response:
        return JsonAnswer({"object": "list", "data": service.models.cards()})

    @api.get("/v1/models/{name:path}")
    async def show_model(name: str) -> Response:
        return JsonAnswer(service.models.find(name).card(name))

    async def load_model(_: Request, body: LoadModelRequest) -> Response:
        """As `transformers serve` answers when the model is in memory already, which ours always is."""
        model = service.models.find_generator(body.model)
        status = {"status": "ready", "model": body.model or model.names[0], "cached": True}
        return Response(event(status), media_type="text/event-stream")

    endpoints.add("/load_model", LoadModelRequest, load_model)  # `transformers chat` calls it before it chats

    @api.get("/server_info")
    async def server_info() -> Response:
        settings = service.settings.model_dump(mode="json")
        for secret in SECRETS:
            section, field = secret.split(".")
            settings[section][field] = "********" if settings[section][field] else None
        return JsonAnswer({"version": VERSION, "settings": settings, "models": service.models.cards()})

    @api.post("/reset_prefix_cache")
    async def reset_prefix_cache() -> Response:
        return JsonAnswer({"routers": await service.pool.command("reset_prefix_cache")})
