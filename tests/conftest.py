"""The environment of tests: Ray with token authentication, a token of its own and no usage reports; torch as where the
service computes, or on some CPUs MKL's rows differ with the batch."""

from __future__ import annotations

import os
import secrets

os.environ["RAY_AUTH_MODE"] = "token"
os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"


def pytest_configure() -> None:
    from actors.ray_shards import worker_environment

    os.environ.update(worker_environment(1))
