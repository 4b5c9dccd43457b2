from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deploy.served_model import ServedModel
from tests.deploy.fakes import CHAT_TEMPLATE, CONFIG, RunningApi, byte_level_tokenizer, running_api
from tests.deploy.openai_document import find_document


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "tiny"
    directory.mkdir()
    byte_level_tokenizer().save(str(directory / "tokenizer.json"))
    special = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "chat_template": CHAT_TEMPLATE}
    (directory / "tokenizer_config.json").write_text(json.dumps(special))
    (directory / "config.json").write_text(json.dumps(CONFIG))
    return directory


@pytest.fixture(scope="session")
def served(model_dir: Path) -> ServedModel:
    return ServedModel.from_directory(model_dir, names=("tiny", "tiny-alias"))


@pytest.fixture(scope="module")
def api(served: ServedModel) -> Iterator[RunningApi]:
    with running_api(served) as running:
        yield running


@pytest.fixture(scope="session")
def openai_document() -> dict[str, Any]:
    document = find_document()
    if document is None:
        pytest.skip("EXPERTMESH_OPENAI_SPEC names no copy of OpenAI's openapi.yaml")
    return document
