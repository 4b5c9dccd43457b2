"""How rows cross between one router and its shards, behind one protocol.

`star`        isend/irecv pairs, router to shard and back. Shards that get no row are not disturbed. With several
              routers also on NCCL, since pairs of different communicators cannot wait for each other in a circle.
`host`        memory shared by processes of one host, woken through unix sockets (cluster.host_transport).
`mixed`       `host` for the shards that can be reached so, `star` for the others. Default on CPU.
`all_to_all`  all_to_all_single with uneven splits, every shard takes part every time. Default on NCCL with one
              router. With several routers two shards may see two routers' collectives in opposite orders and
              wait for each other for ever, so `auto` never picks it there.

Headers to shards on other hosts always travel over the control group (gloo, host memory): a shard learns opcode and
counts without a device synchronisation, and one listener per router can wait for them cheaply.

Read, not run (no GPU was at hand): everything where group.device is CUDA. NCCL operations are issued on the
caller's current stream; a shard issues those of all its routers under one lock, so their order is the same for
every communicator it takes part in.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Collection, Iterator, Sequence
from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from cluster.errors import ExchangeError, PeerLost, PeerSilent, first_line
from cluster.host_transport import Channels, Failure, is_supported, meet_router, meet_shards
from cluster.process_group import MeshGroup
from cluster.wire import HEADER_LENGTH, LANES, Arena, Header, Message

HEADER_TAG, MESSAGE_TAG, REPLY_TAG = 1, 2, 3
ROUTER_RANK = 0
Work = tuple[int | None, dist.Work]
"""An operation in flight and the index of the shard that it waits for; None: of all."""


class RouterTransport(Protocol):
    """The router's side: prepare, fill the message, send, receive; one exchange at a time in each lane.

    All methods raise ExchangeError; then the group is done for, unless leave_out says not. shard_ids: of the group, by
    rank, also those that were left out.
    """

    shard_ids: tuple[str, ...]

    def prepare(self, whole: Header) -> Message:
        """Memory for the rows and pairs of all shards, and for their sums."""

    def send(self, headers: Sequence[Header]) -> None:
        """Start the exchange: headers[i] says which part of the message is for shard i (rank i + 1), maybe none."""

    def receive(self, deadline_s: float, lane: int) -> None:
        """Wait at most deadline_s until all sums of the lane's exchange are in its message."""

    def announce(self, header: Header) -> None:
        """Send a header without rows (IDLE, CLOSE) to every shard."""

    def keep_alive(self, header: Header) -> None:
        """The same, to those shards only that were sent nothing since the last time: they wait for a header, so nobody
        is held up."""

    def leave_out(self, suspects: Sequence[str]) -> bool:
        """After a failed receive: whether the others are still there and owe nothing, so that the next exchange may
        begin with them at once. Nothing may be sent to the suspects any more."""

    def can_serve(self, shard_ids: Collection[str]) -> bool:
        """Whether an epoch with these members needs no other group."""

    def keep_only(self, shard_ids: Sequence[str], goodbye: Header) -> None:
        """Say goodbye to all others of the group; raises nothing. If one of them still computes for an exchange, the
        group ends with it: see can_serve."""


class ShardTransport(Protocol):
    """A shard's side of one router's group."""

    def next_header(self) -> Header:
        """Wait for the router's next header (at most the group's operation timeout)."""

    def receive(self, header: Header) -> Message:
        """What belongs to a STEP header; its sums are for the shard to write."""

    def reply(self, header: Header, message: Message) -> None:
        """The sums are written: hand them back."""


def choose_transport(setting: str, device: torch.device, num_routers: int) -> str:
    """What a group uses. Raises ValueError for a setting that is unknown or not possible here."""
    if setting == "auto":
        if device.type == "cuda":
            return "all_to_all" if num_routers == 1 else "star"
        return "mixed" if is_supported() else "star"
    if setting not in ("star", "all_to_all", "host"):
        raise ValueError(f"transport={setting!r} is unknown; choose one of auto, star, all_to_all, host")
    if setting == "host" and not (is_supported() and device.type == "cpu"):
        raise ValueError("transport='host' needs experts on the CPU and Linux (memfd, unix sockets); choose auto")
    return setting


