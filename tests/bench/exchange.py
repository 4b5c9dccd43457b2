"""What the exchange adds to a layer: dispatch + combine, less the slowest shard's computing, by transport and shards.

    python -m tests.bench.exchange [--batch 8] [--hidden 2048] [--top-k 4] [--profile host]

One router and its shards as processes of this machine, tiny experts (60 of 16 inner columns), nothing else in the
router between dispatch and combine. Rows are float32: 8 of 2048 are 64 KiB. Medians over the later layers, in
microseconds. --profile: where the router's Python spends it, for one transport and two shards.
"""

from __future__ import annotations

import argparse
import cProfile
import multiprocessing
import pstats
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from actors.remote_exchange import Connection, RemoteExchange
from cluster.placement import spread_evenly
from cluster.process_group import MeshGroup, connect_store, form_group, host_store
from cluster.settings import Timeouts
from cluster.transport import router_transport, shard_transport
from cluster.view import MeshView
from cluster.wire import Header, Opcode
from model.experts import ExpertWeights
from model.kernels import select_kernels
from model.linear import DenseWeight

NUM_EXPERTS, INNER, NUM_LAYERS = 60, 16, 3000
CPU = torch.device("cpu")


def form(store: Any, rank: int, world_size: int) -> MeshGroup:
    return form_group(
        store,
        "bench/1",
        rank=rank,
        world_size=world_size,
        host="127.0.0.1",
        device=CPU,
        formation_s=30.0,
        operation_s=60.0,
    )


def serve(transport: str, port: int, rank: int, world_size: int, hidden_size: int, answers: Any) -> None:
    """A shard that holds every expert; sends the seconds that each layer's computing took when the router closes."""
    torch.set_num_threads(1)
    kernels = select_kernels()
    generator = torch.Generator().manual_seed(0)

    def weight(*shape: int) -> Any:
        return kernels.pack_weight(DenseWeight(torch.randn(*shape, generator=generator) / 100))

    experts = {e: ExpertWeights(weight(2 * INNER, hidden_size), weight(hidden_size, INNER)) for e in range(NUM_EXPERTS)}
    table = kernels.expert_table(experts)
    shard = shard_transport(transport, form(connect_store("127.0.0.1", port, timeout_s=30), rank, world_size))
    taken: dict[int, float] = {}
    with torch.inference_mode():
        while (header := shard.next_header()).opcode != Opcode.CLOSE:
            if header.opcode == Opcode.IDLE:
                continue
            message = shard.receive(header)
            started = time.perf_counter()
            if header.num_rows:
                rows, pair_rows = message.rows_NH, message.pair_rows_P
                kernels.run_experts(
                    rows, pair_rows, message.pair_experts_P, message.pair_weights_P, table, message.sums_NH
                )
            taken[header.step] = time.perf_counter() - started
            shard.reply(header, message)
    answers.put(taken)


@dataclass
class FixedMembership:
    connection: Connection

    def newest(self) -> Connection:
        return self.connection

    def report(
        self, failed: Connection, suspects: tuple[str, ...], reason: str, *, left: Connection | None, goes_on: bool
    ) -> None:
        raise RuntimeError(reason)

    def wait_newer(self, epoch: int, deadline_s: float) -> Connection:
        raise RuntimeError("the group failed")


@contextmanager
def exchange_over(
    transport: str, num_shards: int, hidden_size: int
) -> Iterator[tuple[RemoteExchange, list[dict[int, float]]]]:
    """-> the router's exchange, and a list that has each shard's seconds by step when the body is done."""
    context = multiprocessing.get_context("spawn")
    answers, store, world_size = context.Queue(), host_store("127.0.0.1", timeout_s=30), num_shards + 1
    shards = [
        context.Process(target=serve, args=(transport, store.port, rank, world_size, hidden_size, answers))
        for rank in range(1, world_size)
    ]
    for shard in shards:
        shard.start()
    ids = [f"shard-{i}" for i in range(num_shards)]
    router = router_transport(transport, form(store, 0, world_size), ids)
    placement = spread_evenly(moe_layers=[0], num_experts=NUM_EXPERTS, nodes={i: i for i in ids})
    view = MeshView(epoch=1, shards=(None,) * num_shards, placement=placement)  # type: ignore[arg-type]
    exchange = RemoteExchange(
        FixedMembership(Connection.over(view, router, 1)),
        num_experts=NUM_EXPERTS,
        hidden_size=hidden_size,
        timeouts=Timeouts(),
        device=CPU,
        clock=time.monotonic,
    )
    exchange._connection = exchange._membership.newest()
    computed: list[dict[int, float]] = []
    try:
        yield exchange, computed
        router.announce(Header(Opcode.CLOSE, 1))
        computed += [answers.get(timeout=30) for _ in shards]
    finally:
        for shard in shards:
            shard.kill()
            shard.join()


def run(exchange: RemoteExchange, batch: int, hidden_size: int, top_k: int) -> list[tuple[float, float]]:
    """(seconds of dispatch, of dispatch and combine) of each layer; one layer a step."""
    generator = torch.Generator().manual_seed(1)
    layers = []
    for _ in range(64):
        weights, ids = torch.rand(batch, NUM_EXPERTS, generator=generator).topk(top_k)
        layers.append((torch.randn(batch, hidden_size, generator=generator), ids, weights))
    times = []
    with torch.inference_mode():
        for i in range(NUM_LAYERS):
            exchange.begin_step()
            x_TH, ids, weights = layers[i % len(layers)]
            started = time.perf_counter()
            receipt = exchange.dispatch(0, x_TH, ids, weights)
            sent = time.perf_counter()
            exchange.combine(receipt)
            times.append((sent - started, time.perf_counter() - started))
    return times


def measure(transport: str, num_shards: int, options: argparse.Namespace) -> str:
    with exchange_over(transport, num_shards, options.hidden) as (exchange, computed):
        times = run(exchange, options.batch, options.hidden, options.top_k)
    later = range(NUM_LAYERS // 3, NUM_LAYERS)
    slowest = [max(shard.get(i + 1, 0.0) for shard in computed) for i in later]
    added = sorted(times[i][1] - compute for i, compute in zip(later, slowest, strict=True))
    dispatch = statistics.median(times[i][0] for i in later)
    total = statistics.median(times[i][1] for i in later)
    figures = (total, statistics.median(slowest), added[len(added) // 2], added[int(len(added) * 0.9)], dispatch)
    return f"{transport:<12}{num_shards:>7}" + "".join(f"{seconds * 1e6:>12.0f}" for seconds in figures)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--top-k", type=int, default=4)
    parser.add_argument("--shards", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--transport", nargs="+", default=["star", "all_to_all", "host"])
    parser.add_argument("--profile", metavar="TRANSPORT")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.profile:
        with exchange_over(options.profile, 2, options.hidden) as (exchange, _):
            profile = cProfile.Profile()
            profile.runcall(run, exchange, options.batch, options.hidden, options.top_k)
        pstats.Stats(profile).sort_stats("tottime").print_stats(25)
        return
    print(f"{'transport':<12}{'shards':>7}" + "".join(f"{n:>12}" for n in ("total", "compute", "added", "p90", "send")))
    for transport in options.transport:
        for num_shards in options.shards:
            print(measure(transport, num_shards, options), flush=True)


if __name__ == "__main__":
    main()
