"""From a request body to what the routers get: sampling parameters, limits, constraints, one request per sequence."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from deploy.errors import ContextTooLong, InvalidRequest, invalid
from deploy.openai_requests import INT64_MAX, ChatCompletionRequest, CompletionRequest, GenerationBody
from deploy.router_pool import GenerateRequest
from deploy.served_model import ServedModel
from deploy.settings import LimitSettings
from model.sampling_params import SamplingParams, StructuredSpec

MAX_BAD_WORD_CHARS = 20_000
MAX_TOKEN_RULES = 1_000_000  # of one request: a router is sent those of each sequence
_TOKEN_RULES = ("stop_token_ids", "allowed_token_ids", "logit_bias")


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What the two endpoints name differently. `max_tokens` of None means as many as fit."""

    max_tokens: int | None
    max_tokens_name: str = "max_tokens"
    prompt_param: str = "prompt"
    clamps_max_tokens: bool = False  # the number is our default, not the client's: shorten it to what fits
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    structured: StructuredSpec | None = None


def plan_requests(
    body: GenerationBody,
    model: ServedModel,
    prompts: Sequence[list[int]],
    asked: Asked,
    limits: LimitSettings,
    deadline: float,
) -> list[GenerateRequest]:
    """n requests per prompt, prompt after prompt; the i-th of a prompt draws with seed + i.

    Without a seed each prompt gets one of its own: the same prompt twice is to have two answers.
    Raises InvalidRequest for every value that can't be obeyed."""
    n = body.n or 1
    if body.stream_options is not None and not body.stream:
        raise invalid("stream_options", "only with stream; set stream to true")
    if body.stream and body.prompt_logprobs is not None:
        raise invalid("prompt_logprobs", "not available with stream; set stream to false")
    if n > limits.max_n:
        raise invalid("n", f"{n} is more than this server's {limits.max_n} choices per prompt")
    if n * len(prompts) > limits.max_prompts:
        raise invalid(
            "prompt", f"{len(prompts)} prompts with n={n} are more than this server's {limits.max_prompts} per request"
        )
    if len(body.stops) > limits.max_stop_strings:
        raise invalid("stop", f"at most {limits.max_stop_strings} strings, got {len(body.stops)}")
    _check_token_rules(body, n * len(prompts))
    for name, value in (("logprobs", asked.logprobs), ("prompt_logprobs", asked.prompt_logprobs)):
        if value is not None and value > limits.max_logprobs:
            raise invalid(name, f"at most {limits.max_logprobs} per token, got {value}")
    given = model.sampling_defaults.get("seed") if body.seed is None else body.seed
    params = _sampling(body, model, asked)
    common = params.to_dict()  # checked once: a logit_bias may be long, and prompts many
    requests: list[GenerateRequest] = []
    for prompt_ids in prompts:
        max_tokens = _max_tokens(asked, model, len(prompt_ids))
        if params.min_tokens > max_tokens:
            text = f"min_tokens must be less than or equal to max_tokens={max_tokens}, got {params.min_tokens}."
            raise InvalidRequest(text, param="min_tokens")
        seed = random.getrandbits(63) if given is None else given
        first_id = None
        for i in range(n):
            request = GenerateRequest(
                model=model.names[0],
                prompt_ids=prompt_ids,
                sampling={**common, "max_tokens": max_tokens, "seed": (seed + i) & INT64_MAX},
                deadline=deadline,
                priority=body.priority,
                cache_salt=body.cache_salt,
                return_routed_experts=body.return_routed_experts,
                first_id=first_id,
                is_further=bool(requests),
            )
            first_id = first_id or request.request_id
            requests.append(request)
    return requests


def read_prompt(
    prompt: str | list[int],
    body: CompletionRequest | ChatCompletionRequest,
    model: ServedModel,
    max_tokens: int | None,
    param: str,
) -> list[int]:
    """Token ids of a text, or ids as they were sent, cut and checked. Raises InvalidRequest."""
    if isinstance(prompt, str):
        _check_length(prompt, body, model, param)
        prompt = model.tokenizer.encode(prompt, add_special_tokens=body.add_special_tokens)
    prompt_ids = _truncated(body, model, prompt, max_tokens)
    check_prompt(prompt_ids, model, param)
    return prompt_ids


