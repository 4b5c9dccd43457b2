"""Whether a step goes through the layers as one batch or as two micro-batches that take turns.

Two hide the shards' time behind the router's and the other way round, but each reads the expert weights again. Which
is faster depends on the device, the network, the batch and the model: so both are tried, and what took less time is
kept. The bits are the same either way. Source: MegaScale-Infer (arXiv:2504.02263), "ping-pong pipeline parallelism".
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from actors.scheduler import Scheduled, count_tokens
from actors.specs import TwoBatchOverlap

TRIES = 6
AGAIN_EVERY = 512
"""Steps after which the other way is tried anew: contexts grow, neighbours come and go."""
MIN_GAIN = 0.03
"""Of two micro-batches, or one stays."""


@dataclass(slots=True)
class _Alike:
    """Steps of about the same size. num_steps: since both ways were tried. times[n - 1]: seconds a token of the latest
    ones in n micro-batches."""

    num_steps: int = 0
    times: tuple[deque[float], ...] = field(default_factory=lambda: (deque(maxlen=TRIES), deque(maxlen=TRIES)))

    def choose(self) -> int:
        """In how many micro-batches the next one goes."""
        self.num_steps += 1
        one, two = self.times
        if len(two) < TRIES or len(one) < TRIES:
            return 1 if len(one) <= len(two) else 2
        best = 2 if statistics.median(two) < (1 - MIN_GAIN) * statistics.median(one) else 1
        if self.num_steps >= AGAIN_EVERY:
            self.num_steps = 0
            self.times[2 - best].clear()
        return best


class MicroBatches:
    """Decides for one engine. Steps are alike when decodes, and prompt tokens, have the same bit length."""

    def __init__(self, setting: TwoBatchOverlap, num_lanes: int) -> None:
        """num_lanes: exchanges that may be under way at once; 1 where there is nothing to wait for."""
        self._setting = setting if num_lanes > 1 else "never"
        self._alike: dict[tuple[int, int], _Alike] = {}
        self._measured: tuple[deque[float], int] | None = None  # where the step's time goes, and its tokens

    def split(self, work: Sequence[Scheduled]) -> list[list[Scheduled]]:
        """The step's work in one part or two, in order."""
        num_decodes, num_prompt = count_tokens(work)
        num_tokens, num_parts, self._measured = num_decodes + num_prompt, 1, None
        if num_tokens > 1 and self._setting == "always":
            num_parts = 2
        elif num_tokens > 1 and self._setting == "auto":
            size = num_decodes.bit_length(), num_prompt.bit_length()
            if size not in self._alike:
                self._alike[size] = _Alike()
            num_parts = self._alike[size].choose()
            self._measured = self._alike[size].times[num_parts - 1], num_tokens
        return [list(work)] if num_parts == 1 else _halves(work, num_tokens // 2)

    def observe(self, duration_s: float) -> None:
        """How long the step took that was split last, if nothing held it up."""
        if self._measured is not None:
            times, num_tokens = self._measured
            times.append(duration_s / num_tokens)


def _halves(work: Sequence[Scheduled], num_first: int) -> list[list[Scheduled]]:
    """The first num_first tokens, and the others; a chunk of a prompt may be cut."""
    first: list[Scheduled] = []
    second: list[Scheduled] = []
    for item in work:
        cut = min(item.begin + num_first, item.end)
        num_first -= cut - item.begin
        if cut > item.begin:
            first.append(Scheduled(item.sequence, item.begin, cut))
        if cut < item.end:
            second.append(Scheduled(item.sequence, cut, item.end))
    return [first, second]
