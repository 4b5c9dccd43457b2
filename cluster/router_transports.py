"""The router's end of each transport: cluster.transport says which there are, and what they promise."""

from __future__ import annotations

import contextlib
import time
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from cluster.errors import ExchangeError, PeerLost, PeerSilent, first_line, timed_out
from cluster.host_transport import Channels, Failure
from cluster.process_group import MeshGroup
from cluster.wire import HEADER_TAG, LANES, MESSAGE_TAG, REPLY_TAG, Arena, Header, Message, no_bytes

Work = tuple[int | None, dist.Work]
"""An operation in flight and the index of the shard that it waits for; None: of all."""


class _Router(ABC):
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

    @abstractmethod
    def _announce(self, header: Header, shard_idxs: Sequence[int]) -> None:
        """The header to some of the shards."""

    def _present(self) -> Sequence[int]:
        return range(len(self.shard_ids))

    def prepare(self, whole: Header) -> Message:
        arena = self._arenas[whole.lane]
        arena.reserve(whole.arena_bytes)
        return arena.message(whole)

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
            kind = PeerSilent if any(timed_out(error) for _, error in failures) else PeerLost
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
        self._is_ended |= any(timed_out(error) for _, error in failures)
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
        none, no_splits = no_bytes(device), [0] * self.group.world_size
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

    def leave_out(self, suspects: Sequence[str]) -> bool:
        return False

    def can_serve(self, shard_ids: Collection[str]) -> bool:
        return set(shard_ids) == set(self.shard_ids)

    def keep_only(self, shard_ids: Sequence[str], goodbye: Header) -> None:
        """Nobody leaves a group that all take part in: can_serve says that it is no longer one."""

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
