"""/hf/text-generation: text-generation-inference's API, over the same planning and streaming as /v1/completions.

As there: greedy unless sampling is asked for; a stop sequence stays in the text; every token is an event of its own.
Special tokens have no text here, so that the tokens' texts joined are the generated text.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from actors.request import Alternatives
from deploy.endpoints import TextEndpoint
from deploy.errors import invalid
from deploy.generation import Delta, TextPlan, Token, stream_all
from deploy.generation_plan import Asked, check_prompt, plan_requests, structured_spec
from deploy.huggingface import HuggingFaceBody, read_parameters
from deploy.logprobs import LOWEST, finite, most_likely
from deploy.openai_requests import (
    INT64_MAX,
    CompletionRequest,
    ListOf,
    RequestBody,
    StreamingBody,
    StructuredOutputs,
    parse,
)
from deploy.pooling import check_length
from deploy.service import Service
from deploy.sse import event


class Grammar(RequestBody):
    type: Literal["json", "json_schema", "regex"]
    value: Any


class TextGenerationParameters(RequestBody):
    """TGI's, with its defaults."""

    adapter_id: str | None = None
    best_of: int | None = Field(default=None, ge=1)
    decoder_input_details: bool | None = None
    details: bool | None = None
    do_sample: bool | None = None
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    grammar: Grammar | None = None
    max_new_tokens: int | None = Field(default=None, ge=1, le=INT64_MAX)
    repetition_penalty: float | None = Field(default=None, gt=0)
    return_full_text: bool | None = None
    seed: int | None = Field(default=None, ge=0, le=2 * INT64_MAX + 1)
    stop: ListOf[str] | None = None
    temperature: float | None = Field(default=None, ge=0)
    top_k: int | None = Field(default=None, ge=1, le=INT64_MAX)
    top_n_tokens: int | None = Field(default=None, ge=0)
    top_p: float | None = Field(default=None, gt=0, le=1)
    truncate: int | None = Field(default=None, ge=1, le=INT64_MAX)
    typical_p: float | None = None
    watermark: bool | None = None

    @property
    def samples(self) -> bool:
        """TGI draws when it is told to, or when a parameter would have no effect otherwise."""
        shapes = (self.temperature not in (None, 1.0), self.top_k is not None, self.top_p not in (None, 1.0))
        return self.temperature != 0 and (bool(self.do_sample) or any(shapes))


class TextGenerationRequest(HuggingFaceBody, StreamingBody):
    """As the other tasks', and maybe answered by a stream."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TextGenerationPlan(TextPlan):
    parameters: TextGenerationParameters
    prompt: str


async def plan_text_generation(service: Service, body: TextGenerationRequest, _: str) -> TextGenerationPlan:
    """Tokenizes and checks everything. Raises ApiError."""
    model = service.models.find_generator(body.model)
    parameters = read_parameters(body, model, TextGenerationParameters)
    _refuse(parameters, bool(body.stream))
    if not isinstance(body.inputs, str):
        raise invalid("inputs", "expected a string")
    prompt: str = body.inputs
    if parameters.truncate is None:
        check_length(model, model.tokenizer.least_num_tokens(prompt), "inputs", "shorten it or set truncate")
    ids = await service.encode(model, prompt, add_special_tokens=True)
    ids = ids if parameters.truncate is None else ids[-parameters.truncate :]
    check_prompt(ids, model, "inputs")
    completion = _completion(parameters)
    asked = Asked(
        max_tokens=completion.max_tokens,
        max_tokens_name="max_new_tokens",
        prompt_param="inputs",
        clamps_max_tokens=parameters.max_new_tokens is None,
        logprobs=parameters.top_n_tokens or 0,
        prompt_logprobs=0 if parameters.decoder_input_details else None,
        structured=structured_spec(completion),
    )
    return TextGenerationPlan(
        parameters=parameters,
        model=model,
        prompt=prompt,
        requests=plan_requests(completion, model, [ids], asked, service.settings.limits, service.deadline()),
        body=completion,
    )


def generate_text(plan: TextGenerationPlan, deltas: list[Delta]) -> list[dict[str, Any]]:
    """The whole answer; of `best_of` sequences the one with the highest mean log-probability."""
    deltas.sort(key=lambda delta: -math.fsum(_logprob(token) for token in delta.tokens) / max(1, len(delta.tokens)))
    best, *others = [_sequence(plan, delta) for delta in deltas]
    answer: dict[str, Any] = {"generated_text": best.pop("generated_text")}
    if plan.parameters.details:
        answer["details"] = {**best, **({"best_of_sequences": others} if others else {})}
    return [answer]


async def stream_text(service: Service, plan: TextGenerationPlan) -> AsyncGenerator[bytes]:
    """One event a token; the last one has the whole text and the details."""
    text, index, waiting = "", 0, list[Token]()
    async with contextlib.aclosing(stream_all(service.pool, plan)) as deltas:
        async for delta in deltas:
            text += delta.text
            waiting += delta.tokens
            is_last = delta.finish_reason is not None
            # A stop sequence may end the text without a further token: then the last token is still to be shown.
            num_ready = len(waiting) - (1 if plan.body.stops and not is_last else 0)
            for i in range(num_ready):
                token, end = waiting[i], waiting[i + 1].text_offset if i + 1 < len(waiting) else len(text)
                index += 1
                shown: dict[str, Any] = {
                    "index": index,
                    "token": _token(plan, token.token_id, text[token.text_offset : end], _logprob(token)),
                    "generated_text": None,
                    "details": None,
                }
                if plan.parameters.top_n_tokens:
                    shown["top_tokens"] = _top_tokens(plan, token.alternatives)
                if is_last and i == num_ready - 1:
                    shown["generated_text"] = _whole(plan, text)
                    shown["details"] = {**_summary(plan, delta), "input_length": len(plan.requests[0].prompt_ids)}
                yield event(shown)
            del waiting[: max(0, num_ready)]


GENERATION: TextEndpoint[TextGenerationRequest, TextGenerationPlan] = TextEndpoint(
    body=TextGenerationRequest,
    plan=plan_text_generation,
    answer=generate_text,
    stream=stream_text,
    end_with_error=lambda error: event(error.huggingface_body()),
)


def _refuse(parameters: TextGenerationParameters, is_stream: bool) -> None:
    """Raises InvalidRequest for what isn't done here, and for what TGI itself refuses."""
    refusals = (
        ("adapter_id", parameters.adapter_id is not None, "there are no adapters; serve the merged checkpoint"),
        ("typical_p", parameters.typical_p not in (None, 1.0), "typical decoding is not supported; use top_p"),
        ("watermark", bool(parameters.watermark), "texts are not watermarked"),
        ("best_of", (parameters.best_of or 1) > 1 and not parameters.samples, "it needs sampling; set do_sample"),
        ("best_of", (parameters.best_of or 1) > 1 and is_stream, "a stream can't wait for the best; leave one out"),
        ("decoder_input_details", bool(parameters.decoder_input_details) and is_stream, "not available with stream"),
    )
    for name, is_refused, reason in refusals:
        if is_refused:
            raise invalid(name, reason, code="unsupported_parameter")


