"""Who gets how many tokens in the next step.

Each step serves, in this order and within one token budget: running sequences (a decode is one token, a prefill the
next chunk of its prompt), then waiting ones while there are seats and blocks. One that needs a block which a running
sequence is about to compute waits for it: n answers to one prompt compute it once. Decodes are never kept waiting by a
prefill: they come first and the prefill gets what is left. When blocks run out, the last sequence in order loses
its blocks and waits again with its tokens; it is computed anew later (and, sampling being keyed by position, goes
on with the same tokens).

Order: lower `priority` value first, then first come first served.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from actors.blocks import BlockManager
from actors.sequence import Sequence
from actors.specs import SchedulerLimits


@dataclass(frozen=True, slots=True)
class Scheduled:
    """Tokens [begin, end) of one sequence go through this step. `samples`: its last known token is among them."""

    sequence: Sequence
    begin: int
    end: int

    @property
    def samples(self) -> bool:
        return self.end == len(self.sequence.token_ids)


def count_tokens(work: Iterable[Scheduled]) -> tuple[int, int]:
    """(decodes, prompt tokens); a prompt's last token by itself counts as a decode, as it costs what one does."""
    lengths = [item.end - item.begin for item in work]
    num_decodes = lengths.count(1)
    return num_decodes, sum(lengths) - num_decodes


class Scheduler:
    """Owns the waiting and the running sequences and their block tables. Not thread-safe: the engine's thread."""

    def __init__(self, limits: SchedulerLimits, blocks: BlockManager) -> None:
        self.limits = limits
        self.blocks = blocks
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self.num_prefix_queries = 0  # prompt tokens looked up in the prefix cache, and
        self.num_prefix_hits = 0  # those found there

    def __iter__(self) -> Iterator[Sequence]:
        yield from self.running
        yield from self.waiting

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.waiting)

    @property
    def is_full(self) -> bool:
        return len(self.waiting) >= self.limits.max_queue

    def rivals(self) -> tuple[int, int]:
        """(sequences that decode, those that have prompt tokens left and a seat or a free one)."""
        num_decodes = sum(s.num_to_compute == 1 for s in self.running)
        num_free = self.limits.max_num_seqs - len(self.running)
        return num_decodes, len(self.running) - num_decodes + min(len(self.waiting), num_free)

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)
        self.waiting.sort(key=lambda s: s.order)

    def remove(self, sequence: Sequence) -> None:
        """Take a finished or aborted sequence out and give its blocks back."""
        (self.running if sequence in self.running else self.waiting).remove(sequence)
        self.blocks.release(sequence.table)

    def schedule(self, prefill_budget: int | None = None) -> list[Scheduled]:
        """Pick this step's work. prefill_budget: at most so many prompt tokens while decodes are running."""
        budget = self.limits.max_num_batched_tokens
        work: list[Scheduled] = []
        decodes = [s for s in self.running if s.num_to_compute == 1]
        prefills = [s for s in self.running if s.num_to_compute > 1]
        for sequence in decodes:
            if sequence in self.running and self._make_room(sequence, len(sequence.token_ids), work):
                work.append(Scheduled(sequence, sequence.num_computed, len(sequence.token_ids)))
        budget -= len(work)
        if prefill_budget is not None and work:
            budget = min(budget, prefill_budget)
        for sequence in prefills:
            if budget > 0 and sequence in self.running:
                budget -= self._schedule_chunk(sequence, budget, work)
        num_sharing = 0  # these keep their seats
        for sequence in self.waiting[:]:
            if budget <= 0 or len(self.running) + num_sharing >= self.limits.max_num_seqs:
                break
            if self._will_share(sequence):
                num_sharing += 1
                continue
            taken = self._admit(sequence, budget, work)
            if taken == 0:
                break
            budget -= taken
        return work

    def commit(self, work: list[Scheduled]) -> None:
        """The step's keys and values are written. Call before new tokens are appended."""
        for item in work:
            sequence = item.sequence
            sequence.num_computed = item.end
            self.blocks.commit(sequence.table, sequence.token_ids, item.end, sequence.scope)

    def check_integrity(self) -> None:
        """AssertionError where blocks and tables don't agree. Cheap enough for idle moments only."""
        self.blocks.check_integrity([s.table for s in self])

    def _schedule_chunk(self, sequence: Sequence, budget: int, work: list[Scheduled]) -> int:
        end = min(len(sequence.token_ids), sequence.num_computed + budget)
        if not self._make_room(sequence, end, work):
            return 0
        work.append(Scheduled(sequence, sequence.num_computed, end))
        return end - sequence.num_computed

    def _will_share(self, sequence: Sequence) -> bool:
        """Whether a running sequence, before it in order, is about to compute a block that this one needs too."""
        if not sequence.may_use_prefix_cache:
            return False
        names = self.blocks.prefix_names(sequence.table, sequence.token_ids, sequence.scope)
        for other in self.running:
            i = other.num_computed // self.blocks.block_size
            if i < len(names) and other.may_use_prefix_cache and other.order < sequence.order:
                theirs = other.table.names
                if i < len(theirs) and theirs[i] == names[i]:
                    return True
        return False

    def _admit(self, sequence: Sequence, budget: int, work: list[Scheduled]) -> int:
        """Seat a waiting sequence if all its known tokens fit in the free blocks; tokens taken or 0."""
        blocks, table, num_tokens = self.blocks, sequence.table, len(sequence.token_ids)
        if sequence.may_use_prefix_cache:
            sequence.num_computed = blocks.match_prefix(table, sequence.token_ids, sequence.scope)
        end = min(num_tokens, sequence.num_computed + budget)
        num_drawn = 0 if sequence.sampler is None else 1
        if not blocks.fits(table, num_tokens + num_drawn) or not blocks.reserve(table, end):
            blocks.release(table)
            sequence.num_computed = 0
            return 0
        if sequence.num_cached_tokens is None:
            sequence.num_cached_tokens = sequence.num_computed
            if sequence.may_use_prefix_cache:
                self.num_prefix_queries += num_tokens
                self.num_prefix_hits += sequence.num_computed
        self.waiting.remove(sequence)
        self.running.append(sequence)
        self.running.sort(key=lambda s: s.order)
        work.append(Scheduled(sequence, sequence.num_computed, end))
        return end - sequence.num_computed

    def _make_room(self, sequence: Sequence, num_tokens: int, work: list[Scheduled]) -> bool:
        """Reserve blocks, preempting from the end of the order, also who is in `work` already; False when the sequence
        itself had to go."""
        while not self.blocks.reserve(sequence.table, num_tokens):
            victim = self.running[-1]
            work[:] = [item for item in work if item.sequence is not victim]
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.num_preemptions += 1
        self.running.remove(sequence)
        self.blocks.release(sequence.table)
        sequence.num_computed = 0
        self.add(sequence)
