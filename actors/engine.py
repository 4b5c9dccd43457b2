"""The router's engine: one thread, one loop. A step is: schedule, run, sample, commit.

Everything else meets it in two places. Requests and aborts come in through a locked inbox; what a step brought goes
out through `deliver`. So nobody waits for a step, and a step waits for nobody but the shards.
"""

from __future__ import annotations

import logging
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from actors.admission import admit
from actors.batch import build_batch
from actors.engine_model import EngineModel
from actors.micro_batches import MicroBatches
from actors.pace import Pace
from actors.request import Chunk, GenerateRequest, PoolRequest, Request, error_chunk
from actors.scheduler import Scheduled, Scheduler
from actors.sequence import Sequence
from actors.specs import TwoBatchOverlap
from actors.step_outputs import Draw, ExpertRecorder, draw_tokens, gather_rows, wants_experts
from cluster.errors import MeshUnavailable
from model.moe import Exchange
from model.structured import Matcher

log = logging.getLogger("expertmesh.engine")
ROW_CHARS_AT_ONCE = 256 * 1024  # of a pool result: writing or reading them holds others up for a millisecond


class StepExchange(Exchange, Protocol):
    """An exchange that knows about steps. One that overrides nothing has no use for them.

    while_waiting: called now and then when a step has to wait for a new epoch, so that aborts and deadlines go on.
    recovery_s: how long recoveries have held steps up, all together. num_lanes: dispatches that may be under way at
    once.
    """

    num_lanes: int = 1
    while_waiting: Callable[[], None] = staticmethod(lambda: None)
    recovery_s: float = 0.0

    def begin_step(self) -> None:
        return None

    def idle(self) -> None:
        return None

    def close(self) -> None:
        return None


@dataclass(slots=True)
class EngineStats:
    num_steps: int = 0
    num_overlapped_steps: int = 0
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    num_cached_tokens: int = 0
    step_s: float = 0.0


@dataclass(slots=True)
class _Inbox:
    lock: threading.Condition = field(default_factory=threading.Condition)
    arrivals: list[tuple[str, Request, Matcher | None, float]] = field(default_factory=list)
    aborts: list[tuple[str, str]] = field(default_factory=list)
    calls: list[Callable[[], None]] = field(default_factory=list)


Deliver = Callable[[Mapping[str, list[Chunk]]], None]


