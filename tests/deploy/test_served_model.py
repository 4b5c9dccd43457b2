from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from deploy.cli import EXAMPLES
from deploy.errors import InvalidRequest, ModelNotFound
from deploy.generation_plan import Asked, plan_requests
from deploy.openai_requests import CompletionRequest, parse
from deploy.served_model import TASKS, ModelList, ServedModel
from deploy.settings import LimitSettings


@pytest.fixture
def directory(model_dir: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "copy"
    shutil.copytree(model_dir, copy)
    return copy


def test_sampling_defaults_come_from_generation_config_and_requests_override_them(directory: Path) -> None:
    defaults = {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.05, "max_new_tokens": 9}
    (directory / "generation_config.json").write_text(
        json.dumps({**defaults, "do_sample": True, "eos_token_id": [2, 0]})
    )
    model = ServedModel.from_directory(directory)
    assert model.names == ("copy",) and model.eos_token_ids == (2, 0)

    def sampling(**fields: object) -> dict[str, object]:
        body = parse({"prompt": "x", **fields}, CompletionRequest)
        (one,) = plan_requests(body, model, [[5]], Asked(max_tokens=body.max_tokens), LimitSettings(), 0.0)
        return dict(one.sampling)

    given = sampling(max_tokens=None)
    assert {name: given[name] for name in ("temperature", "top_k", "top_p", "repetition_penalty")} == {
        name: defaults[name] for name in ("temperature", "top_k", "top_p", "repetition_penalty")
    }
    assert given["max_tokens"] == 9
    other = sampling(temperature=0, top_k=-1, top_p=1, repetition_penalty=1, max_tokens=20)
    assert other == {"temperature": 0.0, "max_tokens": 20, "seed": other["seed"]}
    plain = ServedModel.from_directory(directory, use_generation_config=False)
    assert plain.sampling_defaults == {}


@pytest.mark.parametrize(
    ("values", "named"),
    [({"temperature": "hot"}, "temperature"), ({"top_k": "x"}, "top_k"), ({"top_p": 2}, "top_p"), ([], "list")],
)
def test_broken_sampling_defaults_are_refused_when_the_model_is_read(
    directory: Path, values: object, named: str
) -> None:
    (directory / "generation_config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=rf"generation_config\.json.*{named}"):
        ServedModel.from_directory(directory)


def test_a_longer_context_than_the_model_has_is_refused(directory: Path) -> None:
    assert ServedModel.from_directory(directory, max_model_len=100).max_model_len == 100
    with pytest.raises(ValueError, match=r"max_model_len = 1000 exceeds the 512"):
        ServedModel.from_directory(directory, max_model_len=1000)


def test_models_are_found_by_each_of_their_names(directory: Path) -> None:
    one = ServedModel.from_directory(directory, names=["a", "b"])
    config = json.loads((directory / "config.json").read_text())
    config["architectures"] = ["Qwen2MoeForSequenceClassification"]
    (directory / "config.json").write_text(json.dumps(config))
    two = ServedModel.from_directory(directory, names=["c"])
    models = ModelList([one, two])
    assert models.find("b") is one and models.find(None) is one and models.find("c") is two
    with pytest.raises(ModelNotFound, match="'d' does not exist; there are: a, b, c"):
        models.find("d")
    with pytest.raises(InvalidRequest, match="not for writing text"):
        models.find_generator("c")
    with pytest.raises(ValueError, match="two models are served as 'a'"):
        ModelList([one, one])


def test_every_kind_of_model_has_an_example_to_try() -> None:
    assert {task.endpoints[0] for task in TASKS.values()} == EXAMPLES.keys()
