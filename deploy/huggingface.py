"""Hugging Face's task endpoints, as `huggingface_hub.InferenceClient(model=URL)` speaks to them: the tasks with labels.

Bodies are {"inputs": ..., "parameters": {...}}; answers are what transformers' pipelines return. Several inputs in a
list get a list of answers. A text is one request at the routers, or one for each window of a long text.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Literal, TypeVar

from pydantic import Field

from actors.request import Rows
from deploy import aggregation, spans
from deploy.errors import ContextTooLong, invalid
from deploy.label_likelihood import label_log_likelihoods
from deploy.openai_requests import ListOf, RequestBody, parse
from deploy.placed_tokens import PlacedToken, place_tokens, split, window_starts
from deploy.pooling import activate, activation_of, check_ids, check_length, check_number, run_head
from deploy.served_model import ServedModel
from deploy.service import Service

Parameters = TypeVar("Parameters", bound=RequestBody)
Window = tuple[list[PlacedToken], Rows]


class HuggingFaceBody(RequestBody):
    """The frame of a request; each task reads its own inputs and parameters. `options` are the Hub's, for its queue."""

    inputs: Any = None
    parameters: dict[str, Any] | None = None
    options: dict[str, Any] | None = None


class TextClassificationParameters(RequestBody):
    top_k: int | None = Field(default=None, ge=1)
    function_to_apply: Literal["default", "sigmoid", "softmax", "none"] = "default"


class TokenClassificationParameters(RequestBody):
    """`stride`: a text too long for the model is read in windows that share so many tokens."""

    aggregation_strategy: aggregation.Strategy = "simple"
    ignore_labels: ListOf[str] = Field(default=["O"], max_length=1000)
    stride: int | None = Field(default=None, ge=0)


class QuestionAnsweringParameters(spans.SpanOptions):
    """`doc_stride` is how many context tokens two windows share."""

    doc_stride: int | None = Field(default=None, ge=0)
    max_seq_len: int = Field(default=384, ge=1)
    max_question_len: int = Field(default=64, ge=1)


class ZeroShotParameters(RequestBody):
    candidate_labels: ListOf[str] = Field(min_length=1, max_length=1000)
    hypothesis_template: str | None = Field(default=None, max_length=10_000)
    multi_label: bool = False


async def text_classification(service: Service, body: HuggingFaceBody, name: str | None) -> Any:
    """One list of {"label", "score"} for each text, the best first."""
    model = service.models.find_for(("sequence_classification",), name, "text classification")
    parameters = read_parameters(body, model, TextClassificationParameters)
    function = activation_of(model) if parameters.function_to_apply == "default" else parameters.function_to_apply
    prompts = await _read(service, [_text_or_pair(one) for one in _inputs(body)], model)
    batch = await run_head(service, model, [_ids(tokens) for tokens in prompts])
    labels = [model.id2label[i] for i in sorted(model.id2label)]
    return [_best_first(labels, activate(rows[0].tolist(), function))[: parameters.top_k] for rows in batch]


async def token_classification(service: Service, body: HuggingFaceBody, name: str | None) -> Any:
    """The entities of each text. As the Hub's API and unlike the pipeline, neighbours are grouped by default."""
    model = service.models.find_for(("token_classification",), name, "token classification")
    parameters = read_parameters(body, model, TokenClassificationParameters)
    strategy, stride = parameters.aggregation_strategy, parameters.stride
    if stride is not None and strategy == "none":
        raise invalid("stride", "it needs an aggregation_strategy other than none")
    texts = _texts(body)
    prompts = await _read(service, [(text, None) for text in texts], model, check=stride is None)
    parts = [
        [tokens] if stride is None else _parts(service, tokens, 0, _window_size(model), stride, "stride")
        for tokens in prompts
    ]
    batch = await _run_parts(service, model, parts)

    def aggregate(text: str, windows: Sequence[Window]) -> list[dict[str, Any]]:
        found = [
            aggregation.entities(text, tokens, rows, model.id2label, strategy, parameters.ignore_labels)
            for tokens, rows in windows
        ]
        if strategy == "none":
            return found[0]
        whole = found[0] if len(found) == 1 else aggregation.longest_of_overlapping([*itertools.chain(*found)])
        return [aggregation.trimmed(text, entity) for entity in whole]

    answers = await service.read(
        lambda: [aggregate(*one) for one in zip(texts, batch, strict=True)], sum(len(text) for text in texts)
    )
    return _one_or_many(body, answers)


