"""What can go wrong with a running service, done to it on purpose."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from actors.processes import descendants
from tests.chaos.configurations import Outcome
from tests.chaos.load import Load
from tests.e2e.conftest import Service

SETTLE_S = 60.0
REBALANCE_S = 4.0
PARTS = ("ShardActor", "SupervisorActor", "expertmesh:router", "expertmesh:ingress")
Window = tuple[float, float]  # in time.monotonic()


@dataclass
class Chaos:
    """Faults against one service under one load. Each is a method named after its kind; one that does many things
    may return the time that counts."""

    service: Service
    load: Load
    random: random.Random
    outcome: Outcome = field(default_factory=Outcome)
    threads: list[threading.Thread] = field(default_factory=list)

    # ---- the service ---------------------------------------------------------------------------------

    def mesh(self) -> dict[str, Any]:
        """GET /mesh; tried again while the supervisor is away."""
        end = time.monotonic() + SETTLE_S
        while True:
            try:
                return dict(self.service.get("/mesh"))
            except OSError:
                assert time.monotonic() < end, "GET /mesh does not come back"
                time.sleep(0.1)

    def settle(self, num_shards: int | None = None, num_routers: int | None = None) -> dict[str, Any]:
        """Wait until everything is back: all shards, all routers, on one epoch."""
        end = time.monotonic() + SETTLE_S
        while True:
            mesh = self.mesh()
            routers = [r for r in mesh["routers"] if r["seen_s_ago"] < 3 and "num_steps" in r]
            enough = num_routers is None or len(routers) >= num_routers
            shards_right = (
                num_shards is None or len([s for s in mesh["shards"] if s["state"] == "serving"]) == num_shards
            )
            current = all(r["epoch"] == mesh["epoch"] for r in routers)
            if mesh["settled"] and routers and enough and shards_right and current:
                return mesh
            assert time.monotonic() < end, f"the mesh does not settle: {summary(mesh)}"
            time.sleep(0.1)

    def shards(self) -> list[dict[str, Any]]:
        return [s for s in self.mesh()["shards"] if s["state"] == "serving"]

    def scale(self, num_shards: int) -> None:
        self.service.post("/mesh/scale", {"shards": num_shards})

    def processes(self) -> dict[int, str]:
        """pid -> which of PARTS it is."""
        found = {}
        for process in descendants(self.service.process.pid):
            with contextlib.suppress(OSError):
                title = Path(f"/proc/{process.pid}/cmdline").read_bytes().decode(errors="replace")
                found.update((process.pid, part) for part in PARTS if part in title)
        return found

    def after(self, delay_s: float, action: Callable[[], None]) -> None:
        """Do something a little later, in the background."""

        def run() -> None:
            time.sleep(delay_s)
            action()

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        self.threads.append(thread)

    # ---- faults --------------------------------------------------------------------------------------

    def kill_shard(self) -> None:
        send(self.random.choice(self.shards())["pid"], signal.SIGKILL)

    def stop_shard(self) -> None:
        """Stopped for good, as far as the mesh can tell: it wakes when everything is over."""
        pid = self.random.choice(self.shards())["pid"]
        send(pid, signal.SIGSTOP)
        self.after(15.0, lambda: send(pid, signal.SIGCONT))

    def pause_shard(self) -> None:
        """Stopped, and back after a while."""
        pid = self.random.choice(self.shards())["pid"]
        send(pid, signal.SIGSTOP)
        self.after(self.random.uniform(2.5, 4.5), lambda: send(pid, signal.SIGCONT))

    def kill_two_shards(self) -> None:
        for shard in self.random.sample(self.shards(), 2):
            send(shard["pid"], signal.SIGKILL)

    def stop_two_shards(self) -> None:
        for shard in self.random.sample(self.shards(), 2):
            pid = shard["pid"]
            send(pid, signal.SIGSTOP)
            self.after(15.0, lambda pid=pid: send(pid, signal.SIGCONT))  # type: ignore[misc]

    def kill_during_recovery(self) -> None:
        first, second = self.random.sample(self.shards(), 2)
        send(first["pid"], signal.SIGKILL)
        time.sleep(self.random.uniform(0.0, 0.3))
        send(second["pid"], signal.SIGKILL)

    def kill_during_scale_out(self) -> None:
        num_shards = self.mesh()["target_shards"]
        victim = self.random.choice(self.shards())["pid"]
        self.scale(num_shards + 1)
        time.sleep(self.random.uniform(0.0, 6.0))
        send(victim, signal.SIGKILL)
        self.settle(num_shards + 1)
        self.scale(num_shards)

    def scale_out_and_in(self) -> None:
        num_shards = self.mesh()["target_shards"]
        self.scale(num_shards + 1)
        self.settle(num_shards + 1)
        self.scale(num_shards)
        self.settle(num_shards)

    def rebalance(self) -> Window:
        """With one more shard, or one less, experts lie by number, not by load, and the planner moves some. What counts
        is the time around its change alone."""
        change = None
        while change is None:
            change = self._rebalanced(self._misplace())
        published = change["time"] - time.time() + time.monotonic()
        time.sleep(1.0)
        return published - 0.3, published + 1.0

    def kill_during_rebalance(self) -> None:
        """While it loads or while routers switch, by chance."""
        or_begins = self.random.random() < 0.5
        while self._rebalanced(self._misplace(), or_begins) is None:
            pass
        self.kill_shard()

    def _misplace(self) -> int:
        """The epoch after which experts lie by number."""
        epoch = self.mesh()["epoch"]
        self.scale_out_and_in()
        return int(epoch)

    def _rebalanced(self, epoch: int, or_begins: bool = False) -> dict[str, Any] | None:
        """Wait for a rebalance after `epoch`, or for its beginning; returns the last change, None when none came."""
        end = time.monotonic() + REBALANCE_S
        while True:
            mesh = self.mesh()
            for change in reversed(mesh["history"]):
                if change["epoch"] > epoch and change["reason"].startswith("rebalanced"):
                    return dict(change)
            if or_begins and not mesh["settled"]:
                return dict(mesh["history"][-1])
            if time.monotonic() > end:
                return None
            time.sleep(0.02)

    def kill_router(self) -> None:
        send(self.random.choice([r for r in self.mesh()["routers"] if "num_steps" in r])["pid"], signal.SIGKILL)

    def kill_supervisor(self) -> None:
        send(self.mesh()["supervisor_pid"], signal.SIGKILL)

    def kill_supervisor_and_shard(self) -> None:
        mesh = self.mesh()
        send(mesh["supervisor_pid"], signal.SIGKILL)
        send(self.random.choice([s for s in mesh["shards"] if s["state"] == "serving"])["pid"], signal.SIGKILL)

    # ---- one fault at a time -------------------------------------------------------------------------

    def strike(self, kind: str, num_shards: int, num_routers: int) -> None:
        """Do it, wait until everything is back, and note the longest gap."""
        began, told = time.monotonic(), time.time()
        window = getattr(self, kind)()
        time.sleep(1.0)
        mesh = self.settle(num_shards, num_routers)
        self.load.wait_for_all()
        time.sleep(0.3)
        stall_s = self.load.longest_gap_s(*(window or (began, time.monotonic())))
        self.outcome.stalls.setdefault(kind, []).append(stall_s)
        print(f"{kind:28} {stall_s:6.2f} s", flush=True)
        for change in mesh["history"]:
            if change["time"] > told:
                reason = change["reason"][:120]
                print(
                    f"    +{change['time'] - told:5.2f} s  {change['decided_in_ms'] or 0:7.1f} ms  {reason}", flush=True
                )

    def finish(self) -> None:
        for thread in self.threads:
            thread.join(30)


def send(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def held(pid: int) -> tuple[int, int]:
    """Its open files and its threads."""
    return len(list(Path(f"/proc/{pid}/fd").iterdir())), len(list(Path(f"/proc/{pid}/task").iterdir()))


def summary(mesh: dict[str, Any]) -> dict[str, Any]:
    keep = ("epoch", "reason", "settled", "complete", "trouble", "target_shards", "starting", "history")
    short = {name: mesh[name] for name in keep}
    short["shards"] = [(s["shard_id"], s["state"], s.get("num_experts")) for s in mesh["shards"]]
    short["routers"] = [(r["router_id"][-4:], r.get("epoch"), r["seen_s_ago"]) for r in mesh["routers"]]
    return short
