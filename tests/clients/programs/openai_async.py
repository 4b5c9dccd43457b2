"""openai: an asynchronous client, streams in parallel, parsed answers, tools and errors."""

import asyncio
import json
import sys
from typing import Literal

import openai
from pydantic import BaseModel, ConfigDict

url, model = sys.argv[1:]
hello = [{"role": "user", "content": "the whale"}]


class Answer(BaseModel):
    model_config = ConfigDict(extra="forbid")
    ok: bool
    kind: Literal["x", "y"]


async def text_of(client: openai.AsyncOpenAI, seed: int) -> str:
    text, usage = "", None
    stream = await client.chat.completions.create(
        model=model, messages=hello, max_tokens=12, seed=seed, stream=True, stream_options={"include_usage": True}
    )
    async for chunk in stream:
        text += "".join(choice.delta.content or "" for choice in chunk.choices)
        usage = chunk.usage or usage
    assert usage is not None and usage.completion_tokens > 0
    return text


async def main() -> None:
    async with openai.AsyncOpenAI(base_url=url + "/v1", api_key="none", max_retries=0) as client:
        assert model in [card.id async for card in client.models.list()]
        texts = await asyncio.gather(*(text_of(client, i % 4) for i in range(8)))
        assert texts[:4] == texts[4:], "the same seed gives the same text"
        whole = await client.chat.completions.create(model=model, messages=hello, max_tokens=12, seed=2)
        assert whole.choices[0].message.content == texts[2]

        parsed = await client.chat.completions.parse(model=model, messages=hello, response_format=Answer, seed=1)
        assert isinstance(parsed.choices[0].message.parsed, Answer)
        tool = openai.pydantic_function_tool(Answer, name="judge")
        chat = await client.chat.completions.create(
            model=model, messages=hello, tools=[tool], tool_choice="required", parallel_tool_calls=False, seed=1
        )
        (call,) = chat.choices[0].message.tool_calls
        assert call.function.name == "judge" and Answer(**json.loads(call.function.arguments))
        assert chat.choices[0].finish_reason == "tool_calls"

        completion = await client.completions.create(
            model=model, prompt="the", max_tokens=3, logprobs=2, echo=True, n=2
        )
        assert len(completion.choices) == 2 and completion.choices[0].text.startswith("the")
        try:
            await client.completions.create(model=model, prompt=[5] * 100_000, max_tokens=1)
            code = None
        except openai.BadRequestError as error:
            code = error.code
        assert code == "context_length_exceeded"
        stream = await client.completions.create(model=model, prompt="the", max_tokens=400, stream=True)
        async for _ in stream:
            break
        await stream.close()


asyncio.run(main())
