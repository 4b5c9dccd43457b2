"""The service as a person starts it: `expertmesh serve` in a process of its own, over a tiny model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from actors.processes import Process, descendants, end
from tests.ports import free_port
from tests.tiny import write_tiny_model

ROOT = Path(__file__).parent.parent.parent
START_S = 180.0
CONTEXT = 4096
LONG = CONTEXT - 100  # tokens: whoever does something while they are drawn has many seconds for it


@dataclass
class Service:
    """A running service and its processes."""

    process: subprocess.Popen[bytes]
    url: str
    log: Path
    below: list[Process] = field(default_factory=list)

    def text(self, path: str) -> str:
        with urllib.request.urlopen(self.url + path, timeout=30) as answer:
            return str(answer.read().decode())

    def get(self, path: str) -> Any:
        return json.loads(self.text(path))

    def post(self, path: str, body: dict[str, Any], timeout_s: float = 120.0) -> Any:
        data = json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=timeout_s) as answer:
            return json.load(answer)

    def complete(self, prompt: list[int] | str, count: int, **options: Any) -> list[int]:
        """Token ids of a completion; greedy and to the full count unless told otherwise."""
        body = {"prompt": prompt, "max_tokens": count, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
        return list(self.post("/v1/completions", {**body, **options})["choices"][0]["token_ids"])

    def stop(self) -> None:
        """Ctrl-C, as at a terminal; remembers the processes so that a test can look for leftovers. Raises
        TimeoutExpired where that takes too long, and then leaves none."""
        self.below = descendants(self.process.pid)
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            kill_all(self.process)
            raise


def kill_all(process: subprocess.Popen[bytes]) -> None:
    """Also what it has started."""
    below = descendants(process.pid)
    process.kill()
    process.wait()
    end(below, grace_s=0.0)


def start_service(arguments: list[str], log: Path) -> Service:
    """Start and wait until it is ready. Raises AssertionError with its log when it is not, and leaves nothing."""
    port = free_port()
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "deploy.cli", "serve", *arguments, "--port", str(port)],
            stdout=output,
            stderr=output,
            cwd=ROOT,
            env={**os.environ, "COLUMNS": "200"},
        )
    service = Service(process, f"http://127.0.0.1:{port}", log)
    deadline = time.monotonic() + START_S
    try:
        while f" at {service.url}  (" not in (said := log.read_text(errors="replace")):
            assert process.poll() is None and time.monotonic() < deadline, f"it did not start:\n{said[-3000:]}"
            time.sleep(0.1)
    except BaseException:
        kill_all(process)
        raise
    return service


@pytest.fixture(scope="session")
def served_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("served") / "tiny", max_position_embeddings=CONTEXT)


@pytest.fixture(scope="session")
def service(served_model: Path) -> Iterator[Service]:
    """Two shards, one router, shared by the tests of this folder."""
    with tempfile.TemporaryDirectory() as folder:
        running = start_service([str(served_model), "--shards", "2"], Path(folder, "log"))
        yield running
        if running.process.poll() is None:
            running.stop()
