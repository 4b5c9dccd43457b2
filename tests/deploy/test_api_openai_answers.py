"""What real routers' service answers, against the types of OpenAI's Python client and, where it is there, OpenAI's own
document."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pydantic
import pytest
from openai import types
from openai.pagination import SyncPage

from deploy.served_model import ServedModel
from deploy.settings import Settings
from tests.deploy.fakes import RunningApi, running_api
from tests.deploy.openai_document import find_document, validator_for
from tests.deploy.real_routers import RealRouters
from tests.deploy.test_completions import events, post, scripts
from tests.tiny import write_tiny_model

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
HELLO = [{"role": "user", "content": "the whale"}]
SCHEMA = {"type": "object", "properties": {"kind": {"enum": ["x", "y"]}}, "required": ["kind"]}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {**SCHEMA, "additionalProperties": False}}}
JSON_SCHEMA = {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}}
USAGE = {"stream_options": {"include_usage": True}}
Check = Callable[[str, Any], None]


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningApi]:
    directory: Path = write_tiny_model(tmp_path_factory.mktemp("real") / "tiny")
    served = ServedModel.from_directory(directory, names=("tiny",))
    with running_api(served, Settings.model_validate({"mesh": {"token": "t"}}), RealRouters(directory, "a")) as running:
        yield running


# Their names in the document.
TYPES: dict[str, type[pydantic.BaseModel]] = {
    "CreateCompletionResponse": types.Completion,
    "CreateChatCompletionResponse": types.chat.ChatCompletion,
    "CreateChatCompletionStreamResponse": types.chat.ChatCompletionChunk,
    "CreateEmbeddingResponse": types.CreateEmbeddingResponse,
    "ListModelsResponse": SyncPage[types.Model],
    "Model": types.Model,
}


@pytest.fixture(scope="module")
def check() -> Check:
    """check(schema's name, value) raises ValidationError, of pydantic or of jsonschema."""
    validators: dict[str, Any] = {}
    document = find_document()

    def check(name: str, value: Any) -> None:
        if name == "ErrorResponse":
            types.ErrorObject.model_validate(value["error"], strict=True)
        else:
            TYPES[name].model_validate(value, strict=True)
        if document is not None:
            if name not in validators:
                validators[name] = validator_for(document, name)
            validators[name].validate(value)

    return check


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"n": 2, "temperature": 1.0},
        {"logprobs": 3},
        {"prompt": ["the", "sea"], "stop": ["e"]},
        {"prompt": [5, 6, 7], "echo": True, "max_tokens": 1},
        {"response_format": {"type": "json_object"}},
    ],
)
def test_completions(real: RunningApi, check: Check, extra: dict[str, Any]) -> None:
    body = {"prompt": "the whale", "max_tokens": 8, "seed": 1, **extra}
    check("CreateCompletionResponse", post(real, body).json())
    chunks = events(real, {**body, **USAGE})
    assert chunks[-1]["usage"]["completion_tokens"] > 0
    for chunk in chunks:
        # The document has one schema for answers and chunks; OpenAI's own chunks have null where it is too early.
        if chunk["usage"] is None:
            del chunk["usage"]
        for choice in chunk["choices"]:
            choice["finish_reason"] = choice["finish_reason"] or "stop"
        check("CreateCompletionResponse", chunk)


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"n": 2, "temperature": 1.0},
        {"logprobs": True, "top_logprobs": 3},
        {"logprobs": True, "stop": ["e"]},
        {"response_format": {"type": "json_object"}},
        {"response_format": JSON_SCHEMA},
        {"tools": [TOOL]},
        {"tools": [TOOL], "tool_choice": "required", "max_completion_tokens": 200},
        {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "f"}}},
    ],
)
def test_chats(real: RunningApi, check: Check, extra: dict[str, Any]) -> None:
    body = {"messages": HELLO, "max_completion_tokens": 40, "seed": 1, **extra}
    answer = post(real, body, CHAT).json()
    check("CreateChatCompletionResponse", answer)
    assert len(answer["choices"]) == extra.get("n", 1)
    if "tool_choice" in extra:
        assert answer["choices"][0]["message"]["tool_calls"]
    chunks = events(real, {**body, **USAGE}, CHAT)
    for chunk in chunks:
        check("CreateChatCompletionStreamResponse", chunk)
    assert chunks[-1]["usage"] == {
        **answer["usage"],
        "prompt_tokens_details": chunks[-1]["usage"]["prompt_tokens_details"],
    }


def test_calls_among_text(api: RunningApi, served: ServedModel, check: Check) -> None:
    scripts(api, served, 'So.\n<tool_call>\n{"name": "f", "arguments": {"kind": "x"}}\n</tool_call>')
    body = {"messages": HELLO, "tools": [TOOL]}
    answer = post(api, body, CHAT).json()
    assert answer["choices"][0]["finish_reason"] == "tool_calls"
    check("CreateChatCompletionResponse", answer)
    for chunk in events(api, body, CHAT):
        check("CreateChatCompletionStreamResponse", chunk)


def test_models_and_embeddings(real: RunningApi, check: Check) -> None:
    check("ListModelsResponse", httpx.get(real.url + "/v1/models").json())
    check("Model", httpx.get(real.url + "/v1/models/tiny").json())
    check("CreateEmbeddingResponse", post(real, {"input": ["the whale", "the sea"]}, "/v1/embeddings").json())


def test_errors(real: RunningApi, check: Check) -> None:
    answers = [
        post(real, {"prompt": "x", "model": "none"}),
        post(real, {"prompt": [5] * 600}),
        post(real, {"prompt": "x", "temperature": "warm"}),
        post(real, {"messages": [], "n": 0}, CHAT),
        post(real, {}, "/v1/nothing"),
        httpx.delete(real.url + "/v1/models/tiny"),
        httpx.post(real.url + COMPLETIONS, content=b"{", headers={"content-type": "application/json"}),
        httpx.get(real.url + "/v1/models/none"),
    ]
    for answer in answers:
        assert 400 <= answer.status_code < 500
        check("ErrorResponse", json.loads(answer.content))
