"""The environment of tests: Ray with token authentication, a token of its own and no usage reports; torch as where the
service computes, or on some CPUs MKL's rows differ with the batch."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest

os.environ["RAY_AUTH_MODE"] = "token"
os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"


def pytest_configure() -> None:
    from actors.ray_shards import worker_environment

    os.environ.update(worker_environment(1))


@pytest.fixture
def make_hosts() -> Callable[[int], AbstractContextManager[list[Any]]]:
    """`tests.e2e.hosts.hosts`, where network namespaces are allowed; elsewhere the test is skipped."""
    from tests.e2e import hosts

    if (reason := hosts.missing()) is not None:
        pytest.skip(reason)
    return hosts.hosts