def _truncated(body: GenerationBody, model: ServedModel, prompt_ids: list[int], max_tokens: int | None) -> list[int]:
    """The last (or first) `truncate_prompt_tokens` of the prompt; -1 leaves room for the output."""
    keep = body.truncate_prompt_tokens
    if keep is None:
        return prompt_ids
    if keep == 0:
        raise invalid("truncate_prompt_tokens", "0 leaves no prompt; use 1 or more, or -1")
    if keep == -1:
        keep = max(1, model.max_model_len - max(1, max_tokens or 1))
    return prompt_ids[:keep] if body.truncation_side == "right" else prompt_ids[-keep:]


def _check_length(text: str, body: GenerationBody, model: ServedModel, param: str) -> None:
    """Refuses a text that is too long whatever its tokens are, before seconds go into finding them."""
    least = model.tokenizer.least_num_tokens(text)
    if least > model.max_model_len and body.truncate_prompt_tokens is None:
        raise ContextTooLong(
            f"This model's maximum context length is {model.max_model_len} tokens, and the prompt has at least {least} "
            "tokens. Shorten the prompt.",
            param=param,
        )


def check_prompt(prompt_ids: Sequence[int], model: ServedModel, param: str) -> None:
    """Raises InvalidRequest for an empty prompt or an id that the model hasn't got."""
    if not prompt_ids:
        raise invalid(param, "the prompt has no tokens; send at least one")
    if not 0 <= min(prompt_ids) <= max(prompt_ids) < model.vocab_size:
        wrong = next(one for one in prompt_ids if not 0 <= one < model.vocab_size)
        raise invalid(param, f"token id {wrong} is not in the vocabulary of {model.vocab_size}")


def structured_spec(body: GenerationBody) -> StructuredSpec | None:
    """The constraint that `response_format` or `structured_outputs` asks for."""
    found = []
    if body.structured_outputs is not None:
        options = body.structured_outputs
        if options.json_ is not None:
            found.append(_schema_spec(options.json_, "structured_outputs.json"))
        if options.json_object:
            found.append(StructuredSpec("json_object"))
        if options.regex is not None:
            found.append(_spec("regex", options.regex))
        if options.choice is not None:
            found.append(_spec("choice", json.dumps(options.choice, ensure_ascii=False)))
        if options.grammar is not None:
            found.append(_spec("grammar", options.grammar))
        if len(found) != 1:
            raise invalid("structured_outputs", "give exactly one of json, json_object, regex, choice and grammar")
    kind = (body.response_format or {"type": "text"}).get("type")
    if kind not in ("text", "json_object", "json_schema"):
        raise invalid(
            "response_format.type", f"{str(kind)[:80]!r} is not supported; use text, json_object or json_schema"
        )
    if kind == "json_object":
        asked = body.response_format or {}
        name = "schema" if asked.get("value") is None else "value"  # as Hugging Face's client sends it
        schema = asked.get(name)
        anything = StructuredSpec("json_object")
        found.append(anything if schema is None else _schema_spec(schema, f"response_format.{name}"))
    elif kind == "json_schema":
        given = (body.response_format or {}).get("json_schema")
        if not isinstance(given, dict) or not isinstance(given.get("name"), str):
            raise invalid("response_format.json_schema", "an object with name and schema is required")
        schema = given.get("schema")
        found.append(_schema_spec({} if schema is None else schema, "response_format.json_schema.schema"))
    if len(found) > 1:
        raise InvalidRequest(
            "response_format and structured_outputs exclude each other; send one", param="response_format"
        )
    return found[0] if found else None


def _schema_spec(schema: Any, param: str) -> StructuredSpec:
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError):
            raise invalid(param, "the schema is not JSON") from None
    if not isinstance(schema, dict | bool):
        raise invalid(param, f"a JSON schema is an object, not {type(schema).__name__}")
    try:
        return StructuredSpec("json_schema", json.dumps(schema, ensure_ascii=False, allow_nan=False))
    except ValueError:
        raise invalid(param, "the schema has a number that JSON can't carry") from None


def _spec(kind: Any, payload: str) -> StructuredSpec:
    try:
        return StructuredSpec(kind, payload)
    except ValueError as error:
        raise invalid(f"structured_outputs.{kind}", str(error)) from None


