"""Bodies of OpenAI's completion endpoints, with vLLM's extensions.

Every field of OpenAI's specification is obeyed, or harmless (it asks nothing of the answer), or refused by name when it
is set to anything but its default. Unknown fields are refused with the nearest known name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from deploy.errors import InvalidRequest, from_validation, invalid
from deploy.generation_config import from_generation_config
from deploy.settings import nearest

Body = TypeVar("Body", bound="RequestBody")
Key = TypeVar("Key")
Value = TypeVar("Value")
# Read until the first wrong item: an error for each of millions takes seconds and gigabytes.
ListOf = Annotated[list[Value], Field(fail_fast=True)]
DictOf = Annotated[dict[Key, Value], Field(fail_fast=True)]
INT64_MAX = 2**63 - 1


class RequestBody(BaseModel):
    """A JSON body. Read it with `parse`, which also knows the fields that are refused."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _has_room_for_all(cls, body: Any) -> Any:
        # One error, not one for each of millions; a few wrong names are told by name.
        if isinstance(body, dict) and len(body) > len(cls.model_fields) + 100:
            raise ValueError(f"{len(body)} fields are more than the {len(cls.model_fields)} that there are")
        return body


class StreamOptions(RequestBody):
    include_usage: bool = False
    continuous_usage_stats: bool = False  # vLLM: usage so far in every chunk
    include_obfuscation: bool = False  # OpenAI pads chunks against observers of their sizes; we never pad


class StructuredOutputs(RequestBody):
    """vLLM's `structured_outputs`: exactly one of these."""

    json_: str | dict[str, Any] | bool | None = Field(default=None, alias="json")
    json_object: bool | None = None
    regex: str | None = Field(default=None, max_length=100_000)
    choice: ListOf[str] | None = Field(default=None, min_length=1, max_length=10_000)
    grammar: str | None = Field(default=None, max_length=1_000_000)


class StreamingBody(RequestBody):
    """A body whose answer may be a stream. `request_id` names the answer."""

    model: str | None = None
    stream: bool | None = False
    request_id: str | None = Field(default=None, min_length=1, max_length=128, pattern=r"^[!-~]+$")


class GenerationBody(StreamingBody):
    """What completions and chats share."""

    stream_options: StreamOptions | None = None
    n: int | None = Field(default=1, ge=1)
    temperature: float | None = Field(default=None, ge=0)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1, le=INT64_MAX)  # 0 and -1: all, as in vLLM
    min_p: float | None = Field(default=None, ge=0, le=1)
    frequency_penalty: float | None = Field(default=0, ge=-2, le=2)
    presence_penalty: float | None = Field(default=0, ge=-2, le=2)
    repetition_penalty: float | None = Field(default=None, ge=1e-30, le=1e30)  # beyond, float32 logits are infinite
    seed: int | None = Field(default=None, ge=-INT64_MAX - 1, le=INT64_MAX)
    max_tokens: int | None = Field(default=None, ge=0, le=INT64_MAX)
    min_tokens: int | None = Field(default=0, ge=0, le=INT64_MAX)
    stop: str | ListOf[str] | None = None
    stop_token_ids: ListOf[int] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    logit_bias: DictOf[str, float] | None = None
    bad_words: ListOf[str] | None = Field(default=None, max_length=1000)
    allowed_token_ids: ListOf[int] | None = Field(default=None, min_length=1)
    prompt_logprobs: int | None = Field(default=None, ge=0)
    skip_special_tokens: bool = True
    truncate_prompt_tokens: int | None = Field(default=None, ge=-1, le=INT64_MAX)  # -1: to what the model takes
    truncation_side: Literal["left", "right"] | None = None
    return_tokens_as_token_ids: bool | None = None
    return_token_ids: bool | None = None
    return_routed_experts: bool = False
    response_format: dict[str, Any] | None = None
    structured_outputs: StructuredOutputs | None = None
    priority: int = Field(default=0, ge=-INT64_MAX - 1, le=INT64_MAX)
    cache_salt: str | None = Field(default=None, min_length=1, max_length=1024)

    @field_validator("stop")
    @classmethod
    def _stops_have_text(cls, stop: str | list[str] | None) -> str | list[str] | None:
        stops = [stop] if isinstance(stop, str) else stop or []
        if any(not one or len(one) > 1024 for one in stops):
            raise ValueError("a stop string has 1 to 1024 characters; remove the others")
        return stop

    @field_validator("stop_token_ids", "allowed_token_ids")
    @classmethod
    def _each_once(cls, token_ids: list[int] | None) -> list[int] | None:
        return token_ids and list(dict.fromkeys(token_ids))

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class CompletionRequest(GenerationBody):
    prompt: Any = None  # str | list[str] | list[int] | list[list[int]]: read in deploy.completions
    max_tokens: int | None = Field(default=16, ge=0, le=INT64_MAX)
    logprobs: int | None = Field(default=None, ge=0)
    echo: bool | None = False
    add_special_tokens: bool = True


