"""POST /load_model, which `transformers chat` calls before it chats."""

from __future__ import annotations

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

from deploy.body import read_json
from deploy.openai_requests import RequestBody, parse
from deploy.service import Service
from deploy.sse import event


class LoadModelRequest(RequestBody):
    model: str | None = None


def add_to(api: FastAPI, service: Service) -> None:
    @api.post("/load_model")
    async def load_model(request: Request) -> Response:
        """As `transformers serve` answers when the model is in memory already, which ours always is."""
        body = parse(await read_json(request, service.settings.limits.max_body_bytes), LoadModelRequest)
        model = service.models.find_generator(body.model)
        status = {"status": "ready", "model": body.model or model.names[0], "cached": True}
        return Response(event(status), media_type="text/event-stream")
