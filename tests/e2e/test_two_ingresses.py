"""`serve --local` with two ingresses in front: limits hold for both together, and there is no shard."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from tests.e2e.conftest import LONG, Service, start_service

AT_ONCE, PER_MINUTE = 3, 12


@pytest.fixture(scope="module")
def limited(served_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    settings = {
        "EXPERTMESH_SERVER__NUM_INGRESSES": "2",
        "EXPERTMESH_LIMITS__MAX_REQUESTS_PER_KEY": str(AT_ONCE),
        "EXPERTMESH_LIMITS__REQUESTS_PER_MINUTE_PER_KEY": str(PER_MINUTE),
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        running = start_service([str(served_model), "--local"], tmp_path_factory.mktemp("limited") / "log")
    yield running
    running.stop()


def ask(service: Service) -> str:
    """ "done", or which of the limits refused it."""
    answer = httpx.post(service.url + "/v1/completions", json={"prompt": [5, 6, 7], "max_tokens": 1}, timeout=60)
    if answer.status_code == 200:
        return "done"
    assert answer.status_code == 429 and "retry-after" in answer.headers
    message = str(answer.json()["error"]["message"])
    return "at once" if "in flight" in message else "a minute" if "a minute" in message else message


def ask_in_turn(service: Service) -> str:
    """An earlier request gives its place back a little after its answer."""
    while (became := ask(service)) == "at once":
        time.sleep(0.02)
    return became


def test_a_key_has_its_requests_at_once_and_a_minute_over_both_ingresses_together(limited: Service) -> None:
    began = time.monotonic()
    mesh = limited.get("/mesh")
    assert mesh["shards"] == [] and len(mesh["routers"]) == 1
    long = {"prompt": [5, 6, 7], "max_tokens": LONG, "ignore_eos": True, "stream": True}
    with ExitStack() as clients, ThreadPoolExecutor(7) as pool:
        for _ in range(AT_ONCE):
            answer = clients.enter_context(httpx.stream("POST", limited.url + "/v1/completions", json=long, timeout=60))
            assert answer.status_code == 200
        assert list(pool.map(lambda _: ask(limited), range(7))) == ["at once"] * 7
    # One went for the request that `serve` makes itself; the refused ones don't count.
    left = PER_MINUTE - 1 - AT_ONCE
    assert [ask_in_turn(limited) for _ in range(left)] == ["done"] * left
    more = Counter(ask_in_turn(limited) for _ in range(2 * PER_MINUTE))
    at_most = 1 + (time.monotonic() - began) * PER_MINUTE / 60  # what time has given since
    assert more["done"] <= at_most and more["done"] + more["a minute"] == 2 * PER_MINUTE
