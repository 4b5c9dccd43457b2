"""Texts through the backbone and a head, and /pooling: one row of values for each text, or for each of its tokens."""

from __future__ import annotations

import asyncio
import base64
import math
import struct
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field

from deploy.errors import ContextTooLong, InvalidRequest
from deploy.generation_plan import check_prompt
from deploy.openai_requests import INT64_MAX, RequestBody
from deploy.served_model import ServedModel
from deploy.service import Service

MAX_AT_ONCE = 64  # texts of one request that are with the routers at a time
Rows = list[list[float]]
EMBEDDING_KINDS = ("causal_lm", "base")
Activation = Literal["softmax", "sigmoid", "none"]


class PoolingBody(RequestBody):
    """What all endpoints have that run texts through a head."""

    model: str | None = None
    add_special_tokens: bool = True
    truncate_prompt_tokens: int | None = Field(default=None, ge=-1, le=INT64_MAX)  # the last ones; -1: what fits
    priority: int = Field(default=0, ge=-INT64_MAX - 1, le=INT64_MAX)
    cache_salt: str | None = Field(default=None, min_length=1, max_length=1024)
    request_id: str | None = Field(default=None, min_length=1, max_length=128, pattern=r"^[!-~]+$")


class PoolingRequest(PoolingBody):
    """vLLM's /pooling. `task` is by default what the model is for."""

    input: Any = None
    task: Literal["embed", "classify", "token_classify", "token_embed"] | None = None
    encoding_format: Literal["float", "base64"] = "float"
    use_activation: bool | None = None  # false: raw values, neither probabilities nor normalized
    dimensions: int | None = None


_KINDS = {
    "embed": EMBEDDING_KINDS,
    "token_embed": EMBEDDING_KINDS,
    "classify": ("sequence_classification",),
    "token_classify": ("token_classification",),
}
_DEFAULT_TASKS = {
    "causal_lm": "embed",
    "base": "embed",
    "sequence_classification": "classify",
    "token_classification": "token_classify",
}


async def pool(service: Service, body: PoolingRequest, answer_id: str) -> dict[str, Any]:
    refuse_dimensions(body.dimensions)
    if body.task is None:
        model = service.models.find_for(tuple(_DEFAULT_TASKS), body.model, "pooling")
    else:
        model = service.models.find_for(_KINDS[body.task], body.model, f"the pooling task {body.task}")
    task = body.task or _DEFAULT_TASKS[model.head_kind]
    prompts = await read_inputs(service, model, body, body.input, "input")
    batch = await run_head(
        service,
        model,
        prompts,
        body,
        head=model.names[0] if task.endswith("classify") else "",
        tokens="all" if task.startswith("token_") else "last",
    )
    if body.use_activation is not False:
        if task.endswith("embed"):
            batch = [[normalized(row) for row in rows] for rows in batch]
        else:
            function = "softmax" if task == "token_classify" else activation_of(model)
            batch = [[activate(row, function) for row in rows] for rows in batch]
    data = [
        {
            "index": index,
            "object": "pooling",
            "data": [encode_values(row, body.encoding_format) for row in rows]
            if task.startswith("token_")
            else encode_values(rows[0], body.encoding_format),
        }
        for index, rows in enumerate(batch)
    ]
    return list_answer(service, answer_id, body.model or model.names[0], data, prompts)


def list_answer(
    service: Service, answer_id: str, model: str, data: list[dict[str, Any]], prompts: Sequence[Sequence[int]]
) -> dict[str, Any]:
    """The frame that vLLM puts around every kind of pooling result."""
    num_tokens = sum(len(ids) for ids in prompts)
    return {
        "id": answer_id,
        "object": "list",
        "created": int(service.now()),
        "model": model,
        "data": data,
        "usage": {
            "prompt_tokens": num_tokens,
            "total_tokens": num_tokens,
            "completion_tokens": 0,
            "prompt_tokens_details": None,
        },
    }


def refuse_dimensions(dimensions: int | None) -> None:
    if dimensions is not None:
        raise InvalidRequest(
            "dimensions: not supported: these models are not trained for shorter embeddings; leave it out",
            param="dimensions",
            code="unsupported_parameter",
        )


async def read_inputs(
    service: Service, model: ServedModel, body: PoolingBody, value: Any, param: str
) -> list[list[int]]:
    """Token ids of a text, several texts, a list of token ids, or several such lists. Raises InvalidRequest."""
    sent = one_or_many(value, param)
    if len(sent) > service.settings.limits.max_prompts:
        raise InvalidRequest(
            f"{param}: {len(sent)} texts are more than this server's {service.settings.limits.max_prompts} per request",
            param=param,
        )

    def read() -> list[list[int]]:
        return [_read_one(model, body, one, param) for one in sent]

    return await service.run(read, sum(len(one) for one in sent))


