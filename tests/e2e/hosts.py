"""Hosts of our own: network namespaces on one bridge, each with an address, as on separate machines.

    em7br 10.64.7.254 ── veth ── host 0: 10.64.7.1 (head)
                      ├─ veth ── host 1: 10.64.7.2
                      └─ veth ── host 2: 10.64.7.3

Names and network are those of the process that makes them (here the pid is 7), so several runs don't meet.
No default route, so nothing leaves the machine (and `ray start` need not wait for an answer from outside).
Run as a script it serves a model across hosts and prints GET /mesh:

    sudo .venv/bin/python -m tests.e2e.hosts [MODEL_DIRECTORY] [NUM_SHARD_HOSTS]
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.processes import descendants, end

ROOT = Path(__file__).parent.parent.parent
PORT = 8000
PREFIX = f"em{os.getpid()}"
NETWORK = f"10.{64 + os.getpid() // 256 % 64}.{os.getpid() % 256}"


def missing() -> str | None:
    """Why hosts can't be made here, or None."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "iproute2 is not installed"
    name = f"{PREFIX}probe"
    probe = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
    return None if probe.returncode == 0 else f"network namespaces are not allowed here: {probe.stderr.strip()}"


@dataclass(frozen=True, slots=True)
class Host:
    """One namespace. index 0 is the head."""

    name: str
    address: str
    link: str

    def command(self, *arguments: str) -> list[str]:
        return ["ip", "netns", "exec", self.name, *arguments]

    def run(self, *arguments: str, timeout_s: float = 60.0) -> str:
        """Run to the end and return its output. Raises CalledProcessError."""
        done = subprocess.run(
            self.command(*arguments), capture_output=True, text=True, check=True, timeout=timeout_s, cwd=ROOT
        )
        return done.stdout

    def unplug(self) -> None:
        """Packets to and from this host are dropped from now on; its processes don't notice."""
        ip("link", "set", self.link, "down")

    def plug(self) -> None:
        ip("link", "set", self.link, "up")


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@contextmanager
def hosts(count: int) -> Iterator[list[Host]]:
    """Make `count` hosts on a bridge; gone afterwards."""
    bridge = f"{PREFIX}br"
    made: list[Host] = []
    ip("link", "add", bridge, "type", "bridge")
    try:
        ip("addr", "add", f"{NETWORK}.254/24", "dev", bridge)
        ip("link", "set", bridge, "up")
        for i in range(count):
            host = Host(f"{PREFIX}h{i}", f"{NETWORK}.{i + 1}", f"{PREFIX}v{i}")
            ip("netns", "add", host.name)
            made.append(host)
            ip("link", "add", host.link, "type", "veth", "peer", "name", "eth0", "netns", host.name)
            ip("link", "set", host.link, "master", bridge, "up")
            ip("-n", host.name, "addr", "add", f"{host.address}/24", "dev", "eth0")
            ip("-n", host.name, "link", "set", "eth0", "up")
            ip("-n", host.name, "link", "set", "lo", "up")
        yield made
    finally:
        for host in made:
            subprocess.run(["ip", "link", "del", host.link], check=False)
            subprocess.run(["ip", "netns", "del", host.name], check=False)
        subprocess.run(["ip", "link", "del", bridge], check=False)