def _sampling(body: GenerationBody, model: ServedModel, asked: Asked) -> SamplingParams:
    defaults = model.sampling_defaults

    def value(name: str, neutral: Any) -> Any:
        given = getattr(body, name)
        return given if given is not None else defaults.get(name, neutral)

    try:
        logit_bias = {int(token): bias for token, bias in (body.logit_bias or {}).items()}
    except ValueError:
        raise invalid("logit_bias", "the keys must be token ids") from None
    top_k = value("top_k", None)
    try:
        params = SamplingParams(
            temperature=value("temperature", 1.0),
            top_k=top_k if top_k is not None and top_k > 0 else None,
            top_p=value("top_p", 1.0),
            min_p=value("min_p", 0.0),
            repetition_penalty=value("repetition_penalty", 1.0),
            frequency_penalty=body.frequency_penalty or 0.0,
            presence_penalty=body.presence_penalty or 0.0,
            logit_bias=logit_bias,
            bad_words_ids=_bad_words(body, model),
            allowed_token_ids=tuple(body.allowed_token_ids) if body.allowed_token_ids is not None else None,
            min_tokens=body.min_tokens or 0,
            stop_token_ids=tuple(body.stop_token_ids or ()),
            ignore_eos=body.ignore_eos,
            logprobs=asked.logprobs,
            prompt_logprobs=asked.prompt_logprobs,
            structured=asked.structured,
        )
        params.check_vocabulary(model.vocab_size)
    except ValueError as error:
        raise _refusal(error) from None
    return params


def _check_token_rules(body: GenerationBody, num_sequences: int) -> None:
    counts = {name: len(getattr(body, name) or ()) for name in _TOKEN_RULES}
    if (num := sum(counts.values())) * num_sequences > MAX_TOKEN_RULES:
        raise InvalidRequest(
            f"stop_token_ids, allowed_token_ids and logit_bias: {num} tokens for each of {num_sequences} sequences are "
            f"more than {MAX_TOKEN_RULES} in all; send fewer of them, prompts or choices",
            param=max(_TOKEN_RULES, key=lambda name: counts[name]),
        )


def _bad_words(body: GenerationBody, model: ServedModel) -> tuple[tuple[int, ...], ...]:
    """Each word as it begins a text and as it follows a space, as vLLM does."""
    if (num_chars := sum(len(word) for word in body.bad_words or ())) > MAX_BAD_WORD_CHARS:
        raise invalid("bad_words", f"{num_chars} characters are more than {MAX_BAD_WORD_CHARS}")
    words: list[tuple[int, ...]] = []
    for word in body.bad_words or ():
        for text in (word, " " + word.lstrip()):
            ids = tuple(model.tokenizer.encode(text, add_special_tokens=False))
            if ids and ids not in words:
                words.append(ids)
    return tuple(words)


def _max_tokens(asked: Asked, model: ServedModel, prompt_len: int) -> int:
    room = model.max_model_len - prompt_len
    if room < 1:
        raise ContextTooLong(
            f"This model's maximum context length is {model.max_model_len} tokens, and the prompt has {prompt_len} "
            "tokens already, which leaves no room for an answer. Shorten the prompt.",
            param=asked.prompt_param,
        )
    if asked.max_tokens is None:
        return min(room, int(model.sampling_defaults.get("max_new_tokens", room)))
    if asked.clamps_max_tokens:
        return min(room, asked.max_tokens)
    if asked.max_tokens > room:
        raise ContextTooLong(
            f"This model's maximum context length is {model.max_model_len} tokens, but {prompt_len + asked.max_tokens} "
            f"were asked for: {prompt_len} in the prompt and {asked.max_tokens} for the answer. Shorten the prompt or "
            f"lower {asked.max_tokens_name}.",
            param=asked.max_tokens_name,
        )
    return max(1, asked.max_tokens)  # 0 asks for the prompt alone: one token is drawn and not shown


def _refusal(error: ValueError) -> InvalidRequest:
    """SamplingParams begins its messages with the name."""
    message = str(error)
    name = message.split(" ", 1)[0].split("[")[0].split(".")[0]
    return InvalidRequest(
        message, param={"bad_words_ids": "bad_words", "structured": "structured_outputs"}.get(name, name)
    )
