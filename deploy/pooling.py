"""Texts through the backbone and a head: /pooling, /v1/embeddings, and what other endpoints share with them."""

from __future__ import annotations

import asyncio
import base64
import math
import struct
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from pydantic_core import to_json

from actors.request import Rows
from deploy.aggregation import softmax
from deploy.errors import ContextTooLong, invalid
from deploy.generation_plan import check_prompt
from deploy.openai_requests import INT64_MAX, RequestBody
from deploy.router_pool import PoolRequest
from deploy.served_model import ServedModel
from deploy.service import Service

MAX_AT_ONCE = 64  # texts of one request that are with the routers at a time
T = TypeVar("T")
R = TypeVar("R")
EMBEDDING_KINDS = ("causal_lm", "base")
Activation = Literal["softmax", "sigmoid", "none"]
_REMEDY = "shorten it, or set truncate_prompt_tokens"


class PoolingBody(RequestBody):
    """What all endpoints have that run texts through a head."""

    model: str | None = None
    add_special_tokens: bool = True
    truncate_prompt_tokens: int | None = Field(default=None, ge=-1, le=INT64_MAX)  # the last ones; -1: what fits
    priority: int = Field(default=0, ge=-INT64_MAX - 1, le=INT64_MAX)
    cache_salt: str | None = Field(default=None, min_length=1, max_length=1024)
    request_id: str | None = Field(default=None, min_length=1, max_length=128, pattern=r"^[!-~]+$")


class EmbeddingRequest(PoolingBody):
    """OpenAI's body, with vLLM's extensions."""

    input: Any = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None
    use_activation: bool | None = None  # false: raw values, neither probabilities nor normalized


class PoolingRequest(EmbeddingRequest):
    """vLLM's /pooling. `task` is by default what the model is for."""

    task: Literal["embed", "classify", "token_classify", "token_embed"] | None = None


_KINDS = {  # of a model with several, the first is the default
    "embed": EMBEDDING_KINDS,
    "token_embed": EMBEDDING_KINDS,
    "classify": ("sequence_classification",),
    "token_classify": ("token_classification",),
}


async def embed(service: Service, body: EmbeddingRequest, answer_id: str) -> bytes:
    """The last token's hidden state, L2-normalized, as vLLM does it for causal models; as JSON."""
    model = service.models.find_for(EMBEDDING_KINDS, body.model, "embeddings")
    return await _pool(service, body, model, "embed", answer_id, ("embedding", "embedding"))


async def pool(service: Service, body: PoolingRequest, answer_id: str) -> bytes:
    """One row of values for each text, or for each of its tokens; as JSON."""
    if body.task is None:
        model = service.models.find_for([kind for kinds in _KINDS.values() for kind in kinds], body.model, "pooling")
    else:
        model = service.models.find_for(_KINDS[body.task], body.model, f"the pooling task {body.task}")
    task: str = body.task or next(name for name, kinds in _KINDS.items() if model.head_kind in kinds)
    return await _pool(service, body, model, task, answer_id, ("pooling", "data"))


async def _pool(
    service: Service, body: EmbeddingRequest, model: ServedModel, task: str, answer_id: str, names: tuple[str, str]
) -> bytes:
    """The answer, with the rows as the body wants to see them. names: an entry's `object`, and what its rows are in.

    There may be millions of values, so they are numbers only one row at a time, and in a thread."""
    if body.dimensions is not None:
        raise invalid(
            "dimensions",
            "not supported: these models are not trained for shorter embeddings; leave it out",
            code="unsupported_parameter",
        )
    prompts = await read_inputs(service, model, body, body.input, "input")
    head = model.names[0] if task.endswith("classify") else ""
    tokens: Literal["last", "all"] = "all" if task.startswith("token_") else "last"
    batch = await run_head(service, model, prompts, body, head=head, tokens=tokens)
    function = "softmax" if task == "token_classify" else activation_of(model)

    def show(row: NDArray[np.float32]) -> list[float] | str:
        values: list[float] = row.tolist()
        if body.use_activation is not False:
            values = activate(values, function) if head else normalized(values)
        if body.encoding_format == "float":
            return values
        return base64.b64encode(struct.pack(f"<{len(values)}f", *values)).decode()

    def render() -> bytes:
        data = (
            {"index": index, "object": names[0], names[1]: map(show, rows) if tokens == "all" else show(rows[0])}
            for index, rows in enumerate(batch)
        )
        return to_json(list_answer(answer_id, body, model, data, prompts))

    return await service.write(render, sum(len(rows) * len(rows[0]) for rows in batch))