@contextmanager
def ray_on(everyone: Sequence[Host], shard_slots: int = 1) -> Iterator[None]:
    """`ray start` on every host, as one would on machines: routers and ingress on the head, shards on the others."""
    started: list[subprocess.Popen[bytes]] = []
    environment = {
        **os.environ,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": os.environ.get("RAY_AUTH_TOKEN", "a-token-for-the-hosts"),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    ray = str(Path(sys.executable).parent / "ray")
    with ExitStack() as folders:
        try:
            for i, host in enumerate(everyone):
                folder = folders.enter_context(
                    tempfile.TemporaryDirectory(prefix=f"em{i}-", ignore_cleanup_errors=True)
                )
                joining = [f"--address={everyone[0].address}:6379"] if i else ["--head", "--port=6379"]
                room = ["--num-cpus=0", f'--resources={{"expert": {shard_slots}}}'] if i else ["--num-cpus=4"]
                tail = [] if i else ["--include-dashboard=false", f"--temp-dir={folder}"]
                arguments = [ray, "start", *joining, f"--node-ip-address={host.address}", *room, *tail, "--block"]
                # One after the other: on one file system several that start together may wait for each other.
                started.append(_start(host.command(*arguments), environment, Path(folder, "ray-start.log")))
            yield
        finally:
            below = [process for p in started for process in descendants(p.pid)]
            for process in started:
                process.send_signal(signal.SIGTERM)
            end(below, grace_s=5.0)
            for process in started:
                process.kill()
                process.wait()


def _start(command: list[str], environment: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
    """`ray start --block`; returns once it has joined. Raises TimeoutError with what it said."""
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 60
    while "block forever" not in log.read_text(errors="replace"):
        if time.monotonic() > deadline or process.poll() is not None:
            below = descendants(process.pid)
            process.kill()
            process.wait()
            end(below, grace_s=0.0)
            raise TimeoutError(f"ray start did not come up: {log.read_text(errors='replace')[-1000:]}")
        time.sleep(0.1)
    return process


DEPLOY = """
import json, sys, ray
from ray import serve
from deploy.app import bind
from deploy.settings import load
settings = load(flags=json.loads(sys.argv[1])).settings
ray.init(address="auto", log_to_driver=False)
serve.start(proxy_location="HeadOnly", http_options={"host": settings.server.host, "port": settings.server.port})
serve.run(bind(settings), name="expertmesh", route_prefix="/")
"""


def deploy(head: Host, **flags: Any) -> str:
    """Deploy the application from the head; returns its URL, which is reachable from every host and from here."""
    flags = {"server.host": "0.0.0.0", "server.port": PORT, **flags}
    environment = ["env", "RAY_AUTH_MODE=token", f"RAY_AUTH_TOKEN={os.environ['RAY_AUTH_TOKEN']}"]
    arguments = [*environment, f"RAY_ADDRESS={head.address}:6379", sys.executable, "-c", DEPLOY]
    head.run(*arguments, json.dumps(flags), timeout_s=240)
    return f"http://{head.address}:{PORT}"


def main() -> None:
    """Serve across hosts, ask once, show where everything is."""
    import urllib.request

    reason = missing()
    if reason is not None:
        sys.exit(reason)
    os.environ.setdefault("RAY_AUTH_TOKEN", "a-token-for-the-hosts")
    model = sys.argv[1] if len(sys.argv) > 1 else "demo"
    num_shards = int(sys.argv[2]) if len(sys.argv) > 2 else 3
    with hosts(num_shards + 1) as everyone, ray_on(everyone):
        flags = {"mesh.shards": num_shards, "mesh.spread": "strict", "mesh.shard_cpus": 0}
        url = deploy(everyone[0], **{"model.path": model, "mesh.shard_resources": {"expert": 1}, **flags})
        body = json.dumps({"prompt": "The whale", "max_tokens": 16, "temperature": 0}).encode()
        request = urllib.request.Request(f"{url}/v1/completions", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            print(json.load(answer)["choices"][0]["text"])
        with urllib.request.urlopen(f"{url}/mesh", timeout=10) as answer:
            mesh = json.load(answer)
        print(f"epoch {mesh['epoch']}, complete: {mesh['complete']}")
        for router in mesh["routers"]:
            print(f"  {router['router_id']:24} {router['host']:12} pid {router['pid']}")
        for shard in mesh["shards"]:
            print(f"  {shard['shard_id']:24} {shard['host']:12} pid {shard['pid']}  {shard['tokens']} tokens")


if __name__ == "__main__":
    main()
