"""`serve --local` with two ingresses in front: limits hold for both together, and there is no shard."""

from __future__ import annotations

import time
import urllib.error
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.e2e.conftest import Service, start_service, wait_until

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


def status_of(service: Service, count: int) -> int:
    try:
        service.complete([5, 6, 7], count)
    except urllib.error.HTTPError as refused:
        return refused.code if "retry-after" in refused.headers else 0
    return 200


def test_a_key_has_its_requests_at_once_and_a_minute_over_both_ingresses_together(limited: Service) -> None:
    began = time.monotonic()
    mesh = limited.get("/mesh")
    assert mesh["shards"] == [] and len(mesh["routers"]) == 1
    with ThreadPoolExecutor(10) as pool:
        answers = Counter(pool.map(lambda _: status_of(limited, 400), range(10)))
    assert answers == {200: AT_ONCE, 429: 10 - AT_ONCE}
    wait_until(lambda: limited.get("/mesh")["routers"][0]["running"] == 0)
    answers = Counter(status_of(limited, 1) for _ in range(30))
    # One went for the request that `serve` makes itself; the refused ones don't count.
    left = PER_MINUTE - 1 - AT_ONCE + (time.monotonic() - began) * PER_MINUTE / 60
    assert left - 2 <= answers[200] <= left + 1 and answers[200] + answers[429] == 30