class ChatCompletionRequest(GenerationBody):
    messages: ListOf[dict[str, Any]] = Field(min_length=1, max_length=100_000)
    max_completion_tokens: int | None = Field(default=None, ge=1, le=INT64_MAX)
    logprobs: bool | None = False
    top_logprobs: int | None = Field(default=None, ge=0)
    tools: ListOf[dict[str, Any]] | None = Field(default=None, max_length=1024)
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = True
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False
    echo: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    generation_config: str | dict[str, Any] | None = None  # of `transformers chat`; the body's own fields win

    @model_validator(mode="before")
    @classmethod
    def _read_generation_config(cls, body: Any) -> Any:
        if not isinstance(body, dict) or body.get("generation_config") is None:
            return body
        given = {name: value for name, value in body.items() if value is not None}
        fields = from_generation_config(body["generation_config"])
        if "max_tokens" in given:
            fields.pop("max_completion_tokens", None)
        return {**fields, **given}


class TokenizeRequest(RequestBody):
    """vLLM's /tokenize: a text or a chat."""

    model: str | None = None
    prompt: str | None = None
    messages: ListOf[dict[str, Any]] | None = Field(default=None, min_length=1)
    tools: ListOf[dict[str, Any]] | None = None
    add_special_tokens: bool | None = None  # default: true for a text, false for a chat
    return_token_strs: bool | None = False
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None


class DetokenizeRequest(RequestBody):
    model: str | None = None
    tokens: ListOf[int]


# Fields that change nothing in the answer, whatever their value.
_HARMLESS = frozenset({"user", "metadata", "safety_identifier", "prompt_cache_key", "cache_control", "session_id"})

# Fields that we don't do: the values that ask for nothing, and what to do instead.
_REFUSED: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "store": ((None, False), "responses are not stored"),
    "service_tier": ((None, "auto", "default", "standard_only"), "there is one tier"),
    "prompt_cache_retention": ((None, "in_memory", "in-memory"), "the prefix cache keeps what fits into memory"),
    "prompt_cache_options": ((None,), "the prefix cache works by itself; use cache_salt to keep tenants apart"),
    "verbosity": ((None, "medium"), "say in the prompt how long the answer should be"),
    "reasoning_effort": ((None, "none"), "these models have no reasoning mode"),
    "include_reasoning": ((None, True, False), ""),
    "modalities": ((None, ["text"]), "these models write text"),
    "audio": ((None,), "these models write text"),
    "prediction": ((None,), "there is no speculative decoding from predictions"),
    "moderation": ((None,), "there is no moderation model"),
    "web_search_options": ((None,), "there is no web search; give the model a tool"),
    "function_call": ((None,), "deprecated by OpenAI; use tool_choice"),
    "functions": ((None,), "deprecated by OpenAI; use tools"),
    "suffix": ((None, ""), "these models don't fill in the middle"),
    "use_beam_search": ((None, False), "there is no beam search; use n"),
    "length_penalty": ((None, 1, 1.0), "it belongs to beam search"),
    "early_stopping": ((None, False), "it belongs to beam search"),
    "spaces_between_special_tokens": ((None, True), "texts are exactly what the tokenizer decodes"),
    "logits_processors": ((None,), "code from requests is not run; use logit_bias or structured_outputs"),
    "documents": ((None,), "put documents into the messages"),
    "chat_template": ((None,), "templates come from the server; set model.chat_template there"),
    "chat_template_content_format": ((None, "auto", "string"), "templates see strings"),
    "media_io_kwargs": ((None,), "these models read text"),
    "mm_processor_kwargs": ((None,), "these models read text"),
    "prompt_embeds": ((None,), "send the prompt as text or token ids"),
    "kv_transfer_params": ((None,), "KV blocks stay with their router"),
    "vllm_xargs": ((None,), "there are no engine plugins"),
    "thinking_token_budget": ((None,), "these models have no reasoning mode"),
    "thinking": ((None, {"type": "disabled"}), "these models have no reasoning mode"),
    "container": ((None,), "there is no code execution"),
    "mcp_servers": ((None, []), "call MCP servers from the client, as tools"),
    "context_management": ((None,), "keep the messages that matter in the client"),
    "guided_json": ((None,), "use structured_outputs.json"),
    "guided_regex": ((None,), "use structured_outputs.regex"),
    "guided_choice": ((None,), "use structured_outputs.choice"),
    "guided_grammar": ((None,), "use structured_outputs.grammar"),
    "guided_decoding_backend": ((None,), "there is one backend"),
    "guided_whitespace_pattern": ((None,), "use structured_outputs.regex"),
}


def parse(body: Any, model: type[Body]) -> Body:
    """Reads a decoded JSON body. Raises InvalidRequest that names the field."""
    if not isinstance(body, dict):
        raise InvalidRequest(f"the body must be a JSON object, not {type(body).__name__}")
    known = {field.alias or name for name, field in model.model_fields.items()}
    kept = {}
    for name, value in body.items():
        if name in known:
            kept[name] = value
        elif name == "best_of":
            if value not in (None, 1, body.get("n") or 1) or isinstance(value, bool):
                raise InvalidRequest("best_of: choosing among more samples than n is not supported; use n", param=name)
        elif name in _REFUSED:
            accepted, remedy = _REFUSED[name]
            if not any(value == one and type(value) is type(one) for one in accepted):
                raise invalid(name, f"not supported: {remedy}", code="unsupported_parameter")
        elif name not in _HARMLESS:
            hint = nearest(name[:100], [*known, *_HARMLESS])
            raise InvalidRequest(f"unknown field {name[:100]!r}{hint}", param=name[:100], code="unknown_parameter")
    try:
        return model.model_validate(kept)
    except ValidationError as error:
        raise from_validation(error) from None
