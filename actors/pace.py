"""How much prefill a step may carry while others are decoding."""

from __future__ import annotations

from collections.abc import Sequence

from actors.scheduler import Scheduled, count_tokens


class Pace:
    """Keeps prefill chunks small enough that decodes running beside them are not held up.

    A step that carries both may take about `stretch` times a step with the same decodes alone, and more where more
    sequences wait for their first token than decode: those wait too, and each step reads the weights again. What a
    prompt token costs depends on too much to be modelled (the chunk's own length, the context before it, which experts
    it wakes), so the chunk follows the durations seen: shorter at once when steps were too long, longer in small moves.
    """

    stretch = 2.2
    most_waiting = 4.0  # for each that decodes; more of them stretch a step no further
    growth = 1.3  # of a step with twice the decodes, where none was seen yet
    smallest_chunk = 16
    first_chunk = 32

    def __init__(self) -> None:
        self._decode_step_s: dict[int, float] = {}  # by the bit length of the number of decodes
        self._chunk = float(self.first_chunk)
        self._budget = self.first_chunk
        self._allowed = self.stretch

    def prefill_budget(self, num_decodes: int, num_waiting: int) -> int:
        """Prompt tokens to allow beside so many decodes, when so many sequences wait for their first token."""
        self._allowed = self.stretch * min(max(num_waiting / max(num_decodes, 1), 1.0), self.most_waiting)
        self._budget = int(self._chunk * (self._allowed - 1.0) / (self.stretch - 1.0))
        return self._budget

    def observe(self, work: Sequence[Scheduled], duration_s: float) -> None:
        num_decodes, num_prompt = count_tokens(work)
        size = num_decodes.bit_length()
        if num_prompt == 0:
            old = self._decode_step_s.get(size, duration_s)
            # One step that the machine held up says little.
            self._decode_step_s[size] = 0.9 * old + 0.1 * min(duration_s, 2 * old)
        elif num_decodes and self._decode_step_s:
            nearest = min(self._decode_step_s, key=lambda known: abs(known - size))
            decode_step_s = self._decode_step_s[nearest] * self.growth ** (size - nearest)
            change = self._allowed * decode_step_s / duration_s
            is_whole = num_prompt >= 0.8 * self._budget  # a prompt's rest says nothing about longer chunks
            self._chunk *= min(max(change, 0.5), 1.1 if is_whole else 1.0)
            self._chunk = max(self._chunk, float(self.smallest_chunk))
