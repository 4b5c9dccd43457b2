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
from tests.tiny import write_tiny_model

ENVIRONMENTS = Path(sys.prefix) / "clients"
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


def environment(program: Path) -> Path:
    """The Python to run a program with: this one, or one with the dependencies that its header names (PEP 723)."""
    header = re.search(r"^# /// script\n(.*?)^# ///$", program.read_text(), re.MULTILINE | re.DOTALL)
    if header is None:
        return Path(sys.executable)
    wanted = tomllib.loads(re.sub(r"^# ?", "", header[1], flags=re.MULTILINE))["dependencies"]
    folder = ENVIRONMENTS / program.stem
    stamp = folder / ".installed"
    if not stamp.exists() or stamp.read_text().splitlines() != wanted:
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        subprocess.run([folder / "bin" / "python", "-m", "pip", "install", "--quiet", *wanted], check=True)
        stamp.write_text("\n".join(wanted))
    return folder / "bin" / "python"


@pytest.fixture
def run_client(service: Service, tmp_path: Path) -> Callable[..., str]:
    """run_client(program, *further arguments): its output. AssertionError with it when the program fails."""

    def run(name: str, *arguments: str) -> str:
        program = PROGRAMS / f"{name}.py"
        done = subprocess.run(
            [environment(program), program, service.url, MODEL, *arguments],
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
