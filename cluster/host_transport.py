"""Exchanges between processes of one host: rows in shared memory, wake-ups through unix sockets.

    router                                        shard
    fills the arena
    header ──────────── socket ─────────────────> wakes, computes from the arena, writes its sums there
    wakes, adds the sums up <──── socket ──────── the same header

Nothing is copied. Who waits looks again and again for SPIN_S before it sleeps, and lets others have its core
meanwhile: to be woken takes as long as many an exchange. A process that dies closes its sockets, so its peer wakes at
once; a stopped one is found at the deadline. The memory is a memfd without a name, handed over through the socket: it
ends with the last process that maps it, however that ends, and can't be shrunk under anybody.

The router listens in Linux' abstract namespace (no file to leave behind) only while a group forms. Either side
hears the other's user id from the kernel and refuses another user's process. Whether a shard is near is found by
trying: in another container or host that socket can't be reached.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import secrets
import select
import socket
import struct
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TypeVar

import torch

from cluster.errors import ExchangeError, FormationError, PeerLost, PeerSilent, first_line
from cluster.process_group import MeshGroup
from cluster.wire import HEADER_LENGTH, LANES, Arena, Header, Message, Opcode, roomy

HEADER = struct.Struct(f"={HEADER_LENGTH}q")
HELLO = struct.Struct("=q")
SPIN_S = 300e-6
T = TypeVar("T")
NAME_BYTES = 16
NAME_TAG, ANSWER_TAG = 4, 5
Failure = tuple[int | None, Exception]
"""Index of the shard, if one is to blame, and what happened."""
LOST = ConnectionResetError("connection closed, or an answer out of turn")


def is_supported() -> bool:
    """Linux: memfd and the abstract socket namespace."""
    return hasattr(os, "memfd_create") and hasattr(socket, "SO_PEERCRED")


class SharedArena(Arena):
    """An arena in a memfd. The router's has no fd yet and makes one; a shard maps the router's."""

    def __init__(self, fd: int | None = None) -> None:
        self._is_owner = fd is None
        if fd is None:
            fd = os.memfd_create("expertmesh", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
            os.ftruncate(fd, roomy(0))
        self.fd = fd
        super().__init__(torch.device("cpu"))
        self._map()

    def __del__(self) -> None:
        os.close(self.fd)

    def reserve(self, num_bytes: int) -> None:
        if self.buffer.numel() < num_bytes:
            if self._is_owner:
                os.ftruncate(self.fd, roomy(num_bytes))
            self._map()
            if self.buffer.numel() < num_bytes:
                raise ExchangeError(f"a header names {num_bytes} bytes of an arena of {self.buffer.numel()}")

    def _map(self) -> None:
        """The same pages again and those that came since; views of the former mapping stay valid."""
        self._adopt(torch.frombuffer(mmap.mmap(self.fd, os.fstat(self.fd).st_size), dtype=torch.uint8))


class Channels:
    """A router's sockets to the shards on its host, by shard index, and the memory it shares with them, by lane."""

    def __init__(self, sockets: dict[int, socket.socket], arenas: Sequence[SharedArena] = ()) -> None:
        self.sockets = sockets
        self.arenas = arenas
        self.may_write = False  # whether somebody was dropped who owed an answer and had not hung up
        self._owed: dict[int, list[Header]] = {shard_idx: [] for shard_idx in sockets}  # answers, in their order
        self._num_owed = [0] * LANES
        self._failures: list[list[Failure]] = [[] for _ in range(LANES)]
        self._poll = select.poll()
        self._shard_of_fd = {peer.fileno(): shard_idx for shard_idx, peer in sockets.items()}
        for fd in self._shard_of_fd:
            self._poll.register(fd, select.POLLIN)

    def __del__(self) -> None:
        for peer in self.sockets.values():
            peer.close()

    def send(self, shard_idx: int, header: Header) -> None:
        """A STEP is answered, see `wait`. Raises OSError."""
        try:
            self.sockets[shard_idx].send(HEADER.pack(*header))
        except BlockingIOError:
            raise TimeoutError("timed out: it reads nothing") from None
        if header.opcode == Opcode.STEP:
            self._owed[shard_idx].append(header)
            self._num_owed[header.lane] += 1

    def wait(self, lane: int, end: float) -> list[Failure]:
        """Wait until each shard has sent back the header of its exchange in the lane, or closed; at most until `end`
        (monotonic). Answers to the other lane are taken note of, and so are shards that close and owe nothing.
        """
        while self._num_owed[lane]:
            events = _awake(lambda: self._poll.poll(0)) or self._poll.poll(max(end - time.monotonic(), 0.0) * 1e3)
            if not events:
                late = [i for i, owed in self._owed.items() if any(header.lane == lane for header in owed)]
                return self._take_failures(lane) + [(shard_idx, TimeoutError("timed out")) for shard_idx in late]
            for fd, _ in events:
                self._hear(self._shard_of_fd[fd], lane)
        return self._take_failures(lane)

    def _hear(self, shard_idx: int, lane: int) -> None:
        try:
            answer = self.sockets[shard_idx].recv(HEADER.size)
        except OSError:
            answer = b""
        owed = self._owed[shard_idx]
        if owed and answer == HEADER.pack(*owed[0]):
            self._num_owed[owed.pop(0).lane] -= 1
            return
        if all(header.lane != lane for header in owed):
            self._failures[lane].append((shard_idx, LOST))
        self.drop(shard_idx)

    def _take_failures(self, lane: int) -> list[Failure]:
        failures, self._failures[lane] = self._failures[lane], []
        return failures

    def drop(self, shard_idx: int) -> None:
        """Close the socket to a shard, if it is open; whoever waits for its answers fails."""
        peer, owed = self.sockets.pop(shard_idx, None), self._owed.pop(shard_idx, [])
        if peer is not None:
            self.may_write |= bool(owed) and not _has_hung_up(peer)
            self._poll.unregister(peer.fileno())
            peer.close()
        for header in owed:
            self._num_owed[header.lane] -= 1
            self._failures[header.lane].append((shard_idx, LOST))


