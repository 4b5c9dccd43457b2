"""After mixed traffic with clients that leave, nothing is left over: no block, task, file descriptor or memory."""

from __future__ import annotations

import asyncio
import os
import random
import tempfile
import time
from pathlib import Path

import pytest

from actors.processes import descendants
from deploy.served_model import ServedModel
from deploy.settings import Settings
from tests.deploy.fakes import num_in_flight, running_api
from tests.deploy.real_routers import RealRouters
from tests.e2e.conftest import Service, start_service
from tests.load.traffic import plan, send_all
from tests.tiny import write_tiny_model
from tests.waiting import wait_until


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("load") / "tiny", max_position_embeddings=1024)


def drive(url: str, count: int, at_once: int, seed: int) -> None:
    rng = random.Random(seed)
    became = asyncio.run(send_all(url, [plan(rng, 320) for _ in range(count)], at_once))
    assert became["done"] > 0.6 * count and (became["left"] > 0.05 * count or count < 100), became


def test_two_hundred_mixed_requests_leave_nothing_over(directory):
    served = ServedModel.from_directory(directory, names=("tiny",))
    settings = Settings.model_validate({"mesh": {"token": "t"}})
    with running_api(served, settings, RealRouters(directory, "a")) as api:

        def tasks() -> int:
            return asyncio.run_coroutine_threadsafe(count_tasks(), api.loop).result(10)

        engine = api.router.routers["a"].engine
        drive(api.url, 20, 8, seed=1)
        wait_until(lambda: num_in_flight(api.pool) == 0)
        idle_tasks, idle_fds = tasks(), len(os.listdir("/proc/self/fd"))
        drive(api.url, 200, 32, seed=2)
        wait_until(lambda: not engine.scheduler.has_work and num_in_flight(api.pool) == 0)
        assert [pool.num_used for pool in engine.scheduler.blocks.pools] == [0] * len(engine.scheduler.blocks.pools)
        engine.scheduler.check_integrity()
        wait_until(lambda: len(engine._by_id) == 0 and tasks() <= idle_tasks)
        wait_until(lambda: len(os.listdir("/proc/self/fd")) <= idle_fds)


async def count_tasks() -> int:
    return len(asyncio.all_tasks())


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_two_thousand_requests_against_the_service_leave_nothing_over(directory):
    with tempfile.TemporaryDirectory() as folder:
        service = start_service([str(directory), "--shards", "2"], Path(folder, "log"))
        try:
            drive(service.url, 500, 64, seed=1)  # allocators, connections and caches reach their size
            before = settled(service)
            num_fds = sum(fds for _, fds, _ in before.values())
            started = time.monotonic()
            drive(service.url, 2000, 64, seed=2)
            print(f"\n2,000 requests in {time.monotonic() - started:.0f} s")
            wait_until(lambda: sum(fds for _, fds, _ in settled(service).values()) <= num_fds + 4)
            after = settled(service)
        finally:
            service.stop()
    for pid, (name, fds, kib) in after.items():
        _, was_fds, was_kib = before.get(pid, (name, 0, 0))
        print(f"{pid:>8} {name:30} fds {was_fds:>5} -> {fds:>5}   resident {was_kib >> 10:>5} -> {kib >> 10:>5} MiB")
    resident, was_resident = (sum(kib for _, _, kib in one.values()) for one in (after, before))
    assert resident <= 1.05 * was_resident, f"{was_resident >> 10} MiB became {resident >> 10} MiB"


def settled(service: Service) -> dict[int, tuple[str, int, int]]:
    """By pid: name, open descriptors and KiB resident, once the routers are empty and no client is connected.
    AssertionError where that doesn't come."""

    def is_empty() -> bool:
        return all(
            router["running"] == router["waiting"] == 0 and not any(router["kv_blocks_used"])
            for router in service.get("/mesh")["routers"]
        )

    wait_until(is_empty)
    wait_until(lambda: service.get("/load")["server_load"] == 0)
    wait_until(lambda: num_connections(int(service.url.rpartition(":")[2])) == 0)
    return {process.pid: figures(process.pid) for process in descendants(service.process.pid) if process.is_alive}


def num_connections(port: int) -> int:
    """Established or half closed ones that this machine's servers have at the port."""
    states = ("01", "08")  # ESTABLISHED, CLOSE_WAIT; see the kernel's include/net/tcp_states.h
    lines = [line.split() for t in ("tcp", "tcp6") for line in Path(f"/proc/net/{t}").read_text().splitlines()[1:]]
    return sum(int(fields[1].rpartition(":")[2], 16) == port and fields[3] in states for fields in lines)


def figures(pid: int) -> tuple[str, int, int]:
    status = dict(
        line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":\t" in line
    )
    command = Path(f"/proc/{pid}/cmdline").read_text().split("\0")[0]
    return command.rsplit("/", 1)[-1][:30], len(os.listdir(f"/proc/{pid}/fd")), int(status["VmRSS"].split()[0])
