"""Every field of OpenAI's requests: obeyed, harmless, or refused by name. The lists hold without their document."""

from __future__ import annotations

import re
from typing import Any

import pytest

from deploy.served_model import ServedModel
from tests.deploy.fakes import RunningApi
from tests.deploy.openai_document import properties_of
from tests.deploy.test_completions import post, scripts

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
USER = {"role": "user", "content": "hello"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
BASE: dict[str, dict[str, Any]] = {
    COMPLETIONS: {"model": "tiny", "prompt": "hello", "seed": 7},
    CHAT: {"model": "tiny", "messages": [USER], "seed": 7},
}
SCHEMAS = {COMPLETIONS: "CreateCompletionRequest", CHAT: "CreateChatCompletionRequest"}

# Field, a value, and what else the body needs.
BOTH: list[tuple[str, Any, dict[str, Any]]] = [
    ("model", "tiny-alias", {}),
    ("max_tokens", 3, {}),
    ("n", 2, {}),
    ("temperature", 0.5, {}),
    ("top_p", 0.5, {}),
    ("frequency_penalty", 1.0, {}),
    ("presence_penalty", 1.0, {}),
    ("seed", 8, {}),
    ("stop", "lo", {}),
    ("logit_bias", {"5": 1}, {}),
    ("stream", True, {}),
    ("stream_options", {"include_usage": True}, {"stream": True}),
]
OBEYED = {
    COMPLETIONS: [*BOTH, ("prompt", "other", {}), ("echo", True, {}), ("logprobs", 1, {})],
    CHAT: [
        *BOTH,
        ("messages", [{"role": "user", "content": "other"}], {}),
        ("max_completion_tokens", 3, {}),
        ("logprobs", True, {}),
        ("top_logprobs", 2, {"logprobs": True}),
        ("response_format", {"type": "json_object"}, {}),
        ("tools", [TOOL], {}),
        ("tool_choice", "required", {"tools": [TOOL]}),
        ("parallel_tool_calls", False, {"tools": [TOOL], "tool_choice": "required"}),
    ],
}
HARMLESS: dict[str, dict[str, Any]] = {
    COMPLETIONS: {"user": "me"},
    CHAT: {"user": "me", "metadata": {"a": "b"}, "safety_identifier": "me", "prompt_cache_key": "k"},
}
REFUSED: dict[str, dict[str, Any]] = {
    COMPLETIONS: {"best_of": 3, "suffix": "x"},
    CHAT: {
        "store": True,
        "service_tier": "flex",
        "prompt_cache_retention": "24h",
        "prompt_cache_options": {"mode": "explicit"},
        "verbosity": "low",
        "reasoning_effort": "high",
        "modalities": ["text", "audio"],
        "audio": {"voice": "alloy", "format": "wav"},
        "prediction": {"type": "content", "content": "x"},
        "moderation": {"model": "omni-moderation-latest"},
        "web_search_options": {},
        "function_call": "auto",
        "functions": [{"name": "f"}],
    },
}


def outcome(api: RunningApi, path: str, body: dict[str, Any]) -> tuple[list[dict[str, Any]], str]:
    """What the routers were asked, and the answer, without what differs each time."""
    num_before = len(api.router.requests)
    response = post(api, body, path)
    assert response.status_code == 200, response.text
    asked = [{**one, "request_id": "", "first_id": "", "deadline_s": 0} for one in api.router.requests[num_before:]]
    return asked, re.sub(r'"id":"[^"]*"|"created":\d+', "", response.text)


def cases(table: dict[str, Any]) -> list[Any]:
    return [pytest.param(path, case, id=f"{path}-{name(case)}") for path in table for case in items(table[path])]


def items(cases: Any) -> list[Any]:
    return list(cases.items()) if isinstance(cases, dict) else cases


def name(case: Any) -> str:
    return str(case[0])


@pytest.fixture(autouse=True)
def _fresh(api: RunningApi, served: ServedModel) -> None:
    scripts(api, served, "hello world")


@pytest.mark.parametrize(("path", "case"), cases(OBEYED))
def test_an_obeyed_field_changes_what_is_asked_of_the_router_or_the_answer(
    api: RunningApi, path: str, case: tuple[str, Any, dict[str, Any]]
) -> None:
    field, value, needed = case
    base = {**BASE[path], **needed}
    assert outcome(api, path, {**base, field: value}) != outcome(api, path, base)


@pytest.mark.parametrize(("path", "case"), cases(HARMLESS))
def test_a_harmless_field_changes_nothing(api: RunningApi, path: str, case: tuple[str, Any]) -> None:
    field, value = case
    assert outcome(api, path, {**BASE[path], field: value}) == outcome(api, path, BASE[path])


@pytest.mark.parametrize(("path", "case"), cases(REFUSED))
def test_what_is_not_done_is_refused_by_name_and_null_asks_for_nothing(
    api: RunningApi, path: str, case: tuple[str, Any]
) -> None:
    field, value = case
    response = post(api, {**BASE[path], field: value}, path)
    error = response.json()["error"]
    assert response.status_code == 400 and error["param"] == field and field in error["message"]
    assert "unknown" not in error["message"]
    assert outcome(api, path, {**BASE[path], field: None}) == outcome(api, path, BASE[path])


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_the_lists_here_name_every_field_of_openais_document(path: str, openai_document: dict[str, Any]) -> None:
    listed = {name(case) for table in (OBEYED, HARMLESS, REFUSED) for case in items(table[path])}
    assert set(properties_of(openai_document, SCHEMAS[path])) == listed