def router_transport(name: str, group: MeshGroup, shard_ids: Sequence[str]) -> RouterTransport:
    """Collective with shard_transport. Raises FormationError, and ValueError where `host` can't reach a shard."""
    if name == "all_to_all":
        return AllToAllRouter(group, shard_ids)
    channels = meet_shards(group) if name in ("host", "mixed") else Channels({})
    far = [shard_id for i, shard_id in enumerate(shard_ids) if i not in channels.sockets]
    if name == "host" and far:
        raise ValueError(
            f"transport=host, but {', '.join(far)} can't be reached through a unix socket: on another host than the "
            "router, or of another user; set transport to auto"
        )
    return PairRouter(group, shard_ids, channels)


def shard_transport(name: str, group: MeshGroup) -> ShardTransport:
    """Collective with router_transport. Raises FormationError."""
    if name == "all_to_all":
        return AllToAllShard(group)
    near = meet_router(group) if name in ("host", "mixed") else None
    return near or StarShard(group)


class _Router:
    def __init__(self, group: MeshGroup, shard_ids: Sequence[str]) -> None:
        self.group = group
        self.shard_ids = tuple(shard_ids)
        self._arenas: Sequence[Arena] = [Arena(group.device) for _ in range(LANES)]
        self._works: list[list[Work]] = [[] for _ in range(LANES)]
        self._reached: set[int] = set()  # shards that were sent something since the last keep_alive

    def announce(self, header: Header) -> None:
        self._announce(header, self._present())

    def keep_alive(self, header: Header) -> None:
        quiet = [i for i in self._present() if i not in self._reached]
        self._reached.clear()
        self._announce(header, quiet)

    def _announce(self, header: Header, shard_idxs: Sequence[int]) -> None:
        raise NotImplementedError

    def _present(self) -> Sequence[int]:
        return range(len(self.shard_ids))

    def prepare(self, whole: Header) -> Message:
        arena = self._arenas[whole.lane]
        arena.reserve(whole.arena_bytes)
        return arena.message(whole)

    def leave_out(self, suspects: Sequence[str]) -> bool:
        return False

    def can_serve(self, shard_ids: Collection[str]) -> bool:
        return set(shard_ids) == set(self.shard_ids)

    def keep_only(self, shard_ids: Sequence[str], goodbye: Header) -> None:
        pass

    def _post(self, shard_idx: int, tensor: Tensor, tag: int) -> Work:
        group = self.group.control if tag == HEADER_TAG else self.group.data
        return shard_idx, group.send([tensor], shard_idx + 1, tag)

    def _wait_all(self, works: Sequence[Work], end: float) -> list[Failure]:
        """Wait for every work until `end`, also after a failure: whoever is still there owes nothing afterwards.

        At the deadline gloo ends the whole group; what has arrived by then still counts.
        """
        failures: dict[int | None, Exception] = {}
        for shard_idx, work in works:
            if shard_idx not in failures:
                try:
                    work.wait(timedelta(seconds=max(end - time.monotonic(), 0.001)))
                except RuntimeError as error:
                    failures[shard_idx] = error
        return list(failures.items())

    def _raise_for(self, failures: Sequence[Failure]) -> None:
        if failures:
            idxs = dict.fromkeys(i for i, _ in failures)
            suspects = tuple(self.shard_ids[i] for i in idxs if i is not None) if None not in idxs else self.shard_ids
            kind = PeerSilent if any(_timed_out(error) for _, error in failures) else PeerLost
            why = "; ".join(dict.fromkeys(first_line(error) for _, error in failures))
            raise kind(f"exchange in group {self.group.name} failed at {list(suspects)}: {why}", suspects)


