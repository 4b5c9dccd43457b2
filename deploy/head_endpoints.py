"""Routes of the task heads: vLLM's pooling endpoints, and Hugging Face's with one URL for each task."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response

from deploy import huggingface
from deploy.classify import ClassifyRequest, classify
from deploy.endpoints import Endpoints
from deploy.huggingface import HuggingFaceBody
from deploy.huggingface_generation import GENERATION, TextGenerationRequest
from deploy.openai_requests import Body
from deploy.pooling import EmbeddingRequest, PoolingBody, PoolingRequest, embed, pool
from deploy.score import ScoreRequest, score
from deploy.sse import whole_answer

HeadBody = TypeVar("HeadBody", bound=PoolingBody)
HuggingFaceTask = Callable[..., Coroutine[Any, Any, Any]]  # (service, body, name of the model or None)


def add_to(endpoints: Endpoints) -> None:
    service = endpoints.service

    def add(path: str, body: type[HeadBody], id_prefix: str, run: Callable[..., Coroutine[Any, Any, Any]]) -> None:
        async def serve(request: Request, parsed: HeadBody) -> Response:
            answer_id = id_prefix + (parsed.request_id or request.state.request_id)
            return await whole_answer(request, run(service, parsed, answer_id))

        endpoints.add(path, body, serve, name=path)

    add("/classify", ClassifyRequest, "classify-", classify)
    add("/pooling", PoolingRequest, "pool-", pool)
    add("/v1/embeddings", EmbeddingRequest, "embd-", embed)
    add("/score", ScoreRequest, "score-", score)
    add("/v1/score", ScoreRequest, "score-", score)

    def add_task(
        task: str, body: type[Body], serve: Callable[[Request, Body, str | None], Awaitable[Response]]
    ) -> None:
        endpoints.add(f"/hf/{task}", body, lambda request, parsed: serve(request, parsed, None), name=task)

        @endpoints.api.post(f"/hf/{task}/{{model:path}}", name=f"{task} of a model")
        async def named_model(request: Request, model: str) -> Response:
            return await serve(request, await endpoints.read(request, body), model or None)

    def add_pipeline(task: str, run: HuggingFaceTask) -> None:
        async def serve(request: Request, body: HuggingFaceBody, name: str | None) -> Response:
            return await whole_answer(request, run(service, body, name))

        add_task(task, HuggingFaceBody, serve)

    async def generate(request: Request, body: TextGenerationRequest, name: str | None) -> Response:
        named = body.model_copy(update={"model": name}) if name else body
        return await GENERATION.serve(service, request, named)

    add_pipeline("text-classification", huggingface.text_classification)
    add_pipeline("token-classification", huggingface.token_classification)
    add_pipeline("question-answering", huggingface.question_answering)
    add_pipeline("zero-shot-classification", huggingface.zero_shot_classification)
    add_task("text-generation", TextGenerationRequest, generate)
