"""Faults drawn at random against the real service under load; at the end nothing is lost, changed or leaked.

make chaos       the whole run, some 25 minutes; writes its table into README.md
CHAOS_SEED       another order of the faults; CHAOS_FAULTS: so many of each mesh; CHAOS_MODEL: a model directory
The short form below runs with the other tests.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.chaos import table
from tests.chaos.configurations import CONFIGURATIONS, MODEL, NUM_FAULTS, SEED, Configuration, Outcome
from tests.chaos.faults import Chaos, held
from tests.chaos.load import Load
from tests.e2e.conftest import Service, start_service
from tests.tiny import write_tiny_model


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Chaos]]:
    """start(configuration, model): the service, and a load on it that knows its answers."""
    running: list[Service] = []

    def start_chaos(configuration: Configuration, model: str, *, num_streams: int = 16) -> Chaos:
        settings = tmp_path / "settings.json"  # JSON is YAML
        settings.write_text(json.dumps({"model": {"path": model}, "mesh": dict(configuration.mesh)}))
        service = start_service(["--config", str(settings)], tmp_path / "log")
        running.append(service)
        load = Load(service.url, service.get("/v1/models")["data"][0]["id"], num_streams=num_streams)
        load.learn()
        return Chaos(service, load, random.Random(SEED), Outcome(model=model))

    yield start_chaos
    with ExitStack() as afterwards:
        for service in running:
            afterwards.callback(stop, service)


def stop(service: Service) -> None:
    service.stop()
    assert [p for p in service.below if p.is_alive] == [], "processes were left over"


def most_held(chaos: Chaos) -> dict[str, tuple[int, int]]:
    """The most open files and threads of any process of each part."""
    most: dict[str, tuple[int, int]] = {}
    for pid, part in chaos.processes().items():
        files, threads = held(pid)
        most[part] = max(files, most.get(part, (0, 0))[0]), max(threads, most.get(part, (0, 0))[1])
    return most


def check_nothing_is_lost(chaos: Chaos, before: dict[str, tuple[int, int]]) -> None:
    """Every request finished with the right answer; no process, thread, block, store key or fd is left over."""
    load = chaos.load
    load.stop()
    chaos.finish()
    assert load.wrong == []
    assert load.num_sent == load.num_finished > 0
    chaos.settle()
    time.sleep(2.0)
    mesh = chaos.settle()
    routers = [router for router in mesh["routers"] if "num_steps" in router]
    for router in routers:
        assert router["running"] == router["waiting"] == 0
        assert router["kv_blocks_used"] == [0] * len(router["kv_blocks_used"]), "KV blocks leaked"
        assert router["num_store_keys"] <= 6 * (len(mesh["shards"]) + 1), "store keys leaked"
    for shard in mesh["shards"]:
        assert shard["num_groups"] <= len(routers), "a shard still serves a group that is over"
    processes = chaos.processes()
    assert sorted(processes.values()) == sorted(
        ["SupervisorActor", "expertmesh:ingress"]
        + ["ShardActor"] * len(mesh["shards"])
        + ["expertmesh:router"] * len(routers)
    ), "a process that is no member still runs"
    after = most_held(chaos)
    print(f"files and threads: {before} before, {after} after")
    for part, (files, threads) in before.items():
        assert after[part][0] <= files + 30, f"{part}: fds leaked"
        assert after[part][1] <= threads + 20, f"{part}: threads leaked"


def run(chaos: Chaos, configuration: Configuration, kinds: list[str]) -> None:
    before = most_held(chaos)
    chaos.load.start()
    time.sleep(1.0)
    chaos.outcome.between_tokens_s = chaos.load.between_tokens_s(3.0)
    try:
        for kind in kinds:
            chaos.strike(kind, configuration.num_shards, configuration.num_routers)
    finally:
        chaos.outcome.num_requests = chaos.load.num_finished
        print(f"\nseed {SEED}\n{table.summary({'': chaos.outcome})}\n")
    check_nothing_is_lost(chaos, before)
    chaos.outcome.num_requests = chaos.load.num_finished


@pytest.mark.timeout(240)
def test_a_short_run_of_faults_loses_nothing(start, tmp_path):
    short = Configuration(name="short", words="2 shards, 1 router", mesh={"shards": 2}, faults={})
    chaos = start(short, str(write_tiny_model(tmp_path / "tiny")), num_streams=8)
    run(chaos, short, ["kill_shard", "pause_shard", "kill_supervisor", "scale_out_and_in"])


def test_a_seed_deals_the_same_faults_again_and_each_as_often_as_it_should():
    for configuration in CONFIGURATIONS:
        dealt = configuration.deal(7, None)
        assert dealt == configuration.deal(7, None)
        assert {kind: dealt.count(kind) for kind in dealt} == dict(configuration.faults)
    assert sum(len(c.deal(7, None)) for c in CONFIGURATIONS) >= 60


@pytest.mark.chaos
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=lambda configuration: configuration.name)
def test_random_faults_under_load_lose_nothing(start, configuration):
    chaos = start(configuration, MODEL)
    run(chaos, configuration, configuration.deal())
    if NUM_FAULTS is None:
        table.save(configuration.name, chaos.outcome)
