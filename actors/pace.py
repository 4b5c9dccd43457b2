"""How much prefill a step may carry while others are decoding."""

from __future__ import annotations

from collections.abc import Sequence

from actors.scheduler import Scheduled


class Pace:
    """Keeps prefill chunks small enough that decodes running beside them are not held up.

    A step with decodes may take about `stretch` times an ordinary decode step; what a prompt token costs is measured.
    """

    stretch = 2.0
    smallest_chunk = 16

    def __init__(self) -> None:
        self._decode_step_s: float | None = None
        self._prompt_token_s: float | None = None

    def prefill_budget(self) -> int | None:
        """Prompt tokens to allow beside running decodes; None while nothing is known."""
        if self._decode_step_s is None or self._prompt_token_s is None:
            return None
        spare_s = (self.stretch - 1) * self._decode_step_s
        return max(self.smallest_chunk, int(spare_s / max(self._prompt_token_s, 1e-9)))

    def observe(self, work: Sequence[Scheduled], duration_s: float) -> None:
        num_decodes = sum(item.end - item.begin == 1 for item in work)
        num_prompt = sum(item.end - item.begin for item in work) - num_decodes
        if num_prompt == 0:
            self._decode_step_s = _smoothed(self._decode_step_s, duration_s)
        elif num_prompt >= self.smallest_chunk:
            own_s = duration_s - (self._decode_step_s or 0.0) * bool(num_decodes)
            self._prompt_token_s = _smoothed(self._prompt_token_s, max(own_s, 0.0) / num_prompt)


def _smoothed(old: float | None, new: float) -> float:
    return new if old is None else 0.9 * old + 0.1 * new
