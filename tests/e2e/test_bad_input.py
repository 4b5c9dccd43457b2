"""What a person can get wrong before anything serves: one clear line, exit code 1, nothing left running."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


def serve(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "deploy.cli", "serve", *arguments],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "200"},
    )


def assert_refused(result: subprocess.CompletedProcess[str], *words: str) -> None:
    assert result.returncode == 1, result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, result.stderr
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in lines[0]


@pytest.fixture
def copied(served_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(served_model, tmp_path / "copy"))


def change_config(path: Path, **values: object) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **values}))


def test_a_directory_that_is_not_there():
    assert_refused(serve("/no/such/model"), "/no/such/model", "check the path")


def test_another_architecture(copied):
    change_config(copied, model_type="llama", architectures=["LlamaForCausalLM"])
    assert_refused(serve(str(copied)), "llama", "qwen2_moe")


def test_a_tokenizer_larger_than_the_vocabulary(copied):
    change_config(copied, vocab_size=200)
    assert_refused(serve(str(copied)), "tokenizer", "200")


def test_a_port_in_use(served_model):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert_refused(serve(str(served_model), "--port", str(port)), str(port), "--port")


def test_numbers_that_cannot_be(served_model):
    assert_refused(serve(str(served_model), "--shards", "99"), "shards=99")
    assert_refused(serve(str(served_model), "--shards", "2", "--replicas", "3"), "replicas=3")
    assert_refused(serve(str(served_model), "--transport", "pigeon"), "transport", "pigeon")


def test_an_unknown_setting_is_refused_with_the_nearest(served_model, tmp_path):
    (tmp_path / "mesh.yaml").write_text("mesh:\n  shrads: 3\n")
    assert_refused(serve(str(served_model), "--config", str(tmp_path / "mesh.yaml")), "shrads", "shards")


def test_a_truncated_weights_file(copied):
    weights = copied / "model.safetensors"
    os.truncate(weights, weights.stat().st_size - 1000)
    assert_refused(serve(str(copied)), "model.safetensors", "truncated")


def test_a_missing_weights_file(copied):
    (copied / "model.safetensors").unlink()
    assert_refused(serve(str(copied)), "model.safetensors")