def one_or_many(value: Any, param: str) -> Sequence[str | list[int]]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if all(isinstance(one, str) for one in value):
            return value
        if all(type(one) is int for one in value):
            return [value]
        if all(isinstance(one, list) and all(type(token) is int for token in one) for one in value):
            return value
    if value is None:
        raise InvalidRequest(f"{param}: this field is required", param=param, code="missing_required_parameter")
    raise InvalidRequest(
        f"{param}: expected a string, a list of strings, a list of token ids, or a list of lists of token ids",
        param=param,
    )


def _read_one(model: ServedModel, body: PoolingBody, text: str | list[int], param: str) -> list[int]:
    if isinstance(text, str):
        if body.truncate_prompt_tokens is None and model.tokenizer.least_num_tokens(text) > model.max_model_len:
            raise too_long(model, param)
        ids = encode(model, text, body.add_special_tokens, param)
    else:
        ids = text
    ids = truncated(model, body, ids)
    check_ids(model, ids, param)
    return ids


def truncated(model: ServedModel, body: PoolingBody, ids: list[int]) -> list[int]:
    """The last tokens that `truncate_prompt_tokens` leaves."""
    keep = body.truncate_prompt_tokens
    if keep == 0:
        raise InvalidRequest(
            "truncate_prompt_tokens: 0 leaves no text; use 1 or more, or -1", param="truncate_prompt_tokens"
        )
    return ids if keep is None else ids[-(model.max_model_len if keep == -1 else keep) :]


def encode(model: ServedModel, text: str, add_special_tokens: bool, param: str) -> list[int]:
    try:
        return model.tokenizer.encode(text, add_special_tokens=add_special_tokens)
    except ValueError as error:
        raise InvalidRequest(f"{param}: {error}", param=param) from None


def check_ids(model: ServedModel, ids: Sequence[int], param: str) -> None:
    """Raises InvalidRequest for no tokens, unknown tokens or too many."""
    check_prompt(ids, model, param)
    if len(ids) > model.max_model_len:
        raise too_long(model, param)


def too_long(model: ServedModel, param: str) -> ContextTooLong:
    return ContextTooLong(
        f"This model's maximum context length is {model.max_model_len} tokens, and the text has more. "
        "Shorten it, or set truncate_prompt_tokens.",
        param=param,
    )


async def run_head(
    service: Service,
    model: ServedModel,
    prompts: Sequence[list[int]],
    body: PoolingBody | None = None,
    *,
    head: str,
    tokens: Literal["last", "all"],
) -> list[Rows]:
    """The head's rows for each prompt; `head` "" gives hidden states. Each prompt is a request of its own, so
    a text's values don't depend on its neighbours. The first error ends them all."""
    deadline = service.deadline()
    places = asyncio.Semaphore(MAX_AT_ONCE)

    async def run_one(prompt_ids: list[int]) -> Rows:
        async with places:
            return await service.pool.pool(
                model=model.names[0],
                head=head,
                tokens=tokens,
                prompt_ids=prompt_ids,
                deadline=deadline,
                priority=body.priority if body is not None else 0,
                cache_salt=body.cache_salt if body is not None else None,
            )

    return await all_of([run_one(prompt_ids) for prompt_ids in prompts])


async def all_of(work: Sequence[Any]) -> list[Any]:
    """Results of coroutines that run side by side. The first error cancels the others and is raised as it is."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def activation_of(model: ServedModel) -> Activation:
    """What turns a classifier's outputs into scores, as transformers' pipeline decides it."""
    if model.problem_type == "regression":
        return "none"
    if model.problem_type == "multi_label_classification" or len(model.id2label) == 1:
        return "sigmoid"
    return "softmax"


def activate(row: Sequence[float], function: str) -> list[float]:
    """float64 scores of one row of outputs; `function` is an Activation."""
    if function == "none":
        return list(row)
    if function == "sigmoid":
        return [1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x)) for x in row]
    largest = max(row)
    powers = [math.exp(x - largest) for x in row]
    total = math.fsum(powers)
    return [power / total for power in powers]


def normalized(row: Sequence[float]) -> list[float]:
    """The row at length 1."""
    length = math.sqrt(math.fsum(x * x for x in row)) or 1.0
    return [x / length for x in row]


def encode_values(row: Sequence[float], encoding_format: str) -> list[float] | str:
    """Numbers as JSON has them, or little-endian float32 in base64."""
    if encoding_format == "float":
        return list(row)
    return base64.b64encode(struct.pack(f"<{len(row)}f", *row)).decode()
