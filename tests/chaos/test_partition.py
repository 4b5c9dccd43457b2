"""Hosts that are cut off or die: no connection closes, nobody says goodbye, and still no stream is lost."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from actors.processes import descendants, end
from tests.chaos import table
from tests.chaos.configurations import MODEL, NUM_FAULTS, SEED, Configuration, Outcome
from tests.chaos.faults import send, summary
from tests.chaos.load import Load
from tests.e2e import hosts as network

HOSTS = Configuration(
    name="hosts",
    words="",
    mesh={
        "mesh.shards": 3,
        "mesh.replicas": 2,
        "mesh.spread": "strict",
        "mesh.shard_cpus": 0,
        "server.ingress_cpus": 1,  # so it is on the head: with it a host takes its clients' connections
    },
    faults={"partition": 10, "kill_node": 3},
)


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


def is_whole(mesh: dict[str, Any]) -> bool:
    return bool(mesh["settled"]) and len(mesh["shards"]) == 3


def is_without(host: network.Host) -> Callable[[dict[str, Any]], bool]:
    return lambda mesh: all(s["host"] != host.address for s in mesh["shards"] if s["state"] == "serving")


def cut_off(url: str, host: network.Host) -> None:
    """Until everybody noticed, and a while longer; then it is back, with all its processes."""
    host.unplug()
    wait_for(url, is_without(host))
    time.sleep(1.0)
    host.plug()
    wait_for(url, is_whole)


def lose(url: str, host: network.Host, begin: Callable[[network.Host], None]) -> None:
    """No packet and no process any more; later it begins anew."""
    host.unplug()
    pids = subprocess.run(["ip", "netns", "pids", host.name], capture_output=True, text=True, check=True).stdout
    for pid in pids.split():
        send(int(pid), signal.SIGKILL)
    wait_for(url, is_without(host))
    time.sleep(1.0)
    host.plug()
    begin(host)
    wait_for(url, is_whole, 150.0)


@contextlib.contextmanager
def beginner(head: network.Host) -> Iterator[Callable[[network.Host], None]]:
    """begin(host): `ray start` there again, as when a machine comes up."""
    started: list[subprocess.Popen[bytes]] = []
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0"}

    def begin(host: network.Host) -> None:
        joining = [f"--address={head.address}:6379", f"--node-ip-address={host.address}", "--num-cpus=0"]
        command = host.command(
            str(Path(sys.executable).parent / "ray"), "start", *joining, '--resources={"expert": 1}', "--block"
        )
        started.append(subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))

    try:
        yield begin
    finally:
        below = [process for p in started for process in descendants(p.pid)]
        for process in started:
            process.kill()
            process.wait()
        end(below, grace_s=0.0)


@pytest.mark.chaos
@pytest.mark.timeout(1200)
def test_hosts_that_are_cut_off_or_die_cost_a_pause(make_hosts):
    os.environ.setdefault("RAY_AUTH_TOKEN", "a-token-for-the-hosts")
    outcome, chance = Outcome(), random.Random(SEED)
    with make_hosts(4) as everyone, network.ray_on(everyone), beginner(everyone[0]) as begin:
        flags = {**HOSTS.mesh, "model.path": MODEL, "mesh.shard_resources": {"expert": 1}}
        url = patiently(lambda: network.deploy(everyone[0], **flags))
        wait_for(url, is_whole)
        load = Load(url, httpx.get(f"{url}/v1/models").json()["data"][0]["id"])
        load.learn()
        load.start()
        time.sleep(1.0)
        outcome.between_tokens_s = load.between_tokens_s(3.0)
        for kind in sorted(HOSTS.deal(), reverse=True):  # who is lost with all its processes begins anew: last
            host = everyone[chance.randint(1, 3)]
            began = time.monotonic()
            if kind == "partition":
                cut_off(url, host)
            else:
                lose(url, host, begin)
            load.wait_for_all()
            time.sleep(0.3)
            stall_s = load.longest_gap_s(began, time.monotonic())
            outcome.stalls.setdefault(kind, []).append(stall_s)
            print(f"{kind:28} {stall_s:6.2f} s", flush=True)
        load.stop()
        assert load.wrong == [] and load.num_sent == load.num_finished > 0
    outcome.num_requests = load.num_finished
    if NUM_FAULTS is None:
        table.save("hosts", outcome)
