"""Finds stop strings in a text that grows, and says how much of its end might still become one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StopMatch:
    """A stop string at [start, end) of all text fed so far."""

    stop: str
    start: int
    end: int


class StopStrings:
    """One Knuth-Morris-Pratt automaton per stop string: constant work per character and string.

    The match that ends first wins, and of those that end together the longest."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = sorted(set(stops), key=len, reverse=True)
        self._failures = [_failures(stop) for stop in self._stops]
        self._states = [0] * len(self._stops)
        self._num_chars = 0

    @property
    def num_held(self) -> int:
        """Characters at the end that are the beginning of a stop string: not to be shown yet."""
        return max(self._states, default=0)

    def feed(self, text: str, *, search: bool = True) -> StopMatch | None:
        """Reads more text. Without `search` (before min_tokens) it can begin a match, but what ends in it is none."""
        for char in text if self._stops else ():
            self._num_chars += 1
            for i, stop in enumerate(self._stops):
                state = self._states[i]
                while state and stop[state] != char:
                    state = self._failures[i][state - 1]
                state += stop[state] == char
                if state == len(stop):
                    if search:
                        return StopMatch(stop, self._num_chars - len(stop), self._num_chars)
                    state = self._failures[i][-1]
                self._states[i] = state
        return None


def _failures(pattern: str) -> list[int]:
    """For each prefix of the pattern, the length of its longest border."""
    table = [0] * len(pattern)
    length = 0
    for i in range(1, len(pattern)):
        while length and pattern[i] != pattern[length]:
            length = table[length - 1]
        length += pattern[i] == pattern[length]
        table[i] = length
    return table