async def question_answering(service: Service, body: HuggingFaceBody, name: str | None) -> Any:
    """The best answer, or a list of `top_k`."""
    model = service.models.find_for(("question_answering",), name, "question answering")
    parameters = read_parameters(body, model, QuestionAnsweringParameters)
    pairs = [_question(one) for one in _inputs(body)]
    prompts = await _read(service, [*pairs], model, check=False)
    batch = await _run_parts(service, model, [_question_parts(service, model, parameters, one) for one in prompts])

    def find() -> list[list[dict[str, Any]]]:
        return [spans.answers(context, windows, parameters) for (_, context), windows in zip(pairs, batch, strict=True)]

    found = await service.read(find, sum(len(context) for _, context in pairs))
    return _one_or_many(body, [one if parameters.top_k > 1 else one[0] for one in found])


async def zero_shot_classification(service: Service, body: HuggingFaceBody, name: str | None) -> Any:
    """Labels by how likely a causal model finds the hypothesis after the text; no trained head.

    `multi_label`: each label by itself, by whether the text makes its hypothesis likelier than an empty text does."""
    model = service.models.find_for(("causal_lm",), name, "zero-shot classification")
    parameters = read_parameters(body, model, ZeroShotParameters)
    labels = parameters.candidate_labels
    template = "\n" + (parameters.hypothesis_template or "This example is {}.")
    prompts = [_ids(tokens) for tokens in await _read(service, [(text, None) for text in _texts(body)], model)]
    if parameters.multi_label:  # a line break is the shortest text that every tokenizer has tokens for
        prompts.append(model.tokenizer.encode("\n"))
    rows = await label_log_likelihoods(service, model, prompts, labels, template, names=("inputs", "candidate_labels"))
    if parameters.multi_label:
        *rows, prior = rows
        scores = [activate([x - p for x, p in zip(row, prior, strict=True)], "sigmoid") for row in rows]
    else:
        scores = [activate(row, "softmax") for row in rows]
    return _one_or_many(body, [_best_first(labels, row) for row in scores])


