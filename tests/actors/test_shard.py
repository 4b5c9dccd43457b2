"""What a shard says that it holds, while it loads and when loading fails."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from actors.shard import ExpertShard
from model.experts import ExpertWeights
from tests.actors.conftest import ThreadMesh
from tests.waiting import wait_until

KEYS = [(layer_idx, expert_id) for layer_idx in range(3) for expert_id in range(8)]


class StoppableLoader:
    """The shard's loader, which may load so many experts; then it waits for `go_on`, or raises `error`."""

    def __init__(self, shard: ExpertShard, allowed: int, error: Exception | None = None) -> None:
        self.loader, self.checkpoint = shard._loader, shard._loader.checkpoint
        self.allowed, self.error = allowed, error
        self.go_on = threading.Event()

    def expert(self, layer_idx: int, expert_id: int) -> ExpertWeights:
        if self.allowed == 0:
            if self.error is not None:
                raise self.error
            assert self.go_on.wait(60.0)
        else:
            self.allowed -= 1
        return self.loader.expert(layer_idx, expert_id)


def test_what_a_load_has_brought_counts_as_held_only_once_it_can_be_computed_with(tiny_model: Path) -> None:
    shard = ThreadMesh(tiny_model).add_shard("shard-0")
    shard.load(KEYS[:2])
    shard._loader = loader = StoppableLoader(shard, allowed=5)
    load = threading.Thread(target=shard.load, args=(KEYS,), daemon=True)
    load.start()
    wait_until(lambda: shard.info()["num_experts"] == 7, 60.0)
    assert shard.held() == KEYS[:2]
    loader.go_on.set()
    load.join()
    assert shard.held() == KEYS and shard.info()["num_experts"] == len(KEYS)


def test_a_load_that_fails_halfway_adds_nothing_and_the_next_one_reads_only_the_rest(tiny_model: Path) -> None:
    shard = ThreadMesh(tiny_model).add_shard("shard-0")
    shard._loader = loader = StoppableLoader(shard, allowed=5, error=OSError("no memory"))
    with pytest.raises(OSError, match="no memory"):
        shard.load(KEYS)
    assert shard.held() == [] and shard.info()["num_experts"] == 5
    loader.allowed = len(KEYS) - 5
    shard.load(KEYS)
    assert shard.held() == KEYS
