"""Faults drawn at random against the real service under load; at the end nothing is lost, changed or leaked.

make chaos                        the whole run (CHAOS_SEED, CHAOS_FAULTS and CHAOS_MODEL change it)
the short form below              runs with the other tests
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.chaos.faults import Chaos, num_fds, table
from tests.chaos.load import Load
from tests.e2e.conftest import Service, start_service
from tests.tiny import write_tiny_model

ONE_OR_MORE_SHARDS = ("kill_shard", "stop_shard", "pause_shard", "kill_supervisor", "scale_out_and_in")
TWO_OR_MORE_SHARDS = (
    *ONE_OR_MORE_SHARDS,
    "kill_two_shards",
    "stop_two_shards",
    "kill_during_recovery",
    "kill_during_scale_out",
    "kill_supervisor_and_shard",
    "kill_router",
)
SEED = int(os.environ.get("CHAOS_SEED", "5"))
NUM_FAULTS = int(os.environ.get("CHAOS_FAULTS", "24"))


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Chaos]]:
    """start(shards=2, routers=1, ...): the service, and a load on it that knows its answers."""
    running: list[Service] = []

    def start_chaos(*, seed: int = SEED, num_streams: int = 16, **options: int) -> Chaos:
        model = os.environ.get("CHAOS_MODEL") or str(write_tiny_model(tmp_path / "tiny"))
        arguments = [model]
        for name, value in options.items():
            arguments += [f"--{name.replace('_', '-')}", str(value)]
        service = start_service(arguments, tmp_path / "log")
        running.append(service)
        load = Load(service.url, service.get("/v1/models")["data"][0]["id"], num_streams=num_streams)
        load.learn()
        return Chaos(service, load, random.Random(seed))

    yield start_chaos
    for service in running:
        service.stop()
        assert [p for p in service.below if p.is_alive] == [], "processes were left over"


def check_nothing_is_lost(chaos: Chaos, fds_before: int | None) -> None:
    """Every request finished with the right answer; no block, store key or fd is held any more."""
    load = chaos.load
    load.stop()
    chaos.finish()
    assert load.wrong == []
    assert load.num_sent == load.num_finished > 0
    mesh = chaos.settle()
    time.sleep(1.0)
    mesh = chaos.settle()
    for router in mesh["routers"]:
        if "num_steps" in router:
            assert router["running"] == router["waiting"] == 0
            assert router["kv_blocks_used"] == [0] * len(router["kv_blocks_used"]), "KV blocks leaked"
            assert router["num_store_keys"] <= 6 * (len(mesh["shards"]) + 1), "store keys leaked"
            if fds_before is not None:
                assert num_fds(router["pid"]) <= fds_before + 30, "fds leaked"
    alive = {s["pid"] for s in mesh["shards"]}
    names = [p for p in Path("/proc").iterdir() if p.name.isdigit() and _is_shard_of(p, chaos)]
    assert {int(p.name) for p in names} <= alive, "a shard that is no member still runs"


def _is_shard_of(process: Path, chaos: Chaos) -> bool:
    from deploy.processes import descendants

    try:
        title = (process / "cmdline").read_bytes()
    except OSError:
        return False
    return b"ShardActor" in title and int(process.name) in {p.pid for p in descendants(chaos.service.process.pid)}


def run(chaos: Chaos, kinds: list[str], *, num_shards: int, num_routers: int) -> None:
    router = next(r for r in chaos.mesh()["routers"] if "num_steps" in r)
    fds_before = num_fds(router["pid"])
    chaos.load.start()
    time.sleep(1.0)
    try:
        for kind in kinds:
            chaos.strike(kind, num_shards, num_routers)
    finally:
        print(f"\nseed {SEED}, {len(kinds)} faults, {chaos.load.num_finished} requests\n{table(chaos.stalls)}")
    check_nothing_is_lost(chaos, fds_before)


@pytest.mark.timeout(240)
def test_a_short_run_of_faults_loses_nothing(start):
    chaos = start(shards=2, num_streams=8)
    run(chaos, ["kill_shard", "pause_shard", "kill_supervisor", "scale_out_and_in"], num_shards=2, num_routers=1)


@pytest.mark.chaos
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("shards", "routers", "replicas", "spares"),
    [(3, 2, 1, 0), (3, 2, 2, 0), (2, 1, 1, 1)],
    ids=["adoption", "replicas", "spare"],
)
def test_random_faults_under_load_lose_nothing(start, shards, routers, replicas, spares):
    chaos = start(shards=shards, routers=routers, replicas=replicas, spares=spares)
    kinds = [chaos.random.choice(TWO_OR_MORE_SHARDS) for _ in range(NUM_FAULTS)]
    run(chaos, kinds, num_shards=shards, num_routers=routers)