def _completion(parameters: TextGenerationParameters) -> CompletionRequest:
    """The same wishes as /v1/completions has them."""
    structured = None
    if (grammar := parameters.grammar) is not None:
        value = grammar.value
        if grammar.type == "json_schema":
            value = value.get("schema") if isinstance(value, dict) else None
        structured = parse({"regex" if grammar.type == "regex" else "json": value}, StructuredOutputs)
    return parse(
        {
            "n": parameters.best_of or 1,
            "temperature": (parameters.temperature or 1.0) if parameters.samples else 0.0,
            "top_k": parameters.top_k or 0,
            "top_p": parameters.top_p or 1.0,
            "min_p": 0.0,
            "frequency_penalty": parameters.frequency_penalty or 0.0,
            "repetition_penalty": parameters.repetition_penalty or 1.0,
            "seed": None if parameters.seed is None else parameters.seed & INT64_MAX,
            "max_tokens": parameters.max_new_tokens or 100,
            "stop": parameters.stop,
            "include_stop_str_in_output": True,
            "structured_outputs": structured,
        },
        CompletionRequest,
    )


def _sequence(plan: TextGenerationPlan, delta: Delta) -> dict[str, Any]:
    """A finished sequence with its details."""
    request, tokenizer = plan.requests[delta.index], plan.model.tokenizer
    ends = [token.text_offset for token in delta.tokens[1:]] + [len(delta.text)]
    prefill = [
        {
            "id": token_id,
            "text": tokenizer.token_text(token_id),
            "logprob": finite(alternatives[0][1]) if alternatives else None,
        }
        for token_id, alternatives in zip(request.prompt_ids, delta.prompt_logprobs or (), strict=False)
    ]
    sequence: dict[str, Any] = {
        "generated_text": _whole(plan, delta.text),
        **_summary(plan, delta),
        "prefill": prefill,
        "tokens": [
            _token(plan, token.token_id, delta.text[token.text_offset : end], _logprob(token))
            for token, end in zip(delta.tokens, ends, strict=False)
        ],
    }
    if plan.parameters.top_n_tokens:
        sequence["top_tokens"] = [_top_tokens(plan, token.alternatives) for token in delta.tokens]
    return sequence


def _summary(plan: TextGenerationPlan, delta: Delta) -> dict[str, Any]:
    reason = "length"
    if delta.finish_reason != "length":
        reason = "stop_sequence" if isinstance(delta.stop_reason, str) else "eos_token"
    seed = plan.requests[delta.index].sampling.get("seed", 0) if plan.parameters.samples else None
    return {"finish_reason": reason, "generated_tokens": delta.num_tokens, "seed": seed}


def _whole(plan: TextGenerationPlan, text: str) -> str:
    return plan.prompt + text if plan.parameters.return_full_text else text


def _token(plan: TextGenerationPlan, token_id: int, text: str, logprob: float) -> dict[str, Any]:
    is_special = token_id in plan.model.tokenizer.special_ids
    return {"id": token_id, "text": text, "logprob": finite(logprob), "special": is_special}


def _logprob(token: Token) -> float:
    return token.alternatives[0][1] if token.alternatives else LOWEST


def _top_tokens(plan: TextGenerationPlan, alternatives: Alternatives | None) -> list[dict[str, Any]]:
    """The most likely tokens, each once: the chosen one is first in the list and may be among them."""
    most = plan.parameters.top_n_tokens or 0
    ranked = most_likely(alternatives or [], most)
    return [_token(plan, one[0], plan.model.tokenizer.token_text(one[0]), one[1]) for one in ranked]
