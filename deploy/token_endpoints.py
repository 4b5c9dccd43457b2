"""Routes for looking at tokens, as vLLM has them: /tokenize, /detokenize, /tokenizer_info."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from deploy.chat_messages import read_messages, render
from deploy.endpoints import Endpoints
from deploy.errors import invalid
from deploy.openai_requests import DetokenizeRequest, TokenizeRequest
from deploy.service import Service
from deploy.sse import JsonAnswer
from deploy.tools import read_tool_use


def add_to(endpoints: Endpoints) -> None:
    service = endpoints.service

    async def tokenize(_: Request, body: TokenizeRequest) -> Response:
        return JsonAnswer(await _tokenize(service, body))

    async def detokenize(_: Request, body: DetokenizeRequest) -> Response:
        model = service.models.find(body.model)
        for token_id in body.tokens:
            if not 0 <= token_id < model.vocab_size:
                raise invalid("tokens", f"{token_id} is not in the vocabulary of {model.vocab_size}")
        text = await service.run(lambda: model.tokenizer.decode(body.tokens), 4 * len(body.tokens))
        return JsonAnswer({"prompt": text})

    endpoints.add("/tokenize", TokenizeRequest, tokenize)
    endpoints.add("/detokenize", DetokenizeRequest, detokenize)

    @endpoints.api.get("/tokenizer_info")
    async def tokenizer_info() -> Response:
        tokenizer = service.models.models[0].tokenizer
        info = dict(tokenizer.config)
        if tokenizer.chat_template is not None:
            info["chat_template"] = tokenizer.chat_template.sources.get("default")
        return JsonAnswer({"tokenizer_class": "PreTrainedTokenizerFast", **info})


async def _tokenize(service: Service, body: TokenizeRequest) -> dict[str, Any]:
    model = service.models.find(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise invalid("prompt", "send either prompt or messages")
    text = body.prompt
    if body.messages is not None:
        use = read_tool_use(body.tools, None, is_parallel=True)
        text = await render(service, model, body, read_messages(body.messages), use)
    assert text is not None
    adds_special = body.messages is None if body.add_special_tokens is None else body.add_special_tokens
    token_ids = await service.encode(model, text, add_special_tokens=adds_special)
    return {
        "count": len(token_ids),
        "max_model_len": model.max_model_len,
        "tokens": token_ids,
        "token_strs": [model.tokenizer.backend.id_to_token(one) for one in token_ids]
        if body.return_token_strs
        else None,
    }
