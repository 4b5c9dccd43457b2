"""Packets dropped between hosts: no connection closes, nobody says goodbye, and still no stream is lost."""

from __future__ import annotations

import os
import random
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.chaos.faults import summary
from tests.chaos.load import Load
from tests.e2e import hosts as network
from tests.tiny import write_tiny_model

REASON = network.missing()


def wait_for(url: str, condition: Any, timeout_s: float = 90.0) -> dict[str, Any]:
    end = time.monotonic() + timeout_s
    while True:
        try:
            mesh = httpx.get(f"{url}/mesh", timeout=5).json()
            if condition(mesh):
                return dict(mesh)
        except httpx.HTTPError:
            mesh = {}
        assert time.monotonic() < end, f"it did not come true: {mesh and summary(mesh)}"
        time.sleep(0.1)


def patiently(deploy: Callable[[], str], attempts: int = 3) -> str:
    """The head may not be ready for a driver yet."""
    for _ in range(attempts - 1):
        try:
            return deploy()
        except subprocess.CalledProcessError:
            time.sleep(3.0)
    return deploy()


@pytest.mark.chaos
@pytest.mark.timeout(300)
@pytest.mark.skipif(REASON is not None, reason=REASON or "")
def test_a_host_that_is_cut_off_costs_a_pause_and_may_come_back(tmp_path: Path):
    os.environ.setdefault("RAY_AUTH_TOKEN", "a-token-for-the-hosts")
    model = write_tiny_model(tmp_path / "tiny")
    with network.hosts(4) as everyone, network.ray_on(everyone):
        flags: dict[str, Any] = {"mesh.shards": 3, "mesh.spread": "strict", "mesh.shard_cpus": 0, "mesh.replicas": 2}
        flags |= {"model.path": str(model), "mesh.shard_resources": {"expert": 1}}
        url = patiently(lambda: network.deploy(everyone[0], **flags))
        wait_for(url, lambda mesh: mesh["settled"])
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
