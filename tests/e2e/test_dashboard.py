"""A Prometheus over a live service answers every query of the Grafana dashboard."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.conftest import ROOT, Service
from tests.ports import free_port
from tests.waiting import wait_until

QUIET = {"changes(expertmesh_epoch[1m]) > 0"}  # an annotation: nothing where nothing happened


@pytest.fixture
def prometheus(service: Service, tmp_path: Path) -> Iterator[str]:
    if (program := shutil.which("prometheus")) is None:
        pytest.skip("no prometheus here (Debian: prometheus)")
    target = service.url.removeprefix("http://")
    config = {"scrape_configs": [{"job_name": "expertmesh", "static_configs": [{"targets": [target]}]}]}
    (tmp_path / "prometheus.json").write_text(json.dumps({"global": {"scrape_interval": "1s"}, **config}))
    address = f"127.0.0.1:{free_port()}"
    paths = [f"--config.file={tmp_path}/prometheus.json", f"--storage.tsdb.path={tmp_path}/data"]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen([program, *paths, f"--web.listen-address={address}"], stdout=log, stderr=log)
    try:
        yield f"http://{address}"
        process.terminate()
        process.wait(timeout=20)
    finally:
        process.kill()


def ask(prometheus: str, query: str) -> Any:
    query = query.replace("$job", ".*").replace("$__rate_interval", "10s")
    answer = httpx.get(f"{prometheus}/api/v1/query", params={"query": query}, timeout=10).json()
    assert answer["status"] == "success", f"{query}: {answer.get('error')}"
    return answer["data"]["result"]


def has_scraped_twice(prometheus: str) -> bool:
    try:
        httpx.get(f"{prometheus}/-/ready", timeout=10).raise_for_status()  # it listens before it can answer queries
        return bool(ask(prometheus, "rate(expertmesh_steps_total[10s]) > 0"))
    except httpx.HTTPError:
        return False


def test_every_query_of_the_dashboard_has_an_answer(service: Service, prometheus: str) -> None:
    def worked() -> bool:
        service.complete([5, 6, 7], 8)
        return has_scraped_twice(prometheus)

    wait_until(worked)
    dashboard = json.loads((ROOT / "deploy/grafana/expertmesh.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    queries += [one["expr"] for one in dashboard["annotations"]["list"]]
    assert [query for query in queries if not ask(prometheus, query) and query not in QUIET] == []
    (rate,) = ask(prometheus, queries[0])
    assert "generation_tokens" in queries[0] and float(rate["value"][1]) > 0
