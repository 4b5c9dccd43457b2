"""Routes for looking at tokens, as vLLM has them: /tokenize, /detokenize, /tokenizer_info."""

from __future__ import annotations

from pydantic_core import to_json
from starlette.requests import Request
from starlette.responses import Response

from deploy.chat_messages import read_messages, render
from deploy.endpoints import Endpoints
from deploy.errors import invalid
from deploy.generation_plan import check_prompt
from deploy.openai_requests import DetokenizeRequest, TokenizeRequest
from deploy.service import Service
from deploy.sse import JsonAnswer, whole_answer
from deploy.tools import read_tool_use


def add_to(endpoints: Endpoints) -> None:
    service = endpoints.service

    async def serve_tokens(request: Request, body: TokenizeRequest) -> Response:
        return await whole_answer(request, tokenize(service, body))

    async def serve_text(request: Request, body: DetokenizeRequest) -> Response:
        return await whole_answer(request, detokenize(service, body))

    endpoints.add("/tokenize", TokenizeRequest, serve_tokens)
    endpoints.add("/detokenize", DetokenizeRequest, serve_text)

    @endpoints.api.get("/tokenizer_info")
    async def tokenizer_info() -> Response:
        tokenizer = service.models.models[0].tokenizer
        info = dict(tokenizer.config)
        if tokenizer.chat_template is not None:
            info["chat_template"] = tokenizer.chat_template.sources.get("default")
        return JsonAnswer({"tokenizer_class": "PreTrainedTokenizerFast", **info})


async def tokenize(service: Service, body: TokenizeRequest) -> bytes:
    """The answer as JSON."""
    model = service.models.find(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise invalid("prompt", "send either prompt or messages")
    text = body.prompt
    if body.messages is not None:
        use = read_tool_use(body.tools, None, is_parallel=True)
        text = await render(service, model, body, read_messages(body.messages), use)
    assert text is not None
    adds_special = body.messages is None if body.add_special_tokens is None else body.add_special_tokens

    def work() -> bytes:
        token_ids = model.tokenizer.encode(text, add_special_tokens=adds_special)
        texts = map(model.tokenizer.backend.id_to_token, token_ids) if body.return_token_strs else None
        known = {"count": len(token_ids), "max_model_len": model.max_model_len}
        return to_json({**known, "tokens": token_ids, "token_strs": texts})

    return await service.read(work, len(text))


async def detokenize(service: Service, body: DetokenizeRequest) -> bytes:
    """The answer as JSON."""
    model = service.models.find(body.model)

    def work() -> bytes:
        if body.tokens:
            check_prompt(body.tokens, model, "tokens")
        return to_json({"prompt": model.tokenizer.decode(body.tokens)})

    return await service.read(work, 4 * len(body.tokens))
