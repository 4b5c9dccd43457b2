from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import openai
import pytest
from pydantic import BaseModel

from deploy.chat_messages import read_messages, render, with_preamble
from deploy.errors import InvalidRequest
from deploy.openai_requests import ChatCompletionRequest
from deploy.served_model import ModelList, ServedModel
from deploy.service import Service
from deploy.settings import Settings
from deploy.tools import read_tool_use
from model.structured import GrammarCompiler
from model.tokenizer import Tokenizer
from tests.deploy.fakes import RunningApi, byte_level_tokenizer
from tests.deploy.test_completions import events, post, prompt_of, scripts
from tests.tiny import write_tokenizer

CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "hello"}]
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
    },
}
CHATML = (  # Qwen1.5's
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CALLS = "I add." + "".join(f'\n<tool_call>\n{{"name": "add", "arguments": {{"a": {i}}}}}\n</tool_call>' for i in (1, 2))


@pytest.fixture
def client(api: RunningApi) -> openai.OpenAI:
    return openai.OpenAI(base_url=api.url + "/v1", api_key="any", max_retries=0)


@pytest.fixture(autouse=True)
def _fresh(api: RunningApi) -> None:
    api.router.script = lambda _: None


def test_a_chat_has_openai_shape(client: openai.OpenAI, api: RunningApi, served: ServedModel) -> None:
    scripts(api, served, "hi there")
    answer = client.chat.completions.create(model="tiny", messages=HELLO, max_completion_tokens=50)  # type: ignore[arg-type]
    assert answer.id.startswith("chatcmpl-") and answer.object == "chat.completion"
    assert answer.choices[0].message.role == "assistant" and answer.choices[0].message.content == "hi there"
    assert answer.choices[0].finish_reason == "stop" and answer.choices[0].message.tool_calls is None
    assert prompt_of(api, served) == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"


def test_a_streamed_chat_begins_with_the_role_and_joins(api: RunningApi, served: ServedModel) -> None:
    scripts(api, served, "hi there")
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = events(api, {"messages": HELLO, "stream_options": options, "return_token_ids": True}, CHAT)
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert chunks[0]["prompt_token_ids"] == api.router.requests[-1]["prompt_ids"]
    deltas = [choice for chunk in chunks for choice in chunk["choices"]]
    assert "".join(one["delta"].get("content", "") for one in deltas) == "hi there"
    assert deltas[-1]["token_ids"][-1] == 2
    assert deltas[-1]["finish_reason"] == "stop"
    assert chunks[-1]["usage"]["completion_tokens"] == 9
    assert all(chunk["usage"]["prompt_tokens"] > 0 for chunk in chunks)


def test_chat_logprobs_have_tokens_bytes_and_alternatives(api: RunningApi, served: ServedModel) -> None:
    scripts(api, served, "é!", ends=False)
    answer = post(api, {"messages": HELLO, "logprobs": True, "top_logprobs": 2, "n": 2}, CHAT).json()
    content = answer["choices"][1]["logprobs"]["content"]
    assert b"".join(bytes(one["bytes"]) for one in content) == "é!".encode()
    assert all(len(one["top_logprobs"]) == 2 for one in content)
    assert post(api, {"messages": HELLO, "top_logprobs": 2}, CHAT).json()["error"]["param"] == "top_logprobs"


def test_text_parts_and_all_roles_are_rendered(api: RunningApi, served: ServedModel) -> None:
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}],
        },
        {"role": "tool", "tool_call_id": "1", "content": "2"},
    ]
    assert post(api, {"messages": messages, "max_tokens": 1}, CHAT).status_code == 200
    prompt = prompt_of(api, served)
    assert "<|im_start|>system\nbe brief" in prompt and "<|im_start|>user\na\nb<|im_end|>" in prompt
    assert '{"name": "add", "arguments": {"a": 1}}' in prompt and "<|im_start|>tool\n2" in prompt


@pytest.mark.parametrize(
    ("sent", "shown"),
    [
        ("null", "{}"),
        ('"{\\"a\\": 1}"', '{"a": 1}'),
        ('{"a": 1', r'"{\"a\": 1"'),  # cut off by max_tokens: this template prints the text as JSON
    ],
)
def test_a_call_that_the_server_wrote_is_taken_back(
    api: RunningApi, served: ServedModel, sent: str, shown: str
) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": sent}}
    messages = [*HELLO, {"role": "assistant", "content": None, "tool_calls": [call]}]
    response = post(api, {"messages": messages, "max_tokens": 1}, CHAT)
    assert response.status_code == 200, response.text
    assert f'{{"name": "add", "arguments": {shown}}}' in prompt_of(api, served)


