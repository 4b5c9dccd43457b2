"""A router's engine over a tiny model: with all experts in its process, or over a mesh whose shards are threads."""

from __future__ import annotations

import gc
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from actors.engine import Engine
from actors.request import Chunk, GenerateRequest, rows_from_wire
from actors.router import Router
from actors.shard import ExpertShard
from actors.specs import RouterSpec, SchedulerLimits, ShardSpec
from cluster.placement import Placement, adopt, spread_evenly
from cluster.settings import Timeouts
from cluster.view import Member, MeshView
from model.sampling_params import SamplingParams
from tests.tiny import prompt_of, write_tiny_model
from tests.waiting import PATIENCE_S

CPU = torch.device("cpu")
PATIENT = Timeouts(  # only what never comes meets one of these
    exchange_min_s=PATIENCE_S,
    exchange_max_s=PATIENCE_S,
    formation_s=PATIENCE_S,
    recovery_s=2 * PATIENCE_S,
    heartbeat_s=0.5,
    idle_s=PATIENCE_S,
)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = write_tiny_model(tmp_path_factory.mktemp("tiny"))
    gc.freeze()  # each group's end collects garbage: not among all of torch and transformers
    yield path
    gc.unfreeze()


class Outputs:
    """Collects what an engine delivers; waits for requests to end."""

    def __init__(self) -> None:
        self.chunks: dict[str, list[Chunk]] = defaultdict(list)
        self._changed = threading.Condition()

    def deliver(self, outbox: dict[str, list[Chunk]]) -> None:
        with self._changed:
            for chunks in outbox.values():
                for chunk in chunks:
                    self.chunks[chunk.request_id].append(chunk)
            self._changed.notify_all()

    def wait(self, request_id: str, timeout_s: float = 2 * PATIENCE_S) -> list[Chunk]:
        with self._changed:
            assert self._changed.wait_for(
                lambda: self.chunks[request_id] and self.chunks[request_id][-1].finish_reason, timeout_s
            ), f"{request_id} did not end: {self.chunks[request_id]}"
        return self.chunks[request_id]

    def tokens(self, request_id: str) -> list[int]:
        return [token for chunk in self.wait(request_id) for token in chunk.token_ids]

    def rows(self, request_id: str) -> torch.Tensor:
        """What an ingress makes of the pieces of a pool result."""
        rows: list[torch.Tensor] = []
        for chunk in self.wait(request_id):
            assert chunk.error is None and chunk.first_row <= len(rows)
            rows[chunk.first_row :] = [torch.tensor(row) for row in rows_from_wire(chunk.values or ())]
        return torch.stack(rows)


@dataclass
class ThreadMesh:
    """A supervisor's place taken by the test: shards are threads of this process, views are published by hand."""

    model: Path
    dtype: str | None = None
    quantization: str | None = None
    timeouts: Timeouts = PATIENT
    shards: dict[str, ExpertShard] = field(default_factory=dict)
    view: MeshView | None = None
    reports: list[tuple[int, tuple[str, ...]]] = field(default_factory=list)
    on_report: Callable[[int, tuple[str, ...]], None] = lambda epoch, suspects: None
    changed: threading.Condition = field(default_factory=threading.Condition)

    def add_shard(self, shard_id: str) -> ExpertShard:
        spec = ShardSpec(
            model=str(self.model), dtype=self.dtype, quantization=self.quantization, timeouts=self.timeouts
        )
        shard = ExpertShard(shard_id, spec, host="127.0.0.1", node_id=f"node-{shard_id}", device=CPU)
        self.shards[shard_id] = shard
        return shard

    def publish(self, placement: Placement, reason: str = "test") -> MeshView:
        members = []
        for shard_id in sorted(placement.shards()):
            self.shards[shard_id].load(sorted(placement.held_by(shard_id)))
            members.append(
                Member(shard_id=shard_id, actor_name=shard_id, node_id=f"node-{shard_id}", host="127.0.0.1", pid=0)
            )
        with self.changed:
            epoch = self.view.epoch + 1 if self.view else 1
            self.view = MeshView(epoch=epoch, shards=tuple(members), placement=placement, reason=reason)
            self.changed.notify_all()
        return self.view

    def heal(self, placement: Placement, suspects: tuple[str, ...]) -> None:
        """As the supervisor does: without the suspects, but with all when all are suspected, since all answer here."""
        rest = placement if set(suspects) == placement.shards() else placement.without(suspects)
        self.publish(rest.adding(adopt(rest, sorted(rest.shards()))), "healed")

    def next_view(self, router_id: str, seen_epoch: int, live_epoch: int) -> MeshView | None:
        with self.changed:
            self.changed.wait_for(lambda: self.view is not None and self.view.epoch > seen_epoch, 0.5)
            return self.view if self.view is not None and self.view.epoch > seen_epoch else None

    def join(self, view: MeshView, *, router_id: str, **arguments: Any) -> Callable[[], tuple[str, ...]]:
        errors: list[str] = []

        def join_one(rank: int, shard_id: str) -> None:
            try:
                self.shards[shard_id].join(
                    router_id=router_id, epoch=view.epoch, rank=rank, world_size=len(view.shards) + 1, **arguments
                )
            except Exception:
                errors.append(shard_id)

        threads = [
            threading.Thread(target=join_one, args=(i + 1, m.shard_id), daemon=True) for i, m in enumerate(view.shards)
        ]
        for thread in threads:
            thread.start()

        def wait() -> tuple[str, ...]:
            for thread in threads:
                thread.join(self.timeouts.formation_s + 1)
            return tuple(errors)

        return wait

    def report(self, router_id: str, epoch: int, suspects: tuple[str, ...], reason: str) -> None:
        if (epoch, suspects) in self.reports:
            return  # routers say it again until a newer view comes
        self.reports.append((epoch, suspects))
        threading.Thread(target=self.on_report, args=(epoch, suspects), daemon=True).start()


