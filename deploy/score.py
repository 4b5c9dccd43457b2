"""/score: how well texts go together. A classifier with one label judges each pair; other models compare embeddings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from deploy.errors import InvalidRequest, invalid
from deploy.placed_tokens import PlacedToken, place_tokens, split
from deploy.pooling import (
    EMBEDDING_KINDS,
    PoolingBody,
    activate,
    activation_of,
    check_ids,
    check_length,
    check_number,
    list_answer,
    normalized,
    num_kept,
    one_or_many,
    read_inputs,
    run_head,
)
from deploy.served_model import ServedModel
from deploy.service import Service


class ScoreRequest(PoolingBody):
    """vLLM's body: one text against one or many, or as many against as many.

    `truncate_prompt_tokens` shortens the second text of a pair that a classifier reads, from its end."""

    text_1: Any = None
    text_2: Any = None
    use_activation: bool | None = None  # false: the classifier's raw outputs


async def score(service: Service, body: ScoreRequest, answer_id: str) -> dict[str, Any]:
    model = _find(service, body.model)
    first, second = (_texts(getattr(body, name), name) for name in ("text_1", "text_2"))
    if len(first) not in (1, len(second)):
        raise invalid(
            "text_1", f"{len(first)} texts can't be paired with {len(second)} in text_2; send one, or as many"
        )
    check_number(service, len(second), "text_2")
    if model.head_kind in EMBEDDING_KINDS:
        prompts = await read_inputs(service, model, body, first, "text_1")
        prompts += await read_inputs(service, model, body, second, "text_2")
        vectors = [normalized(rows[0].tolist()) for rows in await run_head(service, model, prompts, body, head="")]
        ones, others = vectors[: len(first)], vectors[len(first) :]
        ones = ones * len(others) if len(ones) == 1 else ones
        scores = [math.fsum(a * b for a, b in zip(*pair, strict=True)) for pair in zip(ones, others, strict=True)]
    else:
        firsts = first * len(second) if len(first) == 1 else first
        prompts = await _read_pairs(service, model, body, list(zip(firsts, second, strict=True)))
        function = "none" if body.use_activation is False else activation_of(model)
        batch = await run_head(service, model, prompts, body)
        scores = [activate(rows[0].tolist(), function)[0] for rows in batch]
    data = [{"index": index, "object": "score", "score": value} for index, value in enumerate(scores)]
    return list_answer(answer_id, body, model, data, prompts)


def _find(service: Service, name: str | None) -> ServedModel:
    model = service.models.find_for((*EMBEDDING_KINDS, "sequence_classification"), name, "scores")
    if model.head_kind == "sequence_classification" and len(model.id2label) != 1:
        if not name:
            return service.models.find_for(EMBEDDING_KINDS, None, "scores")
        raise InvalidRequest(
            f"{name!r} has {len(model.id2label)} labels, and a score needs one; "
            f"it is served at POST {', '.join(model.endpoints)}",
            param="model",
            code="wrong_task",
        )
    return model


def _texts(value: Any, param: str) -> list[str]:
    texts = one_or_many(value, param)
    if not all(isinstance(text, str) for text in texts):
        raise invalid(param, "expected a string or a list of strings")
    return [str(text) for text in texts]


def _shortened(tokens: list[PlacedToken], keep: int) -> list[PlacedToken]:
    """The pair without the end of its second text. A classifier needs the first one, and what the tokenizer added."""
    begin, end = split(tokens, 1)
    num_left = end - begin - (len(tokens) - keep)
    if num_left < 1:
        raise invalid(
            "truncate_prompt_tokens",
            f"{keep} tokens leave nothing of text_2 beside text_1; shorten text_1, or raise it if the model takes more",
        )
    return tokens[: begin + num_left] + tokens[end:]


async def _read_pairs(
    service: Service, model: ServedModel, body: ScoreRequest, pairs: Sequence[tuple[str, str]]
) -> list[list[int]]:
    keep = num_kept(model, body)

    def read_one(first: str, second: str) -> list[int]:
        if keep is None:
            check_length(model, model.tokenizer.least_num_tokens(first + second), "text_1")
        tokens = place_tokens(model.tokenizer, first, second, add_special_tokens=body.add_special_tokens)
        if keep is not None and len(tokens) > keep:
            tokens = _shortened(tokens, keep)
        ids = [token.token_id for token in tokens]
        check_ids(model, ids, "text_1")
        return ids

    num_chars = sum(len(first) + len(second) for first, second in pairs)
    if num_chars > (most := service.settings.limits.max_body_bytes):
        raise invalid("text_2", f"the {len(pairs)} pairs have {num_chars} characters, more than this server's {most}")
    return await service.read(lambda: [read_one(*pair) for pair in pairs], num_chars)