def test_the_final_message_can_be_continued(api: RunningApi, served: ServedModel) -> None:
    messages = [*HELLO, {"role": "assistant", "content": "Once upon "}]
    scripts(api, served, "a time")
    body = {"messages": messages, "continue_final_message": True, "echo": True}
    answer = post(api, body, CHAT).json()
    assert prompt_of(api, served).endswith("<|im_start|>assistant\nOnce upon ")
    assert answer["choices"][0]["message"]["content"] == "Once upon a time"
    assert post(api, {**body, "add_generation_prompt": True}, CHAT).status_code == 400


def test_tool_calls_are_parsed_whole_and_streamed(client: openai.OpenAI, api: RunningApi, served: ServedModel) -> None:
    scripts(api, served, CALLS)
    body: dict[str, Any] = {"model": "tiny", "messages": HELLO, "tools": [ADD], "max_completion_tokens": 200}
    whole = client.chat.completions.create(**body).choices[0]
    assert whole.finish_reason == "tool_calls" and whole.message.content == "I add."
    calls = [(one.function.name, json.loads(one.function.arguments)) for one in whole.message.tool_calls or []]  # type: ignore[union-attr]
    assert calls == [("add", {"a": 1}), ("add", {"a": 2})]
    assert '"name": "add"' in prompt_of(api, served)
    with client.chat.completions.stream(**body) as stream:
        final = stream.get_final_completion().choices[0]
    assert final.finish_reason == "tool_calls" and final.message.content == "I add."
    assert [one.function.arguments for one in final.message.tool_calls or []] == ['{"a": 1}', '{"a": 2}']
    single = post(api, {"messages": HELLO, "tools": [ADD], "parallel_tool_calls": False}, CHAT).json()
    assert len(single["choices"][0]["message"]["tool_calls"]) == 1
    unused = post(api, {"messages": HELLO, "tools": [ADD], "tool_choice": "none"}, CHAT).json()
    assert unused["choices"][0]["message"]["content"] == CALLS


@pytest.mark.parametrize("stream", [False, True])
def test_a_demanded_call_constrains_the_output(
    client: openai.OpenAI, api: RunningApi, served: ServedModel, stream: bool
) -> None:
    cases = [
        ("required", '[{"name": "add", "parameters": {"a": 1}}]', "tool_calls"),
        ({"type": "function", "function": {"name": "add"}}, '{"a": 1}', "stop"),
    ]
    for choice, text, reason in cases:
        scripts(api, served, text)
        body: dict[str, Any] = {"model": "tiny", "messages": HELLO, "tools": [ADD], "tool_choice": choice}
        if stream:
            with client.chat.completions.stream(**body) as events_:
                answer: Any = events_.get_final_completion().choices[0]
        else:
            answer = client.chat.completions.create(**body).choices[0]
        assert [(one.function.name, one.function.arguments) for one in answer.message.tool_calls] == [
            ("add", '{"a": 1}')
        ]
        assert answer.finish_reason == reason and not answer.message.content
        assert api.router.requests[-1]["sampling"]["structured"]["kind"] == "json_schema"


def test_parsed_models_work_with_the_client(client: openai.OpenAI, api: RunningApi, served: ServedModel) -> None:
    class Point(BaseModel):
        x: int

    scripts(api, served, '{"x": 4}')
    answer = client.chat.completions.parse(model="tiny", messages=HELLO, response_format=Point)  # type: ignore[arg-type]
    assert answer.choices[0].message.parsed == Point(x=4)
    structured = api.router.requests[-1]["sampling"]["structured"]
    assert json.loads(structured["payload"])["properties"]["x"]["type"] == "integer"
    scripts(api, served, "and back")
    again = [*HELLO, answer.choices[0].message, *HELLO]
    assert client.chat.completions.create(model="tiny", messages=again).choices  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("extra", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages[0].content[0]",
        ),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"tools": [{"type": "custom"}]}, "tools[0]"),
        ({"tools": [{"type": "function", "function": {"name": "f", "strict": "very"}}]}, "tools[0]"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [ADD], "tool_choice": {"type": "function", "function": {"name": "sub"}}}, "tool_choice"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"tools": [ADD], "tool_choice": "required", "response_format": {"type": "json_object"}}, "tool_choice"),
        ({"functions": []}, "functions"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"chat_template": "{{ 1 }}"}, "chat_template"),
        ({"chat_template_kwargs": {"messages": []}}, "messages"),
        ({"stop": [""]}, "stop"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"messages": [*HELLO, {"role": "user", "content": "x", "contents": "y"}]}, "messages[1]"),
    ],
)
def test_what_cannot_be_obeyed_is_refused_by_name(api: RunningApi, extra: dict[str, Any], param: str) -> None:
    response = post(api, {"messages": HELLO, **extra}, CHAT)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


