"""schemathesis over the service's own OpenAPI document: whatever it sends, no server error and no hang."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path

import pytest

from tests.e2e.conftest import start_service
from tests.environments import environment
from tests.tiny import write_tiny_model

LEAST = 5000
CHANGES_THE_MESH = "^/(scale|mesh/)"


@pytest.mark.fuzz
@pytest.mark.timeout(3600)
def test_generated_requests_bring_no_server_error_and_no_hang(tmp_path):
    python = environment("schemathesis", ["schemathesis>=4,<5"])
    # A short context: a generated chat may ask for as many tokens as there are.
    model = write_tiny_model(tmp_path / "tiny", max_position_embeddings=256)
    with tempfile.TemporaryDirectory() as folder:
        service = start_service([str(model), "--shards", "2"], Path(folder, "log"))
        try:
            # One worker: with threads ast.parse fails now and then (CPython gh-106905, in 3.11).
            options = ["--phases", "coverage,fuzzing", "-n", "200", "-w", "1", "--seed", "1"]
            options += ["--no-shrink", "--continue-on-failure", "--no-color"]
            options += ["--checks", "not_a_server_error", "--request-timeout", "60", "--suppress-health-check", "all"]
            options += ["--exclude-path-regex", CHANGES_THE_MESH]
            command = [python.parent / "schemathesis", "run", service.url + "/openapi.json", *options]
            done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=3000, check=False)
            assert done.returncode == 0, done.stdout[-5000:]
            assert service.complete([5, 6, 7], 4)
        finally:
            service.stop()
    print(done.stdout[-700:])
    found = re.search(r"(\d+) generated, (\d+) passed", done.stdout)
    assert found is not None and int(found[1]) >= LEAST and found[1] == found[2]
