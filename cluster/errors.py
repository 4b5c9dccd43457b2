"""What the mesh can suffer. What a person configured or sent wrongly is a ValueError instead.

MeshError
├── ExchangeError          one exchange did not complete; carries the suspected shards
│   ├── PeerLost           a connection closed: the process behind it is gone
│   └── PeerSilent         a deadline passed: stopped, partitioned, or too slow
├── FormationError         the process group of an epoch did not come together
└── MeshUnavailable        some expert has no live holder and none could be made in time
"""

from __future__ import annotations


class MeshError(RuntimeError):
    """Base of everything below. suspects: ids of the shards that closed, stayed silent or did not come; empty when
    nobody can tell."""

    def __init__(self, message: str, suspects: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.suspects = suspects


class ExchangeError(MeshError):
    """An exchange failed. Its group may be used further only as `RouterTransport.leave_out` says."""


class PeerLost(ExchangeError):
    """The peer's sockets closed."""


class PeerSilent(ExchangeError):
    """The peer answered nothing within the deadline."""


class FormationError(MeshError):
    """Not all members of an epoch joined its process group in time."""


class MeshUnavailable(MeshError):
    """No complete set of experts is reachable; requests are refused until one is."""


def first_line(error: BaseException, limit: int = 300) -> str:
    """torch's errors run over many lines, and so do others; the first says it."""
    text = str(error).strip().splitlines()
    return (text[0] if text else type(error).__name__)[:limit]


def root_cause(text: str) -> str:
    """The line of a remote traceback that says it."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    for line in reversed(lines):
        name, _, message = line.partition(": ")
        if name.rpartition(".")[2].endswith(("Error", "Exception")) and message:
            return message[:500]
    return (lines[-1] if lines else "unknown error")[:500]


def timed_out(error: Exception) -> bool:
    """Whether torch says that an operation met its deadline; it has no class for that."""
    text = str(error).lower()
    return "timed out" in text or "timeout" in text