class PairRouter(_Router):
    """`star`, `host` and `mixed`: shards with a channel work on the arena itself, the others on copies."""

    def __init__(self, group: MeshGroup, shard_ids: Sequence[str], channels: Channels) -> None:
        super().__init__(group, shard_ids)
        self._near = channels
        self._arenas = channels.arenas or self._arenas
        far = [i for i in range(len(shard_ids)) if i not in channels.sockets]
        self._far = {i: [Arena(group.device) for _ in range(LANES)] for i in far}
        self._refused: list[list[Failure]] = [[] for _ in range(LANES)]
        self._left_out: set[str] = set()
        self._is_ended = False

    def _announce(self, header: Header, shard_idxs: Sequence[int]) -> None:
        failures: list[Failure] = []
        works: list[Work] = []
        tensor = torch.tensor(header)
        for shard_idx in shard_idxs:
            try:
                if shard_idx in self._far:
                    works.append(self._post(shard_idx, tensor, HEADER_TAG))
                else:
                    self._near.send(shard_idx, header)
            except (RuntimeError, OSError) as error:
                failures.append((shard_idx, error))
        self._raise_for(failures + self._wait_all(works, time.monotonic() + 1.0))

    def _raise_for(self, failures: Sequence[Failure]) -> None:
        self._is_ended |= any(_timed_out(error) for _, error in failures)
        super()._raise_for(failures)

    def send(self, headers: Sequence[Header]) -> None:
        """A shard that can't be sent to shows in receive(), when the others have answered."""
        lane = headers[0].lane
        works, refused = self._works[lane], self._refused[lane] = list[Work](), list[Failure]()
        for shard_idx, header in enumerate(headers):
            if header.num_rows == 0:
                continue
            if self.shard_ids[shard_idx] in self._left_out:
                refused.append((shard_idx, ConnectionResetError("left out before")))
                continue
            self._reached.add(shard_idx)
            try:
                if shard_idx in self._far:
                    works += self._send_far(shard_idx, header)
                else:
                    self._near.send(shard_idx, header)
            except (RuntimeError, OSError) as error:
                refused.append((shard_idx, error))

    def receive(self, deadline_s: float, lane: int) -> None:
        end = time.monotonic() + deadline_s
        failures = self._refused[lane] + self._near.wait(lane, end)
        if works := self._works[lane]:
            failures = failures + self._wait_all(works, end)
        self._raise_for(failures)

    def leave_out(self, suspects: Sequence[str]) -> bool:
        """A closed connection ends nobody else's. A missed deadline does on gloo, and whoever is silent may yet write
        into the arena; on NCCL any failure ends the group."""
        self._left_out.update(suspects)
        for suspect in suspects:
            self._near.drop(self.shard_ids.index(suspect))
        self._is_ended |= self._near.may_write
        return not self._is_ended and self.group.device.type == "cpu" and bool(self._present())

    def can_serve(self, shard_ids: Collection[str]) -> bool:
        return not self._is_ended and set(shard_ids) <= {self.shard_ids[i] for i in self._present()}

    def keep_only(self, shard_ids: Sequence[str], goodbye: Header) -> None:
        others = [i for i in self._present() if self.shard_ids[i] not in shard_ids]
        if others:
            with contextlib.suppress(ExchangeError):
                self._announce(goodbye, others)
            self.leave_out([self.shard_ids[i] for i in others])

    def _present(self) -> list[int]:
        return [i for i, shard_id in enumerate(self.shard_ids) if shard_id not in self._left_out]

    def _send_far(self, shard_idx: int, header: Header) -> list[Work]:
        message = self._arenas[header.lane].message(header)
        alone, own = header.alone(), self._far[shard_idx][header.lane]
        own.reserve(alone.arena_bytes)
        _copy(message, own.message(alone))
        header_sent = self._post(shard_idx, torch.tensor(alone), HEADER_TAG)
        message_sent = self._post(shard_idx, own.buffer[: alone.message_bytes], MESSAGE_TAG)
        received = shard_idx, self.group.data.recv([message.sums_NH], shard_idx + 1, REPLY_TAG)
        return [received, header_sent, message_sent]