def spec_for(model: Path, **overrides: Any) -> RouterSpec:
    values: dict[str, Any] = {
        "model": str(model),
        "served_name": "tiny",
        "num_kv_blocks": 256,
        "limits": SchedulerLimits(max_num_seqs=32, max_num_batched_tokens=128, max_queue=64),
        "timeouts": PATIENT,
        "token": "secret",
    }
    return RouterSpec(**{**values, **overrides})


@pytest.fixture
def start_router(tiny_model: Path) -> Iterator[Callable[..., tuple[Router, Outputs]]]:
    """start_router(mesh=None, **spec overrides): a running router and what its engine delivers."""
    routers: list[Router] = []

    def start(mesh: ThreadMesh | None = None, model: Path = tiny_model, **overrides: Any) -> tuple[Router, Outputs]:
        spec = spec_for(model, **{"local": mesh is None, **overrides})
        router = Router(
            f"router-{len(routers)}", spec, host="127.0.0.1", device=CPU, client=mesh or ThreadMesh(tiny_model)
        )
        outputs = Outputs()
        router.engine._deliver = outputs.deliver
        router.start()
        routers.append(router)
        return router, outputs

    yield start
    for router in routers:
        router.stop()


def placed(mesh: ThreadMesh, num_shards: int, replicas: int = 1) -> Placement:
    """Add shards up to num_shards and return the even placement on the first num_shards of them."""
    while len(mesh.shards) < num_shards:
        mesh.add_shard(f"shard-{len(mesh.shards)}")
    nodes = {s: f"node-{s}" for s in list(mesh.shards)[:num_shards]}
    return spread_evenly(moe_layers=[0, 1, 2], num_experts=8, nodes=nodes, replicas=replicas)


def ask(
    engine: Engine, request_id: str, prompt: list[int], count: int = 24, first_id: str | None = None, **sampling: Any
) -> None:
    params = SamplingParams(**{"temperature": 0.0, "max_tokens": count, "ignore_eos": True, **sampling})
    request = GenerateRequest(request_id=request_id, prompt_ids=tuple(prompt), sampling=params, first_id=first_id)
    engine.submit("test", request)


def between_steps(engine: Engine, condition: Callable[[], bool], act: Callable[[], None]) -> None:
    """Act on the engine's thread, after the first step that makes the condition true and before the next one."""

    def look() -> None:
        if condition():
            act()
        else:
            engine.call(look)

    engine.call(look)


def ask_six(engine: Engine) -> None:
    """Six requests, greedy and seeded ones, that all arrive between the same two steps."""

    def ask_all() -> None:
        for i in range(6):
            ask(engine, f"r{i}", prompt_of(i, 5 + 9 * i), 24, temperature=0.7 * (i % 2), seed=i)

    engine.call(ask_all)


def answers(outputs: Outputs) -> dict[str, list[int]]:
    return {f"r{i}": outputs.tokens(f"r{i}") for i in range(6)}


@pytest.fixture
def expected(start_router: Callable[..., tuple[Router, Outputs]]) -> dict[str, list[int]]:
    """The answers to `ask_six` with all experts in one process."""
    router, outputs = start_router()
    ask_six(router.engine)
    return answers(outputs)


def after_three_tokens(router: Router, outputs: Outputs, act: Callable[[], None]) -> None:
    """Act in the middle of the answers to `ask_six`, between two steps."""
    between_steps(router.engine, lambda: len(outputs.chunks["r5"]) > 2, act)


def formed(router: Router, epoch: int) -> bool:
    """Whether the router has a group for this epoch, which its next step will use."""
    newest = router.membership.newest()
    return newest is not None and newest.view.epoch == epoch
