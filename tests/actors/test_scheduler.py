"""Scheduler and blocks against a cache that remembers what was written where."""

from __future__ import annotations

import itertools
from collections.abc import Sequence as Seq

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from actors.blocks import NULL_BLOCK, BlockManager, BlockPool
from actors.request import GenerateRequest, PoolRequest
from actors.scheduler import Scheduler
from actors.sequence import Sequence
from actors.specs import SchedulerLimits
from model.sampler_state import SamplerState
from model.sampling_params import SamplingParams

BLOCK = 4
WINDOW = 6
MAX_TOKENS = 40  # the smallest cache below holds one such sequence and the token it draws
MAX_SEQS, MAX_BATCHED = 4, 11
PROMPTS = st.lists(st.integers(0, 1), min_size=1, max_size=30)  # two tokens only: prefixes are often shared


class SchedulerMachine(RuleBasedStateMachine):
    """Requests come, compute and leave. `written[group][slot]` is the (scope, tokens up to there) of a cache slot."""

    @initialize(num_blocks=st.integers(12, 30), prefix_caching=st.booleans())
    def begin(self, num_blocks: int, prefix_caching: bool) -> None:
        windows = [None, WINDOW]
        self.blocks = BlockManager([BlockPool(num_blocks) for _ in windows], windows, BLOCK, prefix_caching)
        self.scheduler = Scheduler(
            SchedulerLimits(max_num_seqs=MAX_SEQS, max_num_batched_tokens=MAX_BATCHED), self.blocks
        )
        self.written: list[dict[int, tuple[str | None, tuple[int, ...]]]] = [{} for _ in windows]
        self.arrivals = itertools.count()
        self.num_expected: dict[Sequence, int] = {}

    @rule(
        prompt=PROMPTS,
        num_output=st.integers(1, 9),
        priority=st.integers(0, 2),
        scope=st.sampled_from([None, "salt"]),
        kind=st.sampled_from(["plain", "plain", "prompt_logprobs", "pool"]),
    )
    def add(self, prompt: list[int], num_output: int, priority: int, scope: str | None, kind: str) -> None:
        arrival = next(self.arrivals)
        common = {"request_id": str(arrival), "prompt_ids": tuple(prompt), "priority": priority}
        sampling = SamplingParams(prompt_logprobs=0 if kind == "prompt_logprobs" else None)
        sequence = Sequence(
            request=PoolRequest(head="h", tokens="all", **common)
            if kind == "pool"
            else GenerateRequest(sampling=sampling, **common),
            owner="o",
            arrival=arrival,
            deadline=1e9,
            table=self.blocks.new_table(),
            scope=scope if self.blocks.prefix_caching else str(arrival),
            sampler=None if kind == "pool" else SamplerState(sampling, prompt, ()),
            token_ids=list(prompt),
        )
        self.num_expected[sequence] = len(prompt) + (0 if kind == "pool" else num_output)
        self.scheduler.add(sequence)

    @precondition(lambda self: self.num_expected)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(sorted(self.num_expected, key=lambda s: s.arrival)))
        self.finish(sequence)

    @rule(prefill_budget=st.none() | st.integers(1, 8), token=st.integers(0, 1))
    def step(self, prefill_budget: int | None, token: int) -> None:
        self.run_step(prefill_budget, token)

    def run_step(self, prefill_budget: int | None, token: int) -> bool:
        """Whether anybody had work."""
        scheduler = self.scheduler
        running = list(scheduler.running)
        work = scheduler.schedule(prefill_budget)
        assert len({item.sequence for item in work}) == len(work)
        assert all(item.sequence in scheduler.running for item in work)
        assert sum(item.end - item.begin for item in work) <= MAX_BATCHED
        assert len(scheduler.running) <= MAX_SEQS
        served = {item.sequence for item in work}
        assert all(s in served for s in scheduler.running if s.num_to_compute == 1), "a decode is kept waiting"
        kept = [s for s in running if s in scheduler.running]
        assert running[: len(kept)] == kept, "the last in order loses its blocks"
        for item in work:
            self.compute(item.sequence, item.begin, item.end)
        scheduler.commit(work)
        for item in work:
            sequence = item.sequence
            if item.samples and sequence.sampler is not None and len(sequence.token_ids) < self.num_expected[sequence]:
                sequence.token_ids.append(token)
            elif item.samples:
                self.finish(sequence)
        return bool(work)

    def compute(self, sequence: Sequence, begin: int, end: int) -> None:
        """Write [begin, end), and look at all that attention looks at."""
        for group, window in enumerate(self.blocks.windows):
            table, written = sequence.table.tables[group], self.written[group]
            for position in range(begin, end):
                assert table[position // BLOCK] != NULL_BLOCK
                written[slot(table, position)] = content(sequence, position)
            for position in range(0 if window is None else max(0, begin - window + 1), end):
                assert written[slot(table, position)] == content(sequence, position), (group, position)

    def finish(self, sequence: Sequence) -> None:
        self.scheduler.remove(sequence)
        del self.num_expected[sequence]

    @invariant()
    def books_balance(self) -> None:
        self.scheduler.check_integrity()
        assert [s.order for s in self.scheduler.waiting] == sorted(s.order for s in self.scheduler.waiting)

    def teardown(self) -> None:
        """Whoever is left comes to its end."""
        for _ in range(1000):
            if not self.num_expected:
                break
            assert self.run_step(None, 1), "nobody can go on"
            self.scheduler.check_integrity()
        assert not self.num_expected
        assert self.blocks.usage() == 0


def slot(table: Seq[int], position: int) -> int:
    return table[position // BLOCK] * BLOCK + position % BLOCK


def content(sequence: Sequence, position: int) -> tuple[str | None, tuple[int, ...]]:
    return sequence.scope, tuple(sequence.token_ids[: position + 1])


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def scheduler_with(num_blocks: int) -> Scheduler:
    """One KV group, no window; see BLOCK."""
    limits = SchedulerLimits(max_num_seqs=4, max_num_batched_tokens=16)
    return Scheduler(limits, BlockManager([BlockPool(num_blocks)], [None], BLOCK, prefix_caching=True))


def added(
    scheduler: Scheduler, request_id: str, num_tokens: int, *, owner: str = "o", arrival: int = 0, priority: int = 0
) -> Sequence:
    """A sequence of its own tokens, waiting in the scheduler."""
    sampling = SamplingParams(prompt_logprobs=0)
    prompt = list(range(num_tokens))
    request = GenerateRequest(request_id=request_id, prompt_ids=tuple(prompt), sampling=sampling, priority=priority)
    sequence = Sequence(
        request=request,
        owner=owner,
        arrival=arrival,
        deadline=1e9,
        table=scheduler.blocks.new_table(),
        sampler=SamplerState(sampling, prompt, ()),
        token_ids=prompt,
    )
    scheduler.add(sequence)
    return sequence


def step(scheduler: Scheduler, prefill_budget: int | None = None) -> list[Sequence]:
    """Schedule, compute and draw; who was served."""
    work = scheduler.schedule(prefill_budget)
    scheduler.commit(work)
    for item in work:
        if item.samples:
            item.sequence.token_ids.append(7)
    scheduler.check_integrity()
    return [item.sequence for item in work]


def test_two_owners_may_use_one_request_id() -> None:
    """An ingress that comes back to its router replays before its former link is known to be gone."""
    scheduler = scheduler_with(num_blocks=6)
    old = added(scheduler, "same", 4, owner="old")
    new = added(scheduler, "same", 4, owner="new", arrival=1)
    while scheduler.num_preemptions == 0:
        assert old in step(scheduler)
    assert scheduler.running == [old] and scheduler.waiting == [new]


def test_the_first_in_order_keeps_its_blocks_when_a_decode_behind_it_holds_the_last_ones() -> None:
    scheduler = scheduler_with(num_blocks=17)
    last = added(scheduler, "last", 2, priority=5)
    step(scheduler)
    first = added(scheduler, "first", 42, arrival=1)
    while scheduler.num_preemptions == 0:
        assert first in step(scheduler, prefill_budget=2)
    assert scheduler.running == [first] and scheduler.waiting == [last]
