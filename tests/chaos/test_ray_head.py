"""Ray's head (its GCS) dies and comes back: streams go on meanwhile, and afterwards the mesh heals as before."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from actors.processes import descendants, end
from tests.chaos import table
from tests.chaos.configurations import MODEL, Outcome
from tests.chaos.faults import send
from tests.chaos.load import Load
from tests.chaos.test_partition import wait_for
from tests.e2e.conftest import ROOT
from tests.e2e.hosts import DEPLOY
from tests.ports import free_port

REDIS = shutil.which("redis-server")
NUM_HEADS = 3


@contextmanager
def redis(folder: Path) -> Iterator[int]:
    assert REDIS is not None
    port = free_port()
    server = subprocess.Popen(
        [REDIS, "--port", str(port), "--save", "", "--dir", str(folder)], stdout=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 20
        while socket.socket().connect_ex(("127.0.0.1", port)) != 0:
            assert time.monotonic() < deadline, "redis-server does not answer"
            time.sleep(0.1)
        yield port
    finally:
        server.kill()
        server.wait()


def gcs_of(root: int) -> int:
    """The pid of the GCS among the processes below `root`."""
    for process in descendants(root):
        if b"gcs_server" in Path(f"/proc/{process.pid}/cmdline").read_bytes().split(b"\0")[0]:
            return process.pid
    raise AssertionError("no GCS is running")


@pytest.mark.chaos
@pytest.mark.timeout(300)
@pytest.mark.skipif(REDIS is None, reason="no redis-server is installed (apt-get install redis-server)")
def test_streams_go_on_while_the_head_is_away_and_the_mesh_heals_when_it_is_back(tmp_path: Path):
    outcome = Outcome()
    with redis(tmp_path) as redis_port:
        ray_port, http_port = free_port(), free_port()
        environment = {
            **os.environ,
            "RAY_REDIS_ADDRESS": f"127.0.0.1:{redis_port}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": os.environ.get("RAY_AUTH_TOKEN", "a-token-for-the-head"),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_niceness": "0",
        }
        # A shell that stays is the parent of Ray's processes, so that they can be found and ended.
        ray = Path(sys.executable).parent / "ray"
        start = (
            f"{ray} start --head --port={ray_port} --num-cpus=12 --node-ip-address=127.0.0.1 --include-dashboard=false"
        )
        holder = subprocess.Popen(
            [sys.executable, "-c", HOLDER, *start.split()], env=environment, stdout=subprocess.PIPE, text=True
        )
        restarted: list[subprocess.Popen[bytes]] = []
        try:
            assert holder.stdout is not None and holder.stdout.readline().strip() == "up"
            flags = {"model.path": MODEL, "mesh.shards": 2, "server.port": http_port}
            subprocess.run(
                [sys.executable, "-c", DEPLOY, json.dumps(flags)],
                env={**environment, "RAY_ADDRESS": f"127.0.0.1:{ray_port}"},
                check=True,
                timeout=180,
                capture_output=True,
                cwd=ROOT,
            )
            url = f"http://127.0.0.1:{http_port}"
            load = Load(url, httpx.get(f"{url}/v1/models").json()["data"][0]["id"])
            load.learn()
            load.start()
            time.sleep(1.0)
            outcome.between_tokens_s = load.between_tokens_s(3.0)
            gcs = gcs_of(holder.pid)
            command = Path(f"/proc/{gcs}/cmdline").read_bytes().rstrip(b"\0").split(b"\0")
            variables = dict(
                line.split(b"=", 1) for line in Path(f"/proc/{gcs}/environ").read_bytes().split(b"\0") if b"=" in line
            )
            for _ in range(NUM_HEADS):
                finished, began = load.num_finished, time.monotonic()
                send(gcs, signal.SIGKILL)
                time.sleep(6.0)
                restarted.append(
                    subprocess.Popen(command, env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
                )
                gcs = restarted[-1].pid
                time.sleep(6.0)
                wait_for(url, lambda mesh: mesh["settled"])
                assert load.num_finished > finished
                outcome.stalls.setdefault("kill_ray_head", []).append(load.longest_gap_s(began, time.monotonic()))
            mesh = wait_for(url, lambda mesh: mesh["settled"])
            began = time.monotonic()
            send(mesh["shards"][0]["pid"], signal.SIGKILL)
            wait_for(url, lambda new: new["settled"] and new["epoch"] > mesh["epoch"] + 1)
            outcome.stalls["kill_shard"] = [load.longest_gap_s(began, time.monotonic())]
            load.stop()
            print(f"\n{outcome.stalls}")
            assert load.wrong == [] and load.num_sent == load.num_finished > 0
            outcome.num_requests = load.num_finished
            table.save("head", outcome)
        finally:
            below = descendants(holder.pid)
            for process in [holder, *restarted]:
                process.kill()
                process.wait()
            end(below, grace_s=0.0)


HOLDER = """
import ctypes, subprocess, sys, time
ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER: Ray's daemons become our children
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
print("up", flush=True)
time.sleep(3600)
"""
