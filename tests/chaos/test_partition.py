"""Packets dropped between hosts: no connection closes, nobody says goodbye, and still no stream is lost."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.chaos.load import Load
from tests.e2e import hosts as network
from tests.tiny import write_tiny_model

REASON = network.missing()


def wait_for(url: str, condition: Any, timeout_s: float = 60.0) -> dict[str, Any]:
    end = time.monotonic() + timeout_s
    while True:
        try:
            mesh = httpx.get(f"{url}/mesh", timeout=5).json()
            if condition(mesh):
                return dict(mesh)
        except httpx.HTTPError:
            mesh = {}
        assert time.monotonic() < end, f"it did not come true: {mesh.get('history')}"
        time.sleep(0.1)


@pytest.mark.chaos
@pytest.mark.timeout(300)
@pytest.mark.skipif(REASON is not None, reason=REASON or "")
def test_a_host_that_is_cut_off_costs_a_pause_and_may_come_back(tmp_path: Path):
    os.environ.setdefault("RAY_AUTH_TOKEN", "a-token-for-the-hosts")
    model = write_tiny_model(tmp_path / "tiny")
    with network.hosts(4) as everyone, network.ray_on(everyone):
        flags = {"mesh.shards": 3, "mesh.spread": "strict", "mesh.shard_cpus": 0, "mesh.replicas": 2}
        url = network.deploy(everyone[0], **{"model.path": str(model), "mesh.shard_resources": {"expert": 1}, **flags})
        load = Load(url, "tiny", num_streams=8)
        load.learn()
        load.start()
        time.sleep(2.0)
        host = everyone[random.Random(5).randint(1, 3)]
        began = time.monotonic()
        host.unplug()
        wait_for(url, lambda mesh: len([s for s in mesh["shards"] if s["state"] == "serving"]) == 2)
        time.sleep(1.0)
        stall_s = load.longest_gap_s(began, time.monotonic())
        host.plug()
        mesh = wait_for(url, lambda mesh: mesh["settled"] and len(mesh["shards"]) == 3)
        load.stop()
        print(f"\npartition: longest gap {stall_s:.2f} s")
        for change in mesh["history"]:
            print(f"    {change['decided_in_ms'] or 0:8.1f} ms  {change['reason'][:140]}")
        assert load.wrong == [] and load.num_sent == load.num_finished > 0
        assert stall_s < 10.0
