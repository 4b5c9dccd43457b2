"""Processes of this host, each known by more than its pid: whether one is alive, all below one, and their end."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Process:
    """A pid with its start time (clock ticks since boot), since pids are used again."""

    pid: int
    started: int

    @property
    def is_alive(self) -> bool:
        stat = _stat(self.pid)
        return stat is not None and stat[1] == self.started and stat[2] != "Z"

    def kill(self) -> None:
        """At once, if it is still there."""
        with contextlib.suppress(OSError):
            if self.is_alive:
                os.kill(self.pid, signal.SIGKILL)


def process(pid: int) -> Process:
    """Raises ProcessLookupError."""
    stat = _stat(pid)
    if stat is None:
        raise ProcessLookupError(pid)
    return Process(pid, stat[1])


def descendants(pid: int) -> list[Process]:
    """All processes below pid, however deep (Linux: read from /proc)."""
    children: dict[int, list[Process]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (stat := _stat(int(entry.name))) is not None:
            children.setdefault(stat[0], []).append(Process(int(entry.name), stat[1]))
    found, todo = [], [pid]
    while todo:
        below = children.get(todo.pop(), [])
        found += below
        todo += [process.pid for process in below]
    return found


def end(processes: list[Process], grace_s: float) -> int:
    """Wait up to grace_s for them to end by themselves, then kill the rest; returns how many had to be killed."""
    deadline = time.monotonic() + grace_s
    while time.monotonic() < deadline and any(p.is_alive for p in processes):
        time.sleep(0.05)
    left = [p for p in processes if p.is_alive]
    for process in left:
        process.kill()
    return len(left)


def _stat(pid: int) -> tuple[int, int, str] | None:
    """(parent pid, start time, state), or None when it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return int(fields[1]), int(fields[19]), fields[0]
