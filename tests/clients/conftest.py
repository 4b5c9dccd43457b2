"""A running service for the clients, and an environment of its own for each client."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.conftest import Service, start_service
from tests.environments import environment
from tests.tiny import write_tiny_model

PROGRAMS = Path(__file__).parent / "programs"
MODEL = "tiny"


@pytest.fixture(scope="session")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("clients") / MODEL, max_position_embeddings=2048)


@pytest.fixture(scope="session")
def service(directory: Path) -> Iterator[Service]:
    with tempfile.TemporaryDirectory() as folder:
        running = start_service([str(directory), "--shards", "2"], Path(folder, "log"))
        yield running
        running.stop()


def python_for(program: Path) -> Path:
    """This Python, or one with the dependencies that the program's header names (PEP 723)."""
    header = re.search(r"^# /// script\n(.*?)^# ///$", program.read_text(), re.MULTILINE | re.DOTALL)
    if header is None:
        return Path(sys.executable)
    wanted = tomllib.loads(re.sub(r"^# ?", "", header[1], flags=re.MULTILINE))["dependencies"]
    return environment(program.stem, wanted)


@pytest.fixture
def run_client(service: Service, tmp_path: Path) -> Callable[..., str]:
    """run_client(program, *further arguments): its output. AssertionError with it when the program fails."""

    def run(name: str, *arguments: str) -> str:
        program = PROGRAMS / f"{name}.py"
        done = subprocess.run(
            [python_for(program), program, service.url, MODEL, *arguments],
            capture_output=True,
            text=True,
            timeout=300,
            cwd=tmp_path,
            env={**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True", "COLUMNS": "120"},
            check=False,
        )
        assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
        return done.stdout

    return run
