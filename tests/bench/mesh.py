"""Real routers and shards in processes of their own, without Ray, HTTP and supervisor: what the engine itself takes.

    with Mesh(path, shards=2, quantization="int8") as mesh:
        mesh.decode(batch=8, prompt=128, new=32)

The parent process hands out one view for good. Shards answer `join` on a unix socket, as Ray would call them.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any, Self

from actors.micro_batches import TRIES
from actors.specs import RouterSpec, SchedulerLimits, ShardSpec, TwoBatchOverlap
from cluster.placement import spread_evenly
from cluster.settings import Timeouts
from cluster.view import Member, MeshView

KEY = b"bench"
TIMEOUTS = Timeouts(formation_s=30.0)
WAIT_S = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrangement:
    """shards=0: all experts in the router. threads: of the router; a shard has one."""

    shards: int = 0
    routers: int = 1
    threads: int = 1
    quantization: str | None = None
    transport: str = "auto"
    two_batch_overlap: TwoBatchOverlap = "auto"
    max_num_seqs: int = 128
    max_model_len: int = 2048

    def __str__(self) -> str:
        return f"{self.quantization or 'bf16'}, {place(self.shards, self.routers, self.threads)}"


def place(shards: int, routers: int, threads: int) -> str:
    """An arrangement in words, without its precision."""
    words = [f"{shards} shard{'s' * (shards > 1)}"] if shards else ["local"]
    words += [f"{routers} routers"] if routers > 1 else []
    return ", ".join(words + ([f"router with {threads} threads"] if threads > 1 else []))


class Mesh:
    """Starts everything; decode() and prefill() run on all routers at once and give a list with one result each."""

    def __init__(self, model: Path, arrangement: Arrangement) -> None:
        self._model = model
        self._arrangement = arrangement
        self._processes: list[Any] = []
        self._folder = tempfile.TemporaryDirectory()
        self._routers: list[Connection] = []
        self.num_experts = 0

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start(self) -> None:
        from model.config import ModelConfig

        arrangement, context = self._arrangement, multiprocessing.get_context("spawn")
        config = ModelConfig.from_directory(self._model)
        self.num_experts = config.num_experts
        shard_ids = [f"shard-{i}" for i in range(arrangement.shards)]
        view = None
        ready: list[Connection] = []
        if shard_ids:
            placement = spread_evenly(
                moe_layers=list(config.moe_layers), num_experts=config.num_experts, nodes=dict.fromkeys(shard_ids, "n")
            )
            members = [
                Member(shard_id=s, actor_name=f"{self._folder.name}/{s}", node_id="n", host="127.0.0.1", pid=0)
                for s in shard_ids
            ]
            view = MeshView(epoch=1, shards=tuple(members), placement=placement, reason="bench")
            spec = ShardSpec(model=str(self._model), quantization=arrangement.quantization, timeouts=TIMEOUTS)
            for member in members:
                keys = sorted(placement.held_by(member.shard_id))
                ready.append(self._spawn(context, _shard_main, member, spec, keys))
        for number in range(arrangement.routers):
            router = RouterSpec(
                model=str(self._model),
                served_name="bench",
                quantization=arrangement.quantization,
                limits=SchedulerLimits(
                    max_num_seqs=arrangement.max_num_seqs, max_num_batched_tokens=2048, max_queue=4096
                ),
                kv_cache_bytes=2 << 30,
                max_model_len=arrangement.max_model_len,
                prefix_caching=False,
                timeouts=TIMEOUTS,
                transport=arrangement.transport,
                two_batch_overlap=arrangement.two_batch_overlap,
                num_threads=arrangement.threads,
                local=not shard_ids,
                num_routers=arrangement.routers,
            )
            self._routers.append(self._spawn(context, _router_main, f"router-{number}", router, view))
        for connection in [*ready, *self._routers]:
            _receive(connection)
        self._ask("start")

    def _spawn(self, context: Any, function: Callable[..., None], *arguments: Any) -> Connection:
        ours, theirs = context.Pipe()
        process = context.Process(target=function, args=(theirs, *arguments), daemon=True)
        process.start()
        theirs.close()
        self._processes.append(process)
        return ours  # type: ignore[no-any-return]

    def decode(self, *, batch: int, prompt: int, num_steps: int = 32) -> list[dict[str, Any]]:
        """`batch` requests at once on each router, over so many steps in which all of them decode."""
        return self._ask("decode", batch, prompt, num_steps)

    def prefill(self, num_tokens: int = 512, repeats: int = 3) -> list[dict[str, Any]]:
        """Tokens a second of a prompt alone, median: {"tok_s"}."""
        return self._ask("prefill", num_tokens, repeats)

    def drain(self, num_requests: int, new: int) -> list[dict[str, Any]]:
        """Seconds until so many requests, sent at once, are done: {"seconds", "tok_s"}."""
        return self._ask("drain", num_requests, new)

    def _ask(self, *command: Any) -> list[dict[str, Any]]:
        for router in self._routers:
            router.send(command)
        return [_receive(router) for router in self._routers]

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join(10)
        self._folder.cleanup()


def _receive(connection: Connection) -> Any:
    """Raises RuntimeError with what the other side raised."""
    kind, value = connection.recv()
    if kind == "error":
        raise RuntimeError(value)
    return value


@contextlib.contextmanager
def _errors_to(connection: Connection) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        connection.send(("error", f"{type(error).__name__}: {error}"))
        raise


# ---- a shard's process -------------------------------------------------------------------------------


def _shard_main(parent: Connection, member: Member, spec: ShardSpec, keys: list[tuple[int, int]]) -> None:
    import torch

    from actors.shard import ExpertShard

    with _errors_to(parent):
        shard = ExpertShard(member.shard_id, spec, host=member.host, node_id="n", device=torch.device("cpu"))
        shard.load(keys)
        times: list[tuple[int, float]] = []
        compute = shard._compute

        def timed(header: Any, message: Any) -> Any:
            before = shard._busy_s
            result = compute(header, message)
            times.append((header.layer, shard._busy_s - before))
            return result

        shard._compute = timed  # type: ignore[method-assign]
        listener = Listener(member.actor_name, authkey=KEY)
        parent.send(("ok", None))
    while True:
        threading.Thread(target=_answer, args=(listener.accept(), shard, times), daemon=True).start()


def _answer(connection: Connection, shard: Any, times: list[tuple[int, float]]) -> None:
    with contextlib.suppress(EOFError):
        while True:
            command, arguments = connection.recv()
            if command == "join":
                shard.join(**arguments)
            taken, times[:] = list(times), []
            connection.send(taken)


# ---- a router's process ------------------------------------------------------------------------------


class FixedMesh:
    """A MeshClient whose view never changes."""

    def __init__(self, view: MeshView | None) -> None:
        self._view = view
        self._given = False
        self._shards = [Client(member.actor_name, authkey=KEY) for member in view.shards] if view else []

    def next_view(self, router_id: str, seen_epoch: int, live_epoch: int) -> MeshView | None:
        if self._given or self._view is None:
            time.sleep(1.0)
            return None
        self._given = True
        return self._view

    def join(self, view: MeshView, **arguments: Any) -> Callable[[], tuple[str, ...]]:
        for rank, shard in enumerate(self._shards, 1):
            shard.send(("join", {**arguments, "epoch": 1, "rank": rank, "world_size": len(self._shards) + 1}))

        def wait() -> tuple[str, ...]:
            for shard in self._shards:
                shard.recv()
            return ()

        return wait

    def report(self, router_id: str, epoch: int, suspects: tuple[str, ...], reason: str) -> None:
        print(f"{router_id}: epoch {epoch} failed at {suspects}: {reason}", flush=True)
        os._exit(1)

    def times(self) -> list[list[tuple[int, float]]]:
        """(layer, seconds) of each shard's exchanges since last asked, for whichever router."""
        for shard in self._shards:
            shard.send(("times", {}))
        return [shard.recv() for shard in self._shards]