class AllToAllRouter(_Router):
    """Every shard's message apart in one outgoing buffer; the sums come back into the arena as they lie there."""

    def _announce(self, header: Header, shard_idxs: Sequence[int]) -> None:
        tensor, works = torch.tensor(header), list[Work]()
        with self._failures_raised():
            works += [self._post(i, tensor, HEADER_TAG) for i in shard_idxs]
        self._raise_for(self._wait_all(works, time.monotonic() + 1.0))

    def send(self, headers: Sequence[Header]) -> None:
        device, arena = self.group.device, self._arenas[headers[0].lane]
        parts = [_packed(arena.message(header), header.alone(), device) for header in headers]
        whole = headers[0]._replace(first_row=0, num_rows=headers[0].total_rows)
        sums_NH = arena.message(whole).sums_NH
        row_bytes = sums_NH.shape[1] * sums_NH.itemsize
        incoming = sums_NH.view(-1).view(torch.uint8)
        incoming_splits = [0, *(header.num_rows * row_bytes for header in headers)]
        none, no_splits = _no_bytes(device), [0] * self.group.world_size
        data = self.group.data
        self._reached.update(self._present())
        with self._failures_raised():
            sent = [self._post(i, torch.tensor(h.alone()), HEADER_TAG) for i, h in enumerate(headers)]
            outward = data.alltoall_base(none, torch.cat(parts), no_splits, [0, *map(len, parts)])
            homeward = data.alltoall_base(incoming, none, incoming_splits, no_splits)
            self._works[whole.lane] = [(None, outward), (None, homeward), *sent]

    def receive(self, deadline_s: float, lane: int) -> None:
        """The collectives first: gloo forgets to wake who waits for a send that the peer's death overtook, and nobody
        needs to know of the headers once a collective has failed."""
        end = time.monotonic() + deadline_s
        works = self._works[lane]
        failures = self._wait_all(works[:2], end) or self._wait_all(works[2:], end)
        if failures:
            self._hang_up()
        self._raise_for(failures)

    def _hang_up(self) -> None:
        """Close all connections of the group now. Its collectives else wait on in gloo until formation_s, and so does
        whoever drops the group. (A shard that waits for a silent one does so too, in a thread that nobody needs.)"""
        for rank in range(1, self.group.world_size):
            with contextlib.suppress(RuntimeError):  # a receive that times out closes all, but one from the dead raises
                self.group.control.recv([torch.empty(1)], rank, HEADER_TAG).wait(timedelta(milliseconds=1))

    @contextlib.contextmanager
    def _failures_raised(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            self._raise_for([(None, error)])


class StarShard:
    def __init__(self, group: MeshGroup) -> None:
        self.group = group
        self._header = torch.empty(HEADER_LENGTH, dtype=torch.int64)
        self._arena = Arena(group.device)

    def next_header(self) -> Header:
        with _peer_errors(self.group):
            self.group.control.recv([self._header], ROUTER_RANK, HEADER_TAG).wait(self.group.operation_timeout)
        return Header(*self._header.tolist())

    def receive(self, header: Header) -> Message:
        self._arena.reserve(header.arena_bytes)
        with _peer_errors(self.group):
            self._receive(self._arena.buffer[: header.message_bytes])
        return self._arena.message(header)

    def reply(self, header: Header, message: Message) -> None:
        with _peer_errors(self.group):
            self._reply(message.sums_NH)

    def _receive(self, buffer: Tensor) -> None:
        self.group.data.recv([buffer], ROUTER_RANK, MESSAGE_TAG).wait(self.group.operation_timeout)

    def _reply(self, sums_NH: Tensor) -> None:
        self.group.data.send([sums_NH], ROUTER_RANK, REPLY_TAG).wait(self.group.operation_timeout)


class AllToAllShard(StarShard):
    def _receive(self, buffer: Tensor) -> None:
        self._all_to_all(buffer, _no_bytes(self.group.device), [buffer.numel()], [0])

    def _reply(self, sums_NH: Tensor) -> None:
        source = sums_NH.view(-1).view(torch.uint8)
        self._all_to_all(_no_bytes(self.group.device), source, [0], [source.numel()])

    def _all_to_all(self, output: Tensor, source: Tensor, from_router: list[int], to_router: list[int]) -> None:
        others = [0] * (self.group.world_size - 1)
        work = self.group.data.alltoall_base(output, source, from_router + others, to_router + others)
        work.wait(self.group.operation_timeout)


class _peer_errors:
    """Turn torch's RuntimeError on a shard into ours; the router is the only peer."""

    def __init__(self, group: MeshGroup) -> None:
        self.group = group

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if isinstance(error, RuntimeError) and not isinstance(error, ExchangeError):
            cause = PeerSilent if _timed_out(error) else PeerLost
            raise cause(f"router of group {self.group.name}: {first_line(error)}") from None


def _copy(source: Message, target: Message) -> None:
    target.pair_rows_P.copy_(source.pair_rows_P)
    target.pair_experts_P.copy_(source.pair_experts_P)
    target.pair_weights_P.copy_(source.pair_weights_P)
    target.rows_NH.copy_(source.rows_NH)


def _packed(message: Message, alone: Header, device: torch.device) -> Tensor:
    arena = Arena(device)
    arena.reserve(alone.arena_bytes)
    _copy(message, arena.message(alone))
    return arena.buffer[: alone.message_bytes]


def _timed_out(error: Exception) -> bool:
    text = str(error).lower()
    return "timed out" in text or "timeout" in text


def _no_bytes(device: torch.device) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=device)