class HostShard:
    """A shard's side of one router's channel. The group is kept: it ends with this."""

    def __init__(self, group: MeshGroup, router: socket.socket, arenas: Sequence[SharedArena]) -> None:
        self.group = group
        self._socket = router
        self._arenas = arenas
        self._socket.settimeout(None)
        limit = struct.pack("=qq", int(group.operation_s), int(group.operation_s % 1 * 1e6))
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            router.setsockopt(socket.SOL_SOCKET, option, limit)

    def __del__(self) -> None:
        self._socket.close()

    def next_header(self) -> Header:
        try:
            data = _awake(self._receive_now) or self._socket.recv(HEADER.size)
        except BlockingIOError:
            raise PeerSilent(f"router of group {self.group.name}: timed out") from None
        except OSError as error:
            raise PeerLost(f"router of group {self.group.name}: {error}") from None
        if len(data) != HEADER.size:
            raise PeerLost(f"router of group {self.group.name}: connection closed by peer")
        return Header._make(HEADER.unpack(data))

    def _receive_now(self) -> bytes:
        with contextlib.suppress(BlockingIOError):
            return self._socket.recv(HEADER.size, socket.MSG_DONTWAIT)
        return b""

    def receive(self, header: Header) -> Message:
        arena = self._arenas[header.lane]
        arena.reserve(header.arena_bytes)
        return arena.message(header)

    def reply(self, header: Header, message: Message) -> None:
        try:
            self._socket.send(HEADER.pack(*header))
        except OSError as error:
            raise PeerLost(f"router of group {self.group.name}: {error}") from None


def _has_hung_up(peer: socket.socket) -> bool:
    poll = select.poll()
    poll.register(peer, 0)
    return bool(poll.poll(0))


def _awake(look: Callable[[], T]) -> T | None:
    """What `look` first finds within SPIN_S, without sleeping."""
    end = time.monotonic() + SPIN_S
    while time.monotonic() < end:
        if found := look():
            return found
        os.sched_yield()
    return None


def meet_shards(group: MeshGroup) -> Channels:
    """The router's side of forming channels, after the group has formed; shards call meet_router.

    Raises FormationError when one does neither come nor decline within the group's formation time.
    """
    name = secrets.token_bytes(NAME_BYTES)
    end = time.monotonic() + group.formation_s
    peers: dict[int, socket.socket] = {}
    try:
        arenas = [SharedArena() for _ in range(LANES)]
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind(_address(name))
            listener.listen(group.world_size)
            num_near = _ask(group, name)
            while len(peers) < num_near:
                listener.settimeout(max(end - time.monotonic(), 0.001))
                peer, _ = listener.accept()
                peer.settimeout(max(end - time.monotonic(), 0.001))
                if not _is_same_user(peer):
                    peer.close()
                    continue
                (rank,) = HELLO.unpack(peer.recv(HELLO.size))
                peers[rank - 1] = peer
                socket.send_fds(peer, [b"m"], [arena.fd for arena in arenas])
                peer.setblocking(False)
    except (RuntimeError, OSError, struct.error) as error:
        for peer in peers.values():
            peer.close()
        raise FormationError(f"group {group.name}, channels of this host: {first_line(error)}") from None
    return Channels(peers, arenas if peers else ())


def _ask(group: MeshGroup, name: bytes) -> int:
    """Tell every shard where the router listens -> how many could connect there, and have."""
    ranks, timeout = range(1, group.world_size), timedelta(seconds=group.formation_s)
    where = torch.tensor(list(name), dtype=torch.uint8)
    answers = torch.zeros(group.world_size, dtype=torch.int64)
    works = [group.control.send([where], rank, NAME_TAG) for rank in ranks]
    works += [group.control.recv([answers[rank : rank + 1]], rank, ANSWER_TAG) for rank in ranks]
    for work in works:
        work.wait(timeout)
    return int(answers.sum())


def meet_router(group: MeshGroup) -> HostShard | None:
    """A shard's side: None when the router isn't on this host. Raises FormationError."""
    timeout = timedelta(seconds=group.formation_s)
    name = torch.zeros(NAME_BYTES, dtype=torch.uint8)
    try:
        group.control.recv([name], 0, NAME_TAG).wait(timeout)
        router = _connect(bytes(name.tolist()), group)
        group.control.send([torch.tensor([int(router is not None)])], 0, ANSWER_TAG).wait(timeout)
        if router is None:
            return None
        _, fds, _, _ = socket.recv_fds(router, 1, LANES)
        if len(fds) != LANES:
            raise OSError(f"the router sent {len(fds)} pieces of memory, not {LANES}")
        return HostShard(group, router, [SharedArena(fd) for fd in fds])
    except (RuntimeError, OSError) as error:
        raise FormationError(f"group {group.name}, channel to the router: {first_line(error)}") from None


def _connect(name: bytes, group: MeshGroup) -> socket.socket | None:
    router = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    router.settimeout(group.formation_s)
    with contextlib.suppress(OSError):
        router.connect(_address(name))
        if _is_same_user(router):
            router.send(HELLO.pack(group.rank))
            return router
    router.close()
    return None


def _address(name: bytes) -> bytes:
    return b"\0expertmesh-" + name.hex().encode()


def _is_same_user(peer: socket.socket) -> bool:
    credentials = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("=3i"))
    _, user_id, _ = struct.unpack("=3i", credentials)
    return bool(user_id == os.geteuid())
