"""POST /mesh/scale, and the page that draws the mesh, seen by a real browser."""

from __future__ import annotations

import random
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI
from fastapi.testclient import TestClient

from cluster.balance import balancedness
from cluster.placement import spread_evenly
from deploy import mesh_endpoints
from deploy.errors import ApiError
from deploy.settings import LimitSettings
from deploy.sse import error_answer
from deploy.supervisors import Supervisors
from tests.waiting import wait_until

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((path for name in BROWSERS if (path := shutil.which(name))), None)


def sample_mesh() -> dict[str, Any]:
    """Four shards, 12 layers of 32 experts, a few hot ones copied, one just moved, one shard silent."""
    dice = random.Random(3)
    ids = [f"shard-{i}" for i in range(4)]
    placement = spread_evenly(moe_layers=range(12), num_experts=32, nodes={s: s for s in ids[:3]})
    loads = {i: [round(dice.lognormvariate(5, 0.8)) for _ in range(32)] for i in range(12)}
    hot = [(i, max(range(32), key=lambda e: loads[i][e])) for i in range(0, 12, 3)]
    placement = placement.adding(
        {"shard-2": [key for key in hot if "shard-2" not in placement.holders[key[0]][key[1]]]}
    )
    counts = placement.slot_counts()
    states = ["serving", "serving", "serving", "silent"]
    return {
        "epoch": 17,
        "reason": "rebalanced: 2 moves",
        "complete": True,
        "settled": False,
        "trouble": "",
        "shards": [
            {"shard_id": s, "state": state, "num_slots": counts[s], "weight_bytes": 31_000_000}
            for s, state in zip(ids, states, strict=True)
        ],
        "routers": [
            {"router_id": "router-x7", "host": "127.0.0.1", "running": 16, "waiting": 0, "kv_usage": 0.31, "epoch": 17}
        ],
        "placement": placement.to_dict(),
        "window_s": 120,
        "expert_load": {str(i): counts for i, counts in loads.items()},
        "shard_load": {s: 9000 * counts[s] for s in ids},
        "balancedness": balancedness(placement, loads),
        "pressure": {"busy": 0.42, "wait": 0.2},
        "last_moves": [{"layer": 0, "expert": hot[0][1], "to": "shard-2", "from": None}],
        "history": [
            {
                "epoch": 16,
                "time": 1.79e9,
                "reason": "lost shard-3: connection closed",
                "decided_in_ms": 21.4,
            },
            {"epoch": 17, "time": 1.79e9 + 40, "reason": "rebalanced: 2 moves", "decided_in_ms": None},
        ],
    }


class Supervisor:
    """A supervisor's handle over a mesh with room for eight shards; `asked` is what it was scaled to."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.mesh = SimpleNamespace(remote=self._mesh)
        self.scale = SimpleNamespace(remote=self._scale)

    async def _mesh(self) -> dict[str, Any]:
        return sample_mesh()

    async def _scale(self, number: int) -> dict[str, Any]:
        if number > 8:
            raise ValueError(f"shards={number} must lie between 1 and 8")
        self.asked.append(number)
        return {"target_shards": number}


async def no_figures(name: str, *, timeout_s: float) -> dict[str, Any]:
    return {}


def api_with(**supervisors: Supervisor) -> FastAPI:
    """By model; each mesh is named after its model."""
    api = FastAPI()
    settings = SimpleNamespace(limits=LimitSettings())
    meshes = Supervisors({name: [name, name + "-alias"] for name in supervisors}, supervisors.__getitem__)
    service: Any = SimpleNamespace(settings=settings, pool=SimpleNamespace(command=no_figures))
    mesh_endpoints.add_to(api, service, meshes if supervisors else None)
    api.add_exception_handler(ApiError, lambda request, error: error_answer(error, request.url.path))
    return api


def test_scaling_passes_the_number_on_and_answers_at_once():
    only = Supervisor()
    answer = TestClient(api_with(only=only)).post("/mesh/scale", json={"shards": 3})
    assert (answer.status_code, answer.json(), only.asked) == (202, {"mesh": "only", "target_shards": 3}, [3])


@pytest.mark.parametrize("body", [{}, {"shards": "3"}, {"shards": True}, {"shards": 1.5}, [3]])
def test_scaling_wants_a_whole_number(body):
    answer = TestClient(api_with()).post("/mesh/scale", json=body)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "shards"


def test_a_number_that_can_not_be_is_refused_with_its_reason_and_without_a_mesh_there_is_nothing_to_scale():
    answer = TestClient(api_with(only=Supervisor())).post("/mesh/scale", json={"shards": 99})
    assert answer.status_code == 400 and "between 1 and 8" in answer.json()["error"]["message"]
    answer = TestClient(api_with()).post("/mesh/scale", json={"shards": 2})
    assert answer.status_code == 503 and answer.json()["error"]["code"] == "no_mesh"


def test_of_several_meshes_one_is_scaled_or_shown_by_a_name_of_its_model():
    one, two = Supervisor(), Supervisor()
    client = TestClient(api_with(one=one, two=two))
    unclear = client.post("/mesh/scale", json={"shards": 3})
    assert unclear.status_code == 400 and "one, two" in unclear.json()["error"]["message"]
    assert client.post("/mesh/scale", json={"shards": 3, "model": "two-alias"}).json()["mesh"] == "two"
    assert client.post("/mesh/scale", json={"shards": 4, "model": "three"}).status_code == 404
    assert client.post("/mesh/scale", json={"shards": 4, "model": 2}).json()["error"]["param"] == "model"
    assert (one.asked, two.asked) == ([], [3])
    assert list(client.get("/mesh").json()["further_meshes"]) == ["two"]
    only = client.get("/mesh?model=two").json()
    assert only["mesh"] == "two" and only["models"] == ["two", "two-alias"] and "further_meshes" not in only
    assert client.get("/mesh?model=three").status_code == 404


def test_the_page_asks_for_nothing_from_elsewhere():
    answer = TestClient(api_with(only=Supervisor())).get("/mesh/view")
    page = answer.text
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert "http://" not in page and "https://" not in page and "<script src" not in page and "<link" not in page


@pytest.fixture
def site() -> Iterator[str]:
    server = uvicorn.Server(uvicorn.Config(api_with(only=Supervisor()), host="127.0.0.1", port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_until(lambda: server.started)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join(5)


def browse(url: str, tmp_path: Path, *options: str) -> str:
    """Headless Chromium with a profile of its own; returns what it printed."""
    assert CHROMIUM is not None
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--hide-scrollbars",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--window-size=1280,1180",
        "--virtual-time-budget=2500",
        *options,
        url,
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=90, check=True).stdout


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed (apt-get install chromium)")
def test_a_browser_draws_the_mesh(site, tmp_path):
    page = browse(f"{site}/mesh/view", tmp_path, "--dump-dom")
    assert page.count('class="shard"') == 3 and page.count('class="shard away"') == 1
    assert "rebalanced: 2 moves" in page and "router-x7" in page
    assert ">17<" in page.replace(" ", "")
    picture = tmp_path / "mesh.png"
    browse(f"{site}/mesh/view", tmp_path, f"--screenshot={picture}")
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert picture.stat().st_size > 30_000, "the page is blank"