def list_answer(
    answer_id: str,
    body: PoolingBody,
    model: ServedModel,
    data: Iterable[dict[str, Any]],
    prompts: Sequence[Sequence[int]],
) -> dict[str, Any]:
    """The frame that vLLM puts around every kind of pooling result."""
    num_tokens = sum(len(ids) for ids in prompts)
    usage = {"prompt_tokens": num_tokens, "total_tokens": num_tokens, "completion_tokens": 0}
    return {
        "id": answer_id,
        "object": "list",
        "created": int(time.time()),
        "model": body.model or model.names[0],
        "data": data,
        "usage": {**usage, "prompt_tokens_details": None},
    }


async def read_inputs(
    service: Service, model: ServedModel, body: PoolingBody, value: Any, param: str
) -> list[list[int]]:
    """Token ids of a text, several texts, a list of token ids, or several such lists. Raises InvalidRequest."""
    sent = one_or_many(value, param)
    check_number(service, len(sent), param)

    def read_one(text: str | list[int]) -> list[int]:
        if isinstance(text, str):
            if body.truncate_prompt_tokens is None:
                check_length(model, model.tokenizer.least_num_tokens(text), param)
            text = model.tokenizer.encode(text, add_special_tokens=body.add_special_tokens)
        ids = truncated(model, body, text)
        check_ids(model, ids, param)
        return ids

    return await service.read(lambda: [read_one(one) for one in sent], sum(len(one) for one in sent))


def check_number(service: Service, num_texts: int, param: str) -> None:
    if num_texts > (most := service.settings.limits.max_prompts):
        raise invalid(param, f"{num_texts} texts are more than this server's {most} per request")


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
        raise invalid(param, "this field is required", code="missing_required_parameter")
    raise invalid(param, "expected a string, a list of strings, a list of token ids, or a list of lists of token ids")


def truncated(model: ServedModel, body: PoolingBody, ids: list[int]) -> list[int]:
    """The last tokens that `truncate_prompt_tokens` leaves."""
    return ids if (keep := num_kept(model, body)) is None else ids[-keep:]


def num_kept(model: ServedModel, body: PoolingBody) -> int | None:
    """How many tokens of a prompt `truncate_prompt_tokens` leaves; None: all."""
    keep = body.truncate_prompt_tokens
    if keep == 0:
        raise invalid("truncate_prompt_tokens", "0 leaves no text; use 1 or more, or -1")
    return model.max_model_len if keep == -1 else keep


def check_ids(model: ServedModel, ids: Sequence[int], param: str, remedy: str = _REMEDY) -> None:
    """Raises InvalidRequest for no tokens, unknown tokens or too many."""
    check_prompt(ids, model, param)
    check_length(model, len(ids), param, remedy)


def check_length(model: ServedModel, num_tokens: int, param: str, remedy: str = _REMEDY) -> None:
    if num_tokens > model.max_model_len:
        raise ContextTooLong(
            f"{param}: the text has more than the {model.max_model_len} tokens of this model's context; {remedy}",
            param=param,
        )


async def run_head(
    service: Service,
    model: ServedModel,
    prompts: Sequence[list[int]],
    body: PoolingBody | None = None,
    *,
    head: str | None = None,
    tokens: Literal["last", "all"] = "last",
) -> list[Rows]:
    """The rows of the model's head for each prompt; `head` "" gives hidden states. Each prompt is a request of its own,
    so a text's values don't depend on its neighbours. The first error ends them all."""
    deadline, body = service.deadline(), body or PoolingBody()

    async def run_one(numbered: tuple[int, list[int]]) -> Rows:
        number, prompt_ids = numbered
        return await service.pool.pool(
            PoolRequest(
                model=model.names[0],
                head=model.names[0] if head is None else head,
                tokens=tokens,
                prompt_ids=prompt_ids,
                deadline=deadline,
                priority=body.priority,
                cache_salt=body.cache_salt,
                is_further=number > 0,
            )
        )

    return await side_by_side(run_one, enumerate(prompts))


async def side_by_side(work: Callable[[T], Awaitable[R]], items: Iterable[T]) -> list[R]:
    """The work's result for each, MAX_AT_ONCE at a time. The first error cancels the others and is raised as it is."""
    places = asyncio.Semaphore(MAX_AT_ONCE)

    async def run(item: T) -> R:
        async with places:
            return await work(item)

    tasks = [asyncio.create_task(run(item)) for item in items]
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
    scores: list[float] = softmax(np.asarray(row, dtype=np.float64), axis=0).tolist()
    return scores


def normalized(row: Sequence[float]) -> list[float]:
    """The row at length 1."""
    length = math.sqrt(math.fsum(x * x for x in row)) or 1.0
    return [x / length for x in row]
