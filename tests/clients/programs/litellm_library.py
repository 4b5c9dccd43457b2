"""litellm: chats through the OpenAI, hosted_vllm and Anthropic providers, streams, completions, errors."""
# /// script
# dependencies = ["litellm>=1.100,<2", "mcp"]
# ///

import asyncio
import sys

import litellm

litellm.telemetry = False
url, model = sys.argv[1:]
hello = [{"role": "user", "content": "the whale"}]
texts = []
for provider, base in (("openai", url + "/v1"), ("hosted_vllm", url + "/v1"), ("anthropic", url)):
    common = {"model": f"{provider}/{model}", "api_base": base, "api_key": "none", "messages": hello, "max_tokens": 12}
    answer = litellm.completion(**common, temperature=0.0)
    assert answer.usage.completion_tokens == 12
    stream = litellm.completion(**common, temperature=0.0, stream=True)
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert streamed == answer.choices[0].message.content
    texts.append(streamed)
assert len(set(texts)) == 1, texts
openai = {"model": f"text-completion-openai/{model}", "api_base": url + "/v1", "api_key": "none"}
assert litellm.text_completion(**openai, prompt="the whale", max_tokens=12).choices[0].text
tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "additionalProperties": False}}}
common = {"model": f"hosted_vllm/{model}", "api_base": url + "/v1", "api_key": "none", "messages": hello}
called = litellm.completion(**common, tools=[tool], tool_choice="required", parallel_tool_calls=False, max_tokens=200)
assert called.choices[0].message.tool_calls[0].function.name == "f"
assert asyncio.run(litellm.acompletion(**common, max_tokens=4)).choices
try:
    litellm.completion(**{**common, "model": "hosted_vllm/nobody"}, num_retries=0)
except litellm.exceptions.NotFoundError:
    pass
else:
    raise AssertionError("an unknown model was served")
