"""Routes of the task heads: vLLM's pooling endpoints, and Hugging Face's with one URL for each task."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

from deploy.body import read_json
from deploy.classify import ClassifyRequest, classify
from deploy.errors import ApiError
from deploy.huggingface import (
    HuggingFaceBody,
    question_answering,
    text_classification,
    token_classification,
    zero_shot_classification,
)
from deploy.huggingface_generation import TextGenerationRequest, generate_text, plan_text_generation, stream_text
from deploy.openai_requests import RequestBody, parse
from deploy.pooling import EmbeddingRequest, PoolingBody, PoolingRequest, embed, pool
from deploy.score import ScoreRequest, score
from deploy.service import Service
from deploy.sse import JsonAnswer, client_left, event, start_stream, until_disconnect

Body = TypeVar("Body", bound=PoolingBody)
HuggingFaceTask = Callable[[Service, HuggingFaceBody, str | None], Coroutine[Any, Any, Any]]
_TASKS: dict[str, HuggingFaceTask] = {
    "text-classification": text_classification,
    "token-classification": token_classification,
    "question-answering": question_answering,
    "zero-shot-classification": zero_shot_classification,
}
BODIES: dict[str, type[RequestBody]] = {
    "/classify": ClassifyRequest,
    "/pooling": PoolingRequest,
    "/v1/embeddings": EmbeddingRequest,
    "/score": ScoreRequest,
    "/v1/score": ScoreRequest,
    "/hf/text-generation": TextGenerationRequest,
    **{f"/hf/{task}": HuggingFaceBody for task in _TASKS},
}


def add_to(api: FastAPI, service: Service) -> None:
    def add(path: str, body: type[Body], id_prefix: str, run: Callable[..., Coroutine[Any, Any, Any]]) -> None:
        @api.post(path, name=path)
        async def endpoint(request: Request) -> Response:
            parsed = parse(await _read(request, service), body)
            answer_id = id_prefix + (parsed.request_id or request.state.request_id)
            return await _answer(request, run(service, parsed, answer_id))

    add("/classify", ClassifyRequest, "classify-", classify)
    add("/pooling", PoolingRequest, "pool-", pool)
    add("/v1/embeddings", EmbeddingRequest, "embd-", embed)
    add("/score", ScoreRequest, "score-", score)
    add("/v1/score", ScoreRequest, "score-", score)

    def add_task(task: str, serve: Callable[[Request, str | None], Awaitable[Response]]) -> None:
        @api.post(f"/hf/{task}", name=task)
        async def first_model(request: Request) -> Response:
            return await serve(request, None)

        @api.post(f"/hf/{task}/{{model:path}}", name=f"{task} of a model")
        async def named_model(request: Request, model: str) -> Response:
            return await serve(request, model or None)

    def pipeline(run: HuggingFaceTask) -> Callable[[Request, str | None], Awaitable[Response]]:
        async def serve(request: Request, name: str | None) -> Response:
            body = parse(await _read(request, service), HuggingFaceBody)
            return await _answer(request, run(service, body, name))

        return serve

    async def generate(request: Request, name: str | None) -> Response:
        body = parse(await _read(request, service), TextGenerationRequest)
        plan = await plan_text_generation(service, body, name)
        if body.stream:
            return await start_stream(request, stream_text(service, plan), _end_with_error)
        return await _answer(request, generate_text(service, plan))

    for task, run in _TASKS.items():
        add_task(task, pipeline(run))
    add_task("text-generation", generate)


async def _read(request: Request, service: Service) -> Any:
    return await read_json(request, service.settings.limits.max_body_bytes)


async def _answer(request: Request, work: Coroutine[Any, Any, Any]) -> Response:
    answer = await until_disconnect(request, work)
    return client_left() if answer is None else JsonAnswer(answer)


def _end_with_error(error: ApiError) -> bytes:
    return event(error.huggingface_body())