def test_templates_that_know_no_tools_get_them_as_text() -> None:
    use = read_tool_use([ADD], None, is_parallel=True)
    assert '"name": "add"' in use.preamble() and "<tool_call>" in use.preamble()
    first, second = with_preamble(HELLO, "P"), with_preamble([{"role": "system", "content": "S"}, *HELLO], "P")
    assert first == [{"role": "system", "content": "P"}, *HELLO]
    assert second == [{"role": "system", "content": "S\n\nP"}, *HELLO]


def test_templates_that_know_no_tools_get_earlier_calls_and_results_as_text(
    api: RunningApi, model_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "chatml").write_text(CHATML)
    served = ServedModel.from_directory(model_dir, names=("tiny",), chat_template_file=tmp_path / "chatml")
    calls = [
        {"id": str(a), "type": "function", "function": {"name": "add", "arguments": f'{{"a": {a}}}'}} for a in (1, 2)
    ]
    messages = [
        {"role": "user", "content": "1? 2?"},
        {"role": "assistant", "content": None, "tool_calls": calls[:1]},
        {"role": "tool", "tool_call_id": "1", "content": "one"},
        {"role": "assistant", "content": "I add.", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "1", "content": "one"},
        {"role": "tool", "tool_call_id": "2", "content": "é"},
    ]
    call = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
    told = [
        "<|im_start|>user\n1? 2?",
        f"<|im_start|>assistant\n{call}",
        "<|im_start|>user\n<tool_response>\none\n</tool_response>",
        f"<|im_start|>assistant\n{CALLS}",
        "<|im_start|>user\n<tool_response>\none\n</tool_response>\n<tool_response>\né\n</tool_response>",
        "<|im_start|>assistant\n",
    ]
    service = Service(Settings(), ModelList([served]), api.pool)
    body, read = ChatCompletionRequest(messages=messages), read_messages(messages)
    for tools in ([ADD], None):
        prompt = asyncio.run(render(service, served, body, read, read_tool_use(tools, None, is_parallel=True)))
        assert prompt.endswith("<|im_end|>\n".join(told))


@pytest.mark.parametrize("tags_are_tokens", [True, False])
def test_strict_functions_are_called_as_their_schemas_say_or_not_at_all(tmp_path: Path, tags_are_tokens: bool) -> None:
    if tags_are_tokens:
        byte_level_tokenizer().save(str(tmp_path / "tokenizer.json"))
    else:
        write_tokenizer(tmp_path, 320)
    tokenizer = Tokenizer.from_directory(tmp_path, vocab_size=512)
    strict = {"type": "function", "function": {**ADD["function"], "strict": True}}  # type: ignore[dict-item]
    loose = {"type": "function", "function": {"name": "sub"}}
    compiler = GrammarCompiler(tokenizer, 512, [2])

    def follows(text: str) -> bool:
        use = read_tool_use([strict, loose], "auto", is_parallel=True)
        spec = use.structured(tags_are_tokens=tags_are_tokens)
        assert spec is not None
        matcher = compiler.compile(spec)
        return all(map(matcher.accept, [*tokenizer.encode(text), 2]))

    call = '\n<tool_call>\n{"name": "%s", "arguments": %s}\n</tool_call>'
    assert follows("No <tool needed.") and follows("So." + call % ("add", '{"a": 1}') + call % ("sub", '{"z": "y"}'))
    assert not follows(call % ("add", '{"a": "one"}')) and not follows(call % ("mul", "{}"))
    assert read_tool_use([ADD, loose], "auto", is_parallel=True).structured() is None


def test_definitions_of_tools_move_to_where_references_look() -> None:
    def tool(name: str, definition: dict[str, Any]) -> dict[str, Any]:
        parameters = {"$defs": {"D": definition}, "type": "object", "properties": {"d": {"$ref": "#/$defs/D"}}}
        return {"type": "function", "function": {"name": name, "parameters": parameters}}

    same = read_tool_use([tool("a", {"type": "string"}), tool("b", {"type": "string"})], "required", is_parallel=True)
    structured = same.structured()
    assert structured is not None
    schema = json.loads(structured.payload)
    assert schema["$defs"] == {"D": {"type": "string"}}
    assert [one["properties"]["name"]["enum"] for one in schema["items"]["anyOf"]] == [["a"], ["b"]]
    differing = read_tool_use([tool("a", {"type": "string"}), tool("b", {})], "required", is_parallel=True)
    with pytest.raises(InvalidRequest, match="'D'"):
        differing.structured()


def test_allowed_tools_narrow_the_choice() -> None:
    other = {"type": "function", "function": {"name": "sub"}}
    choice = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [other]}}
    use = read_tool_use([ADD, other], choice, is_parallel=False)
    assert (use.mode, [tool["function"]["name"] for tool in use.tools]) == ("required", ["sub"])
    choice["allowed_tools"]["mode"] = "maybe"  # type: ignore[index]
    with pytest.raises(InvalidRequest, match="allowed_tools"):
        read_tool_use([ADD, other], choice, is_parallel=False)