def _router_main(parent: Connection, router_id: str, spec: RouterSpec, view: MeshView | None) -> None:
    import torch

    from actors.router import Router

    with _errors_to(parent):
        client: list[FixedMesh] = []

        class Late:
            """The shards listen once they have loaded; the router loads meanwhile."""

            def __getattr__(self, name: str) -> Any:
                return getattr(client[0], name)

        router = Router(router_id, spec, host="127.0.0.1", device=torch.device("cpu"), client=Late())  # type: ignore[arg-type]
        parent.send(("ok", None))
        parent.recv()
        client.append(FixedMesh(view))
        bench = RouterBench(router, client[0])
        parent.send(("ok", {}))
        while True:
            name, *arguments = parent.recv()
            parent.send(("ok", getattr(bench, name)(*arguments)))


class RouterBench:
    """Loads on one router's engine, from its own process."""

    def __init__(self, router: Any, client: FixedMesh) -> None:
        from tests.bench.step_parts import StepClock

        self._router = router
        self._vocab = router.engine.model.decoder.config.vocab_size
        self._num_left = 0
        self._changed = threading.Condition()
        self._number = 0
        router.engine._deliver = self._deliver
        # The shards of two routers count both routers' exchanges: no split of a step's time there.
        self._clock = StepClock(router, client.times)
        router.start()
        deadline = time.monotonic() + 60
        while not router.is_ready:
            if time.monotonic() > deadline:
                raise RuntimeError("the shards were not joined within 60 s")
            time.sleep(0.02)

    def _deliver(self, outbox: Any) -> None:
        with self._changed:
            for chunks in outbox.values():
                for chunk in chunks:
                    if chunk.error is not None:
                        raise RuntimeError(str(chunk.error))
                    self._num_left -= chunk.finish_reason is not None
            self._changed.notify_all()

    def _send(self, num_requests: int, prompt: int, new: int) -> list[str]:
        """Their ids."""
        import torch

        from actors.request import GenerateRequest
        from model.sampling_params import SamplingParams

        generator = torch.Generator().manual_seed(self._number)
        params = SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True)
        requests = []
        for _ in range(num_requests):
            self._number += 1
            ids = torch.randint(3, self._vocab, (prompt,), generator=generator).tolist()
            requests.append(GenerateRequest(request_id=str(self._number), prompt_ids=tuple(ids), sampling=params))
        self._num_left = num_requests
        self._clock.steps.clear()
        for request in requests:
            self._router.engine.submit("bench", request)
        return [request.request_id for request in requests]

    def _run(self, num_requests: int, prompt: int, new: int) -> float:
        """Seconds until all are done."""
        began = time.perf_counter()
        self._send(num_requests, prompt, new)
        with self._changed:
            if not self._changed.wait_for(lambda: self._num_left == 0, WAIT_S):
                raise RuntimeError(f"the requests did not end within {WAIT_S:.0f} s")
        return time.perf_counter() - began

    def _whole(self, batch: int) -> list[Any]:
        """Steps in which all decode. The first two still have what the prompts left in the caches, and those after them
        try both one and two micro-batches."""
        steps = [step for step in self._clock.steps if step.num_decodes == batch and step.num_prompt == 0]
        return steps[2 + 2 * TRIES :]

    def decode(self, batch: int, prompt: int, num_steps: int) -> dict[str, Any]:
        """{"step_ms" (median), "tok_s", "context", "parts" (see step_parts.split), "uses": distinct experts of a
        layer in a step, with shards only, else 0}. Prompts are let in slowly beside decodes, so the requests go on
        until there are enough steps, and are then aborted."""
        from tests.bench.step_parts import split

        ids = self._send(batch, prompt, 1 << 20)
        end = time.monotonic() + WAIT_S
        while len(self._whole(batch)) < num_steps:
            if time.monotonic() > end:
                raise RuntimeError(f"only {len(self._whole(batch))} of {num_steps} steps within {WAIT_S:.0f} s")
            time.sleep(0.05)
        for request_id in ids:
            self._router.engine.abort("bench", request_id)
        while self._router.engine.scheduler.has_work:
            time.sleep(0.02)
        steps = self._whole(batch)[:num_steps]
        step_s = statistics.median(step.seconds for step in steps)
        return {
            "step_ms": 1e3 * step_s,
            "tok_s": batch / step_s,
            "context": statistics.mean(step.context for step in steps),
            "parts": split(steps),
            "uses": statistics.mean(step.uses for step in steps),
        }

    def prefill(self, num_tokens: int, repeats: int) -> dict[str, Any]:
        rates = [num_tokens / self._run(1, num_tokens, 1) for _ in range(repeats + 1)]
        return {"tok_s": statistics.median(rates[1:])}

    def drain(self, num_requests: int, new: int) -> dict[str, Any]:
        seconds = self._run(num_requests, 16, new)
        return {"seconds": seconds, "tok_s": num_requests * new / seconds, "num_steps": len(self._clock.steps)}
