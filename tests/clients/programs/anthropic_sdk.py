"""anthropic: whole and streamed messages, tools, token counts, an error."""
# /// script
# dependencies = ["anthropic>=2,<3"]
# ///

import sys

import anthropic

url, model = sys.argv[1:]
client = anthropic.Anthropic(base_url=url, api_key="none", max_retries=0)
cold = {"temperature": 0.0}  # the SDK has no argument for it any more
hello = [{"role": "user", "content": "the whale"}]
message = client.messages.create(model=model, max_tokens=12, messages=hello, system="Be brief.")
assert message.type == "message" and message.role == "assistant" and message.usage.input_tokens > 0
assert message._request_id
assert 0 < message.usage.output_tokens <= 12 and message.stop_reason in ("max_tokens", "end_turn")

with client.messages.stream(model=model, max_tokens=12, messages=hello, extra_body=cold) as stream:
    text = "".join(stream.text_stream)
    final = stream.get_final_message()
again = client.messages.create(model=model, max_tokens=12, messages=hello, extra_body=cold)
assert text == final.content[0].text == again.content[0].text

schema = {"type": "object", "properties": {"kind": {"enum": ["a", "b"]}}, "required": ["kind"]}
schema["additionalProperties"] = False
used = client.messages.create(
    model=model,
    max_tokens=200,
    messages=hello,
    tools=[{"name": "sort", "description": "Sorts.", "input_schema": schema}],
    tool_choice={"type": "tool", "name": "sort", "disable_parallel_tool_use": True},
)
(call,) = [block for block in used.content if block.type == "tool_use"]
assert call.name == "sort" and call.input["kind"] in ("a", "b") and used.stop_reason == "tool_use"

assert client.messages.count_tokens(model=model, messages=hello).input_tokens > 0
try:
    client.messages.create(model="nobody", max_tokens=5, messages=hello)
    refusal = ""
except anthropic.NotFoundError as error:
    refusal = str(error)
assert "nobody" in refusal
