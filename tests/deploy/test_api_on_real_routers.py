"""The API over real routers (all experts in the router's process) in this process: text, constraints, a lost router."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from deploy import specs
from deploy.served_model import ServedModel
from deploy.settings import Settings, load
from tests.deploy.fakes import RunningApi, running_api
from tests.deploy.real_routers import RealRouters
from tests.tiny import load_oracle, oracle_greedy, write_tiny_model

HELLO: Any = [{"role": "user", "content": "the whale"}]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("real") / "tiny", max_position_embeddings=2048)


@pytest.fixture(scope="module")
def real(directory: Path) -> Iterator[RunningApi]:
    served = ServedModel.from_directory(directory, names=("tiny",))
    settings = Settings.model_validate({"mesh": {"token": "t"}})
    with running_api(served, settings, RealRouters(directory)) as running:
        yield running


@pytest.fixture
def client(real: RunningApi) -> openai.OpenAI:
    return openai.OpenAI(base_url=real.url + "/v1", api_key="x", max_retries=0)


def test_greedy_text_is_that_of_transformers(client: openai.OpenAI, directory: Path) -> None:
    prompt = [40, 50, 60, 70]
    answer = client.completions.create(
        model="tiny",
        prompt=prompt,
        max_tokens=24,
        temperature=0,
        logprobs=2,
        extra_body={"ignore_eos": True, "return_token_ids": True, "prompt_logprobs": 1},
    )
    choice = answer.choices[0].model_dump()
    assert choice["token_ids"] == oracle_greedy(load_oracle(directory), prompt, 24)
    assert len(choice["logprobs"]["tokens"]) == 24 and len(choice["prompt_logprobs"]) == 4
    assert all(
        top[token] == value
        for top, token, value in zip(
            choice["logprobs"]["top_logprobs"],
            choice["logprobs"]["tokens"],
            choice["logprobs"]["token_logprobs"],
            strict=True,
        )
    )


def test_constraints_hold_for_a_model_of_noise(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}, "kind": {"enum": ["x", "y"]}},
        "required": ["ok", "kind"],
        "additionalProperties": False,
    }
    answer = client.chat.completions.create(
        model="tiny",
        messages=HELLO,
        response_format={"type": "json_schema", "json_schema": {"name": "s", "schema": schema}},
        seed=1,
    )
    parsed = json.loads(answer.choices[0].message.content or "")
    assert isinstance(parsed["ok"], bool) and parsed["kind"] in ("x", "y")
    tool: Any = {"type": "function", "function": {"name": "f", "parameters": schema}}
    for stream in (False, True):
        body: Any = {"model": "tiny", "messages": HELLO, "tools": [tool], "tool_choice": "required", "seed": 1}
        body["parallel_tool_calls"] = False
        if stream:
            with client.chat.completions.stream(**body) as events:
                message: Any = events.get_final_completion().choices[0].message
        else:
            message = client.chat.completions.create(**body).choices[0].message
        (call,) = message.tool_calls
        assert call.function.name == "f" and json.loads(call.function.arguments)["kind"] in ("x", "y")
    chosen = client.completions.create(
        model="tiny", prompt="the", extra_body={"structured_outputs": {"choice": ["whale", "ship"]}}
    )
    assert chosen.choices[0].text in ("whale", "ship")
    with pytest.raises(openai.BadRequestError, match=r"regex|grammar"):
        client.completions.create(model="tiny", prompt="the", extra_body={"structured_outputs": {"regex": "(("}})


def test_n_answers_to_one_prompt_are_drawn_on_one_router_which_computes_the_prompt_once(
    real: RunningApi, client: openai.OpenAI
) -> None:
    engines = [router.engine for router in real.router.routers.values()]
    before = sum(engine.stats.num_prompt_tokens for engine in engines)
    body: Any = {"model": "tiny", "prompt": [7, *range(3, 100)], "max_tokens": 8, "extra_body": {"ignore_eos": True}}
    answer = client.completions.create(**body, n=3, seed=5)
    assert sum(engine.stats.num_prompt_tokens for engine in engines) - before == 98 + 2 * (98 - 96)
    alone = [client.completions.create(**body, seed=5 + i).choices[0].text for i in range(3)]
    assert [choice.text for choice in answer.choices] == alone


def test_who_gives_another_cache_salt_gets_nothing_of_the_prefix_cache(directory: Path) -> None:
    served = ServedModel.from_directory(directory, names=("tiny",))
    settings = Settings.model_validate({"mesh": {"token": "t"}})
    with running_api(served, settings, RealRouters(directory, "a")) as api:

        def num_cached(salt: str | None) -> int:
            body = {"prompt": [7, *range(3, 100)], "max_tokens": 1, "cache_salt": salt}
            answer = httpx.post(api.url + "/v1/completions", json=body, timeout=60).json()
            return int(answer["usage"]["prompt_tokens_details"]["cached_tokens"])

        assert [num_cached(salt) for salt in ("one", "two", None)] == [0, 0, 0]
        assert [num_cached(salt) for salt in ("one", "two", None)] == [96, 96, 96]


def test_a_stream_outlives_its_router_and_a_sampled_text_stays_the_same(
    real: RunningApi, client: openai.OpenAI
) -> None:
    body: Any = {"model": "tiny", "prompt": "the sea and the storm", "max_tokens": 1500, "seed": 11, "temperature": 1.0}
    body["extra_body"] = {"ignore_eos": True}
    whole = client.completions.create(**body).choices[0].text
    text, stopped = "", False
    for chunk in client.completions.create(**body, stream=True):
        text += chunk.choices[0].text
        if not stopped and len(text) > 20:
            busy = max(real.pool.links, key=lambda link: link.num_open)
            real.router.stop(busy.address.router_id)
            stopped = True
    assert stopped and real.pool.metrics.registry.get_sample_value("expertmesh_replays_total") == 1
    assert text == whole


@pytest.mark.parametrize("eos_token_id", [None, 2**70])
def test_a_model_without_an_end_token_is_served_and_refuses_structured_output(
    tmp_path: Path, eos_token_id: int | None
) -> None:
    directory = write_tiny_model(tmp_path / "tiny", eos_token_id=None)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "eos_token_id": eos_token_id}))
    (directory / "generation_config.json").unlink()
    (directory / "tokenizer_config.json").unlink()
    settings = Settings.model_validate({"mesh": {"token": "t"}})
    with running_api(ServedModel.from_directory(directory), settings, RealRouters(directory, "a")) as running:
        client = openai.OpenAI(base_url=running.url + "/v1", api_key="x", max_retries=0)
        answer = client.completions.create(model="tiny", prompt="the", max_tokens=3, extra_body={"min_tokens": 2})
        assert answer.choices[0].finish_reason == "length"
        with pytest.raises(openai.BadRequestError, match="no end-of-sequence token") as caught:
            client.completions.create(model="tiny", prompt="the", extra_body={"structured_outputs": {"regex": "a"}})
        assert caught.value.code == "invalid_grammar"


def test_structured_output_goes_by_the_tokenizer_of_the_settings(tmp_path: Path) -> None:
    directory, other = write_tiny_model(tmp_path / "tiny"), tmp_path / "other"
    other.mkdir()
    values = json.loads((directory / "tokenizer.json").read_text())
    vocab = values["model"]["vocab"]
    vocab["x"], vocab["y"] = vocab["y"], vocab["x"]
    (other / "tokenizer.json").write_text(json.dumps(values))
    settings = load(flags={"mesh.token": "t", "mesh.local": True, "model.tokenizer": str(other)}).settings
    served = ServedModel.from_directory(directory, tokenizer_directory=other)
    routers = RealRouters(directory, "a", tokenizer=specs.router_spec(settings).tokenizer)
    with running_api(served, settings, routers) as running:
        client = openai.OpenAI(base_url=running.url + "/v1", api_key="x", max_retries=0)
        body = {"structured_outputs": {"regex": "x{5}"}}
        assert client.completions.create(model="tiny", prompt="the", extra_body=body).choices[0].text == "xxxxx"


def test_a_text_ends_at_the_eos_token_of_the_tokenizer_too(tmp_path: Path) -> None:
    """Base and chat model differ in it, and a fine-tune's config.json may still name the base's."""
    directory = write_tiny_model(tmp_path / "tiny", eos_token_id=0)
    settings = Settings.model_validate({"mesh": {"token": "t"}})
    with running_api(ServedModel.from_directory(directory), settings, RealRouters(directory, "a")) as running:
        client = openai.OpenAI(base_url=running.url + "/v1", api_key="x", max_retries=0)
        for end in (0, 2):
            body = {"allowed_token_ids": [end], "skip_special_tokens": False}
            choice = client.completions.create(model="tiny", prompt="the", max_tokens=3, extra_body=body).choices[0]
            assert (choice.finish_reason, choice.text) == ("stop", "")
