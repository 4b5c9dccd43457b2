"""The service as a person starts it: `expertmesh serve` in a process of its own, over a tiny model."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from actors.processes import Process, descendants
from tests.tiny import write_tiny_model

ROOT = Path(__file__).parent.parent.parent
START_S = 180.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


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
        """Ctrl-C, as at a terminal; remembers the processes so that a test can look for leftovers."""
        self.below = descendants(self.process.pid)
        self.process.send_signal(signal.SIGINT)
        self.process.wait(timeout=60)


def start_service(arguments: list[str], log: Path) -> Service:
    """Start and wait until it is ready. Raises AssertionError with its log when it is not."""
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
    end = time.monotonic() + START_S
    while time.monotonic() < end and process.poll() is None:
        if f" at {service.url}  (" in log.read_text(errors="replace"):
            return service
        time.sleep(0.1)
    process.kill()
    raise AssertionError(f"the service did not start:\n{log.read_text(errors='replace')[-3000:]}")


@pytest.fixture(scope="session")
def served_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("served") / "tiny")


@pytest.fixture(scope="session")
def service(served_model: Path) -> Iterator[Service]:
    """Two shards, one router, shared by the tests of this folder."""
    with tempfile.TemporaryDirectory() as folder:
        running = start_service([str(served_model), "--shards", "2"], Path(folder, "log"))
        yield running
        if running.process.poll() is None:
            running.stop()


def wait_until(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "the condition did not come true in time"
        time.sleep(0.05)