def _question_parts(
    service: Service, model: ServedModel, parameters: QuestionAnsweringParameters, tokens: list[PlacedToken]
) -> list[list[PlacedToken]]:
    """The question with each window of the context. Raises InvalidRequest."""
    first, _ = split(tokens, 1)
    if first == len(tokens):
        raise invalid("inputs.context", "there is no text to find an answer in")
    question = [i for i, token in enumerate(tokens[:first]) if token.text_idx == 0]
    cut = set(question[parameters.max_question_len :])  # its end goes, as a tokenizer's truncation takes it
    tokens = [token for i, token in enumerate(tokens) if i not in cut]
    first, last = split(tokens, 1)
    max_seq_len = min(parameters.max_seq_len, _window_size(model))
    size = max_seq_len - (len(tokens) - (last - first))
    if last - first <= size:
        return [tokens]
    usual = min(max_seq_len // 2, 128, max(size // 2, 0))
    doc_stride = parameters.doc_stride if parameters.doc_stride is not None else usual
    return _parts(service, tokens, 1, max_seq_len, doc_stride, "doc_stride")


async def _run_parts(
    service: Service, model: ServedModel, parts: Sequence[Sequence[list[PlacedToken]]]
) -> list[list[Window]]:
    """Each text's windows with the head's outputs for their tokens. Raises InvalidRequest for too many."""
    if (num := sum(map(len, parts))) > (most := service.settings.limits.max_prompts):
        raise ContextTooLong(f"inputs: {num} windows are more than this server's {most} in one request", param="inputs")
    flat = [_ids(window) for windows in parts for window in windows]
    batch = iter(await run_head(service, model, flat, tokens="all"))
    return [[(window, next(batch)) for window in windows] for windows in parts]


def _parts(
    service: Service, tokens: list[PlacedToken], text_idx: int, size: int, overlap: int, param: str
) -> list[list[PlacedToken]]:
    """Windows over the tokens of one text, each with all that stands before and after them. Raises InvalidRequest."""
    first, last = split(tokens, text_idx)
    inner = size - (len(tokens) - (last - first))
    if overlap >= inner:
        raise invalid(
            param,
            f"{overlap} must be less than the {max(inner, 0)} tokens that {size}-token windows have for it; "
            f"lower it{' or raise max_seq_len' if text_idx else ''}",
        )
    starts = window_starts(last - first, inner, overlap)
    if len(starts) > (most := service.settings.limits.max_prompts):
        raise ContextTooLong(
            f"{param}: the text has {len(starts)} windows, more than this server's {most}", param=param
        )
    mine = tokens[first:last]
    return [tokens[:first] + mine[start : start + inner] + tokens[last:] for start in starts]


def _window_size(model: ServedModel) -> int:
    """Tokens that the model reads at once: the tokenizer's model_max_length where it is a limit of its own."""
    limit = model.tokenizer.config.get("model_max_length")
    return min(model.max_model_len, limit) if type(limit) is int and limit > 0 else model.max_model_len


async def _read(
    service: Service, texts: list[tuple[str, str | None]], model: ServedModel, *, check: bool = True
) -> list[list[PlacedToken]]:
    """Tokens of texts and pairs. Raises InvalidRequest; with `check` for a text that doesn't fit, else for one that all
    windows together can't hold."""
    check_number(service, len(texts), "inputs")
    has_stride = model.head_kind == "token_classification"
    remedy = "set parameters.stride to read it in windows" if has_stride else "shorten it"

    def read_one(text: str, pair: str | None) -> list[PlacedToken]:
        least = model.tokenizer.least_num_tokens(text + (pair or ""))
        if check:
            check_length(model, least, "inputs", remedy)
        elif least > (most := service.settings.limits.max_prompts) * model.max_model_len:
            raise ContextTooLong(
                f"inputs: the text has at least {least} tokens, more than {most} windows hold; shorten it",
                param="inputs",
            )
        tokens = place_tokens(model.tokenizer, text, pair)
        if check:
            check_ids(model, _ids(tokens), "inputs", remedy)
        return tokens

    num_chars = sum(len(text) + len(pair or "") for text, pair in texts)
    return await service.read(lambda: [read_one(*one) for one in texts], num_chars)


def _best_first(labels: Sequence[str], scores: Sequence[float]) -> list[dict[str, Any]]:
    ranked = sorted(zip(labels, scores, strict=True), key=lambda item: -item[1])
    return [{"label": label, "score": score} for label, score in ranked]


def _ids(tokens: list[PlacedToken]) -> list[int]:
    return [token.token_id for token in tokens]


def read_parameters(body: HuggingFaceBody, model: ServedModel, kind: type[Parameters]) -> Parameters:
    """The parameters that are given, where None is as if left out, over the checkpoint's own defaults."""
    defaults = model.task_parameters if model.head_kind != "causal_lm" else {}
    given = [*defaults.items(), *(body.parameters or {}).items()]
    return parse({name: value for name, value in given if value is not None}, kind)


def _inputs(body: HuggingFaceBody) -> list[Any]:
    inputs = body.inputs if isinstance(body.inputs, list) else [body.inputs]
    if not inputs:
        raise invalid("inputs", "the list is empty; send at least one")
    return inputs


def _one_or_many(body: HuggingFaceBody, answers: list[Any]) -> Any:
    """A list of answers for a list of inputs."""
    return answers if isinstance(body.inputs, list) else answers[0]


def _texts(body: HuggingFaceBody) -> list[str]:
    texts = _inputs(body)
    if not all(isinstance(text, str) for text in texts):
        raise invalid("inputs", "expected a string or a list of strings")
    return texts


def _text_or_pair(value: Any) -> tuple[str, str | None]:
    if isinstance(value, str):
        return value, None
    if isinstance(value, dict) and set(value) <= {"text", "text_pair"}:
        text, pair = value.get("text"), value.get("text_pair")
        if isinstance(text, str) and (pair is None or isinstance(pair, str)):
            return text, pair
    raise invalid("inputs", 'expected a string, {"text": ..., "text_pair": ...}, or a list of these')


def _question(value: Any) -> tuple[str, str]:
    if isinstance(value, dict):
        question, context = value.get("question"), value.get("context")
        if isinstance(question, str) and isinstance(context, str) and question.strip():
            return question, context
    raise invalid("inputs", 'expected {"question": a text, "context": a text}')
