"""langchain-openai: invoke, stream, batch, bound tools and structured output."""
# /// script
# dependencies = ["langchain-openai>=1,<2"]
# ///

import sys
from typing import Literal

from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel, ConfigDict

url, model = sys.argv[1:]


class Sorted(BaseModel):
    """Sorts."""

    model_config = ConfigDict(extra="forbid")
    kind: Literal["a", "b"]


chat = ChatOpenAI(model=model, base_url=url + "/v1", api_key="none", max_tokens=200, seed=4, max_retries=0)
short = chat.bind(max_tokens=12)
message = short.invoke("the whale")
assert message.usage_metadata["output_tokens"] > 0
assert "".join(chunk.content for chunk in short.stream("the whale")) == message.content
assert len(short.batch(["the whale", "the sea"])) == 2
called = chat.bind_tools([Sorted], tool_choice="Sorted", parallel_tool_calls=False).invoke("the whale")
assert called.tool_calls[0]["name"] == "Sorted" and called.tool_calls[0]["args"]["kind"] in ("a", "b")
for method in ("json_schema", "function_calling"):
    assert isinstance(chat.with_structured_output(Sorted, method=method).invoke("the whale"), Sorted)
text = OpenAI(model=model, base_url=url + "/v1", api_key="none", max_tokens=12, seed=4, max_retries=0)
assert text.invoke("the whale")
