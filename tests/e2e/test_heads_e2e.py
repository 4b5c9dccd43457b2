"""Four heads over one mesh of two shards, and a second backbone with a mesh of its own, behind one address."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from huggingface_hub import InferenceClient

from tests.deploy.tiny_heads import TinyHeads, write_tiny_heads
from tests.e2e.conftest import Service, start_service
from tests.tiny import load_oracle, oracle_greedy, write_tiny_model

TEXT = "Zoe\u0308 🙂 saw the whale."


@pytest.fixture(scope="module")
def heads(tmp_path_factory: pytest.TempPathFactory) -> TinyHeads:
    return write_tiny_heads(tmp_path_factory.mktemp("heads"))


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("other") / "other", seed=3, num_experts=6)


@pytest.fixture(scope="module")
def both(heads: TinyHeads, other: Path) -> Iterator[Service]:
    folders = {name: str(heads.directory / name) for name in ("topics", "entities", "answers")}
    settings = {
        "models": [{"path": str(heads.directory / "model"), "heads": folders}, {"path": str(other)}],
        "mesh": {"shards": 2},
    }
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "settings.yaml")
        file.write_text(yaml.safe_dump(settings))
        running = start_service(["--config", str(file)], Path(folder, "log"))
        yield running
        running.stop()


def test_all_heads_are_served_by_one_mesh_as_transformers_computes_them(both: Service, heads: TinyHeads) -> None:
    ids = heads.tokenizer(TEXT)["input_ids"]
    probs = both.post("/classify", {"model": "topics", "input": TEXT})["data"][0]["probs"]
    assert probs == pytest.approx(heads.outputs("topics", ids).softmax(-1).tolist(), abs=1e-4)
    rows = both.post("/pooling", {"model": "entities", "input": TEXT})["data"][0]["data"]
    expected = heads.outputs("entities", ids).softmax(-1)
    assert torch.allclose(torch.tensor(rows), expected, atol=1e-4)
    answer = InferenceClient(model=f"{both.url}/hf/question-answering").question_answering("Who?", TEXT)
    assert not isinstance(answer, list) and TEXT[answer.start : answer.end] == answer.answer
    assert both.complete(ids, 8, model="model") == oracle_greedy(heads.oracles["tiny"], ids, 8)


def test_a_classifier_is_served_alone_and_says_what_to_try(tmp_path: Path) -> None:
    architecture = "Qwen2MoeForSequenceClassification"
    folder = write_tiny_model(tmp_path / "judge", architectures=[architecture], num_labels=3, pad_token_id=0)
    running = start_service([str(folder), "--local"], tmp_path / "log")
    try:
        ids = running.post("/tokenize", {"prompt": TEXT})["tokens"]
        oracle = getattr(transformers, architecture).from_pretrained(folder, dtype=torch.float32).eval()
        with torch.no_grad():
            expected = oracle(torch.tensor([ids])).logits[0].softmax(-1)
        assert running.post("/classify", {"input": TEXT})["data"][0]["probs"] == pytest.approx(
            expected.tolist(), abs=1e-4
        )
        log = running.log.read_text()
        (body,) = (line.split("-d '")[1].rstrip("'") for line in log.splitlines() if "-d '" in line)
        assert f"curl {running.url}/classify" in log and "ready after" in log
        assert running.post("/classify", json.loads(body))["data"], "what it says to try works as it stands"
    finally:
        running.stop()


def test_a_second_backbone_has_a_mesh_of_its_own(both: Service, other: Path) -> None:
    cards = {card["id"]: card["task"] for card in both.get("/v1/models")["data"]}
    assert set(cards) == {"model", "topics", "entities", "answers", "other"}
    mesh = both.get("/mesh")
    assert len(mesh["shards"]) == 2 and len(mesh["further_meshes"]["default-2"]["shards"]) == 2
    prompt = [40, 50, 60, 70]
    assert both.complete(prompt, 12, model="other") == oracle_greedy(load_oracle(other), prompt, 12)
    assert both.complete(prompt, 12, model="model") != both.complete(prompt, 12, model="other")