class Engine:
    """deliver(chunks by owner) is called from the engine's thread, once a step, for refusals, and
    for some rows of a pool result at a time."""

    def __init__(
        self,
        model: EngineModel,
        scheduler: Scheduler,
        exchange: StepExchange,
        deliver: Deliver,
        clock: Callable[[], float] = time.monotonic,
        two_batch_overlap: TwoBatchOverlap = "auto",
    ) -> None:
        self.model = model
        self.scheduler = scheduler
        self.exchange = exchange
        self.stats = EngineStats()
        self._deliver = deliver
        self._clock = clock
        exchange.while_waiting = self._take_inbox
        self._inbox = _Inbox()
        self._outbox: dict[str, list[Chunk]] = {}
        self._by_id: dict[tuple[str, str], Sequence] = {}
        self._num_arrivals = 0
        self._stopping = False
        self._pace = Pace()
        self._micro_batches = MicroBatches(two_batch_overlap, exchange.num_lanes)
        self._work: list[Scheduled] = []
        self._next_sweep = 0.0
        self._was_busy = False
        self._recovery_s = 0.0  # of the last step

    # ---- called from other threads -------------------------------------------------------------------

    def submit(self, owner: str, request: Request, matcher: Matcher | None = None) -> None:
        """Queue a request; its chunks come through deliver."""
        with self._inbox.lock:
            self._inbox.arrivals.append((owner, request, matcher, self._clock()))
            self._inbox.lock.notify()

    def abort(self, owner: str, request_id: str) -> None:
        """Forget a request; its blocks are free before the next step. Unknown ids are fine."""
        with self._inbox.lock:
            self._inbox.aborts.append((owner, request_id))
            self._inbox.lock.notify()

    def abort_all(self, owner: str) -> None:
        """The owner is gone."""

        def drop_all() -> None:
            for key in [key for key in self._by_id if key[0] == owner]:
                self._drop(key)

        self.call(drop_all)

    def call(self, function: Callable[[], None]) -> None:
        """Run a function on the engine's thread between steps."""
        with self._inbox.lock:
            self._inbox.calls.append(function)
            self._inbox.lock.notify()

    def stop(self) -> None:
        with self._inbox.lock:
            self._stopping = True
            self._inbox.lock.notify()

    # ---- the loop ------------------------------------------------------------------------------------

    def run(self) -> None:
        """Loop until stop(). An error in a step fails that step's requests and nothing else."""
        with torch.inference_mode():
            while not self._stopping:
                self._take_inbox()
                if self.scheduler.has_work:
                    self._was_busy = True
                    self._guarded_step()
                else:
                    self._rest()
        self.exchange.close()

    def _rest(self) -> None:
        if self._was_busy:
            self._was_busy = False
            self.scheduler.check_integrity()
        self.exchange.idle()
        inbox = self._inbox
        with inbox.lock:
            inbox.lock.wait_for(
                lambda: self._stopping or bool(inbox.arrivals or inbox.aborts or inbox.calls), timeout=0.25
            )

    def _guarded_step(self) -> None:
        try:
            self.step()
        except MeshUnavailable as error:
            self._fail(list(self.scheduler), 503, "mesh_unavailable", str(error))
        except Exception as error:
            log.error("a step failed: %s", traceback.format_exc())
            there = [item.sequence for item in self._work if self._is_known(item.sequence)]
            self._fail(there or list(self.scheduler), 500, "internal_error", f"a step failed: {type(error).__name__}")
        self._flush()

    def step(self) -> None:
        """One forward pass for everything scheduled."""
        started, recovery_s = self._clock(), self.exchange.recovery_s
        self._work = []  # should what comes now fail, it isn't the last step's requests that it failed over
        self.exchange.begin_step()
        work = self._work = self.scheduler.schedule(self._pace.prefill_budget(*self.scheduler.rivals()))
        if not work:
            return
        for item in work:
            if item.sequence.scheduled_at is None:
                item.sequence.scheduled_at = started
        hidden_TH = self._run(work)
        self._recovery_s = self.exchange.recovery_s - recovery_s
        draws: Mapping[int, Draw] = {}
        if self.model.lm_head is not None:
            draws = draw_tokens(work, hidden_TH, self.model.lm_head, self.model.decoder.kernels.draw_tokens)
        self._commit(work, draws)
        duration_s = self._clock() - started
        if self._recovery_s == 0.0:
            self._pace.observe(work, duration_s)
            self._micro_batches.observe(duration_s)
        self.stats.num_steps += 1
        self.stats.step_s += duration_s

    def _run(self, work: list[Scheduled]) -> Tensor:
        model = self.model
        num_groups, block_size = len(self.scheduler.blocks.pools), model.kv_cache.block_size
        batches = [build_batch(part, num_groups, block_size, model.device) for part in self._micro_batches.split(work)]
        self.stats.num_overlapped_steps += len(batches) > 1
        recorder = ExpertRecorder(self.exchange) if any(wants_experts(item.sequence) for item in work) else None
        hidden_TH = model.decoder.forward(batches, model.kv_cache, recorder or self.exchange)
        if recorder is not None:
            recorder.keep(work)
        gather_rows(work, hidden_TH, model.lm_head, model.heads)
        return hidden_TH

    # ---- commit --------------------------------------------------------------------------------------

    def _commit(self, work: list[Scheduled], draws: Mapping[int, Draw]) -> None:
        alive = [item for item in work if self._is_known(item.sequence)]
        self.scheduler.commit(alive)
        for idx, item in enumerate(work):
            sequence = item.sequence
            self.stats.num_prompt_tokens += max(0, min(item.end, sequence.prompt_len) - item.begin)
            if not self._is_known(sequence):
                continue
            if idx in draws:
                self._append(sequence, draws[idx])
            elif isinstance(sequence.request, PoolRequest):
                self._send_rows(item, sequence.request)

    def _append(self, sequence: Sequence, draw: Draw) -> None:
        """Keep a drawn token and apply the stop rules."""
        request, sampler, token = sequence.request, sequence.sampler, draw.token_id
        assert isinstance(request, GenerateRequest) and sampler is not None
        if draw.error is not None:
            status, code = (500, "not_finite") if "finite" in draw.error else (400, "no_token_possible")
            self._finish(sequence, error_chunk(request.request_id, status, code, draw.error))
            return
        sequence.token_ids.append(token)
        sampler.append(token)
        matcher = sequence.matcher
        if matcher is not None and not matcher.accept(token):
            message = f"the grammar could not be followed further: {matcher.error}"
            self._finish(sequence, error_chunk(request.request_id, 400, "grammar_limit", message))
            return
        self.stats.num_output_tokens += 1
        chunk = Chunk(
            request_id=request.request_id,
            token_ids=[token],
            logprobs=[draw.logprobs] if draw.logprobs is not None else None,
            num_cached_tokens=sequence.num_cached_tokens or 0,
            routed_experts=sequence.routed_experts or None,
            recovery_s=self._recovery_s,
        )
        sequence.routed_experts = []
        params = request.sampling
        num_outputs = len(sequence.token_ids) - sequence.prompt_len
        if num_outputs == len(request.output_ids) + 1:
            chunk.timing = self._timing(sequence)
            chunk.prompt_logprobs = sequence.prompt_logprobs if params.prompt_logprobs is not None else None
        if token in self.model.eos_token_ids and not params.ignore_eos:
            chunk.finish_reason = "stop"
        elif token in sampler.stop_token_ids:
            chunk.finish_reason, chunk.stop_reason = "stop", token
        elif matcher is not None and matcher.is_finished:
            chunk.finish_reason = "stop"
        elif num_outputs == params.max_tokens or len(sequence.token_ids) >= self.model.max_model_len:
            chunk.finish_reason = "length"
        if chunk.finish_reason is not None:
            self._finish(sequence, chunk)
        else:
            self._emit(sequence.owner, chunk)

    def _send_rows(self, item: Scheduled, request: PoolRequest) -> None:
        """What the step brought for a pool request, some rows at a time: each delivery is a line of its own."""
        sequence = item.sequence
        rows, sequence.pooled = sequence.pooled, []
        first_row = item.begin if request.tokens == "all" else 0  # after a preemption they come once more
        num_at_once = max(1, ROW_CHARS_AT_ONCE // len(rows[0])) if rows else 1
        for i in range(0, len(rows), num_at_once):
            chunk = Chunk(request_id=request.request_id, values=rows[i : i + num_at_once], first_row=first_row + i)
            if i + num_at_once < len(rows) or not item.samples:
                self._emit(sequence.owner, chunk)
            else:
                chunk.finish_reason = "stop"
                chunk.num_cached_tokens = sequence.num_cached_tokens or 0
                chunk.timing, chunk.recovery_s = self._timing(sequence), self._recovery_s
                self._finish(sequence, chunk)
            self._flush()

    def _timing(self, sequence: Sequence) -> tuple[float, float]:
        """Seconds in the queue, and from there to now."""
        arrived, scheduled = sequence.deadline - sequence.request.deadline_s, sequence.scheduled_at
        assert scheduled is not None
        return round(scheduled - arrived, 6), round(self._clock() - scheduled, 6)

    def _is_known(self, sequence: Sequence) -> bool:
        return self._by_id.get((sequence.owner, sequence.request.request_id)) is sequence

    # ---- requests in and out -------------------------------------------------------------------------

    def _take_inbox(self) -> None:
        inbox = self._inbox
        with inbox.lock:
            arrivals, inbox.arrivals = inbox.arrivals, []
            aborts, inbox.aborts = inbox.aborts, []
            calls, inbox.calls = inbox.calls, []
        for owner, request, matcher, arrived in arrivals:
            refusal = self._admit(owner, request, matcher, arrived)
            if refusal is not None:
                self._emit(owner, refusal)
        for key in aborts:
            self._drop(key)
        for call in calls:  # after the arrivals: an owner that is gone leaves none of them behind
            try:
                call()
            except Exception:  # of no request: none may fail for it, nor the loop end
                log.exception("a call between steps failed")
        now = self._clock()
        if now >= self._next_sweep:
            self._next_sweep = now + 0.1
            self._expire(now)
        self._flush()

    def _admit(self, owner: str, request: Request, matcher: Matcher | None, arrived: float) -> Chunk | None:
        """Queue the request, or say why not."""
        request_id = request.request_id
        if (owner, request_id) in self._by_id:
            return error_chunk(request_id, 400, "duplicate_request_id", f"request_id {request_id!r} is in use")
        if self.scheduler.is_full:
            limit = self.scheduler.limits.max_queue
            return error_chunk(request_id, 503, "queue_full", f"{limit} requests are waiting already; try again soon")
        admitted = admit(
            request,
            self.model,
            self.scheduler.blocks,
            owner=owner,
            arrival=self._num_arrivals,
            deadline=arrived + request.deadline_s,
            matcher=matcher,
        )
        if isinstance(admitted, Chunk):
            return admitted
        self._num_arrivals += 1
        self._by_id[owner, request_id] = admitted
        self.scheduler.add(admitted)
        return None

    def _expire(self, now: float) -> None:
        for sequence in [s for s in self.scheduler if s.deadline <= now]:
            message = f"the request's deadline of {sequence.request.deadline_s:g} s has passed"
            self._finish(sequence, error_chunk(sequence.request.request_id, 504, "deadline_exceeded", message))

    def _drop(self, key: tuple[str, str]) -> None:
        sequence = self._by_id.pop(key, None)
        if sequence is not None:
            self.scheduler.remove(sequence)

    def _finish(self, sequence: Sequence, chunk: Chunk) -> None:
        self._drop((sequence.owner, sequence.request.request_id))
        self._emit(sequence.owner, chunk)

    def _fail(self, sequences: list[Sequence], status: int, code: str, message: str) -> None:
        for sequence in sequences:
            self._finish(sequence, error_chunk(sequence.request.request_id, status, code, message))

    def _emit(self, owner: str, chunk: Chunk) -> None:
        self._outbox.setdefault(owner, []).append(chunk)

    def _flush(self) -> None:
        if self._outbox:
            outbox, self._outbox = self._outbox, {}
            self._deliver(outbox)
