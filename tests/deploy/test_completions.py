from __future__ import annotations

import openai
import pytest

from deploy.served_model import ServedModel
from tests.deploy.fakes import RunningApi, token_at


@pytest.fixture
def client(api: RunningApi) -> openai.OpenAI:
    return openai.OpenAI(base_url=api.url + "/v1", api_key="any", max_retries=0)


def text_of(served: ServedModel, seed: int, start: int, num: int) -> str:
    return served.tokenizer.decode([token_at(seed, start + i) for i in range(num)])


def test_a_completion_has_openai_shape(client: openai.OpenAI, served: ServedModel) -> None:
    prompt = "the expert"
    start = len(served.tokenizer.encode(prompt))
    answer = client.completions.create(model="tiny", prompt=prompt, max_tokens=8, seed=3)
    assert answer.id.startswith("cmpl-") and answer.object == "text_completion"
    assert answer.choices[0].text == text_of(served, 3, start, 8)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage and (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (start, 8)


def test_a_stream_joins_to_the_same_text(client: openai.OpenAI, served: ServedModel) -> None:
    whole = client.completions.create(model="tiny", prompt="the shard", max_tokens=30, seed=3)
    chunks = list(
        client.completions.create(
            model="tiny", prompt="the shard", max_tokens=30, seed=3, stream=True, stream_options={"include_usage": True}
        )
    )
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == whole.choices[0].text
    assert chunks[-1].usage == whole.usage and not chunks[-1].choices
