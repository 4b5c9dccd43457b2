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
    """Base of everything below."""


class ExchangeError(MeshError):
    """An exchange failed. Its group may be used further only as `RouterTransport.leave_out` says.

    suspects: ids of the shards that closed or stayed silent; empty when nobody can tell.
    """

    def __init__(self, message: str, suspects: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.suspects = suspects


class PeerLost(ExchangeError):
    """The peer's sockets closed."""


class PeerSilent(ExchangeError):
    """The peer answered nothing within the deadline."""


class FormationError(MeshError):
    """Not all members of an epoch joined its process group in time."""

    def __init__(self, message: str, suspects: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.suspects = suspects


class MeshUnavailable(MeshError):
    """No complete set of experts is reachable; requests are refused until one is."""
