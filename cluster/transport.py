"""How rows cross between one router and its shards. Two transports behind one protocol.

`star`        isend/irecv pairs, router to shard and back. Shards that get no row are not disturbed. Default on
              gloo; with several routers also on NCCL, since pairs of different communicators cannot wait for
              each other in a circle.
`all_to_all`  all_to_all_single with uneven splits, every shard takes part every time. Default on NCCL with one
              router. With several routers two shards may see two routers' collectives in opposite orders and
              wait for each other for ever, so `auto` never picks it there.

Headers always travel over the control group (gloo, host memory): a shard learns opcode and counts without a
device synchronisation, and one listener per router can wait for them cheaply.

Read, not run (no GPU was at hand): everything where group.device is CUDA. NCCL operations are issued on the
caller's current stream; a shard issues those of all its routers under one lock, so their order is the same for
every communicator it takes part in.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from cluster.errors import ExchangeError, PeerLost, PeerSilent
from cluster.process_group import MeshGroup, first_line
from cluster.wire import HEADER_LENGTH, Header, Message, message_views, reply_dtype

HEADER_TAG, MESSAGE_TAG, REPLY_TAG = 1, 2, 3
ROUTER_RANK = 0


@dataclass(slots=True)
class Flight:
    """What a dispatched exchange still waits for. Holds every buffer until the operations on it are done.

    refused: (shard index, why) where a connection was closed before anything could be sent.
    """

    headers: list[Header | None]
    replies: list[Tensor | None]
    receives: list[tuple[int, dist.Work]]
    sends: list[tuple[int, dist.Work]]
    buffers: list[Tensor]
    refused: list[tuple[int, str]] = field(default_factory=list)


class RouterTransport(Protocol):
    """The router's side. All methods raise ExchangeError; then the group is done for, unless leave_out says not."""

    def send(self, headers: Sequence[Header], messages: Sequence[Message | None]) -> Flight:
        """Start one exchange: headers[i] and messages[i] go to shard i (rank i + 1); None: nothing for it."""

    def receive(self, flight: Flight, deadline_s: float) -> list[Tensor | None]:
        """Wait at most deadline_s for all replies, [num_rows, hidden] each; None where nothing was sent."""

    def announce(self, header: Header) -> None:
        """Send a header without rows (IDLE, CLOSE) to every shard."""

    def leave_out(self, suspects: Sequence[str]) -> bool:
        """After a failed receive: whether the others are still there and owe nothing, so that the next exchange may
        begin with them at once. Nothing may be sent to the suspects any more."""


class ShardTransport(Protocol):
    """A shard's side of one router's group."""

    def next_header(self) -> Header:
        """Wait for the router's next header (at most the group's operation timeout)."""

    def receive(self, header: Header) -> Message:
        """The rows that belong to a STEP header."""

    def reply(self, header: Header, partial_NH: Tensor) -> None:
        """Send the partial sums back."""


class _RouterBase:
    def __init__(self, group: MeshGroup, shard_ids: Sequence[str]) -> None:
        self.group = group
        self.shard_ids = tuple(shard_ids)
        self._left_out: set[str] = set()

    def announce(self, header: Header) -> None:
        tensor = header.to_tensor()
        present = [i for i, shard_id in enumerate(self.shard_ids) if shard_id not in self._left_out]
        self._wait_all([(i, self._post(i, tensor, HEADER_TAG)) for i in present], deadline_s=1.0)

    def leave_out(self, suspects: Sequence[str]) -> bool:
        return False

    def _post(self, shard_idx: int, tensor: Tensor, tag: int) -> dist.Work:
        group = self.group.control if tag == HEADER_TAG else self.group.data
        try:
            return group.send([tensor], shard_idx + 1, tag)
        except RuntimeError as error:
            raise self._failure(error, (shard_idx,)) from None

    def _wait_all(self, works: Sequence[tuple[int, dist.Work]], deadline_s: float) -> None:
        """Wait for every work, also after a failure: whoever is still there owes nothing afterwards. Then raise for all
        that failed.

        At the deadline gloo ends the whole group; what has arrived by then still counts.
        """
        end = time.monotonic() + deadline_s
        failed: list[int] = []
        first: RuntimeError | None = None
        for shard_idx, work in works:
            if shard_idx in failed:
                continue
            try:
                work.wait(timedelta(seconds=max(end - time.monotonic(), 0.001)))
            except RuntimeError as error:
                failed.append(shard_idx)
                if first is None or _timed_out(error):
                    first = error
        if first is not None:
            raise self._failure(first, tuple(failed))

    def _failure(self, error: RuntimeError, shard_idxs: Sequence[int]) -> ExchangeError:
        suspects = tuple(self.shard_ids[i] for i in shard_idxs)
        kind = PeerSilent if _timed_out(error) else PeerLost
        return kind(f"exchange in group {self.group.name} failed at {list(suspects)}: {first_line(error)}", suspects)


class StarRouter(_RouterBase):
    _is_ended = False

    def send(self, headers: Sequence[Header], messages: Sequence[Message | None]) -> Flight:
        """A shard that can't be sent to shows in receive(), when the others have answered."""
        flight = Flight([], [], [], [], [])
        for shard_idx, (header, message) in enumerate(zip(headers, messages, strict=True)):
            flight.headers.append(header if message is not None else None)
            flight.replies.append(None)
            if message is not None:
                try:
                    self._send_one(flight, shard_idx, header, message)
                except ExchangeError as error:
                    flight.refused.append((shard_idx, str(error)))
        return flight

    def _send_one(self, flight: Flight, shard_idx: int, header: Header, message: Message) -> None:
        tensor, device = header.to_tensor(), self.group.device
        reply = torch.empty(header.num_rows, header.hidden_size, dtype=reply_dtype(device), device=device)
        flight.buffers += [tensor, message.buffer]
        flight.sends.append((shard_idx, self._post(shard_idx, tensor, HEADER_TAG)))
        flight.sends.append((shard_idx, self._post(shard_idx, message.buffer, MESSAGE_TAG)))
        try:
            work = self.group.data.recv([reply], shard_idx + 1, REPLY_TAG)
        except RuntimeError as error:
            raise self._failure(error, (shard_idx,)) from None
        flight.replies[shard_idx] = reply
        flight.receives.append((shard_idx, work))

    def receive(self, flight: Flight, deadline_s: float) -> list[Tensor | None]:
        refused = {shard_idx for shard_idx, _ in flight.refused}
        works = [(i, work) for i, work in [*flight.receives, *flight.sends] if i not in refused]
        lost, why = tuple(self.shard_ids[i] for i in refused), "; ".join(text for _, text in flight.refused)
        try:
            self._wait_all(works, deadline_s)
        except ExchangeError as error:
            self._is_ended = isinstance(error, PeerSilent)
            raise type(error)(f"{error}{why and '; '}{why}", (*lost, *error.suspects)) from None
        if refused:
            raise PeerLost(why, lost)
        return flight.replies

    def leave_out(self, suspects: Sequence[str]) -> bool:
        """On gloo a closed connection ends nobody else's; a missed deadline, or anything on NCCL, ends the group."""
        self._left_out.update(suspects)
        return not self._is_ended and self.group.device.type == "cpu" and set(self.shard_ids) > self._left_out


class AllToAllRouter(_RouterBase):
    def send(self, headers: Sequence[Header], messages: Sequence[Message | None]) -> Flight:
        flight = Flight([], [], [], [], [])
        for shard_idx, header in enumerate(headers):
            tensor = header.to_tensor()
            flight.buffers.append(tensor)
            flight.headers.append(header)
            flight.sends.append((shard_idx, self._post(shard_idx, tensor, HEADER_TAG)))
        parts = [m.buffer for m in messages if m is not None]
        outgoing = torch.cat(parts) if parts else _no_bytes(self.group.device)
        splits = [0] + [0 if m is None else m.buffer.numel() for m in messages]
        flight.buffers.append(outgoing)
        flight.receives.append((-1, self._all_to_all(_no_bytes(self.group.device), outgoing, None, splits, flight)))
        dtype = reply_dtype(self.group.device)
        rows = [h.num_rows for h in headers]
        incoming = torch.empty(sum(rows), headers[0].hidden_size, dtype=dtype, device=self.group.device)
        row_bytes = headers[0].hidden_size * dtype.itemsize
        reply_splits = [0] + [n * row_bytes for n in rows]
        as_bytes = incoming.view(-1).view(torch.uint8)
        work = self._all_to_all(as_bytes, _no_bytes(self.group.device), reply_splits, None, flight)
        flight.receives.append((-1, work))
        flight.replies = [part if len(part) else None for part in torch.split(incoming, rows)]
        return flight

    def receive(self, flight: Flight, deadline_s: float) -> list[Tensor | None]:
        self._wait_all(flight.sends, deadline_s)
        end = time.monotonic() + deadline_s
        try:
            for _, work in flight.receives:
                work.wait(timedelta(seconds=max(end - time.monotonic(), 0.001)))
        except RuntimeError as error:
            raise self._failure(error, ()) from None
        return flight.replies

    def _all_to_all(
        self,
        output: Tensor,
        source: Tensor,
        output_splits: list[int] | None,
        input_splits: list[int] | None,
        flight: Flight,
    ) -> dist.Work:
        none = [0] * self.group.world_size
        flight.buffers.append(output)
        try:
            return self.group.data.alltoall_base(output, source, output_splits or none, input_splits or none)
        except RuntimeError as error:
            raise self._failure(error, ()) from None


class StarShard:
    def __init__(self, group: MeshGroup) -> None:
        self.group = group
        self._header = torch.empty(HEADER_LENGTH, dtype=torch.int64)

    def next_header(self) -> Header:
        with _peer_errors(self.group):
            self.group.control.recv([self._header], ROUTER_RANK, HEADER_TAG).wait(self.group.operation_timeout)
        return Header.from_tensor(self._header)

    def receive(self, header: Header) -> Message:
        buffer = torch.empty(header.message_bytes, dtype=torch.uint8, device=self.group.device)
        with _peer_errors(self.group):
            self.group.data.recv([buffer], ROUTER_RANK, MESSAGE_TAG).wait(self.group.operation_timeout)
        return message_views(buffer, header.num_rows, header.num_pairs, header.hidden_size)

    def reply(self, header: Header, partial_NH: Tensor) -> None:
        with _peer_errors(self.group):
            self.group.data.send([partial_NH], ROUTER_RANK, REPLY_TAG).wait(self.group.operation_timeout)


class AllToAllShard(StarShard):
    def receive(self, header: Header) -> Message:
        buffer = torch.empty(header.message_bytes, dtype=torch.uint8, device=self.group.device)
        splits = [header.message_bytes] + [0] * (self.group.world_size - 1)
        self._all_to_all(buffer, _no_bytes(self.group.device), splits, [0] * self.group.world_size)
        return message_views(buffer, header.num_rows, header.num_pairs, header.hidden_size)

    def reply(self, header: Header, partial_NH: Tensor) -> None:
        source = partial_NH.reshape(-1).view(torch.uint8)
        splits = [source.numel()] + [0] * (self.group.world_size - 1)
        self._all_to_all(_no_bytes(self.group.device), source, [0] * self.group.world_size, splits)

    def _all_to_all(self, output: Tensor, source: Tensor, output_splits: list[int], input_splits: list[int]) -> None:
        with _peer_errors(self.group):
            self.group.data.alltoall_base(output, source, output_splits, input_splits).wait(
                self.group.operation_timeout
            )


TRANSPORTS: dict[str, tuple[type[StarRouter | AllToAllRouter], type[StarShard]]] = {
    "star": (StarRouter, StarShard),
    "all_to_all": (AllToAllRouter, AllToAllShard),
}


def choose_transport(name: str, device: torch.device, num_routers: int) -> str:
    """Resolve `auto`. Raises ValueError for an unknown name."""
    if name == "auto":
        return "all_to_all" if device.type == "cuda" and num_routers == 1 else "star"
    if name not in TRANSPORTS:
        raise ValueError(f"transport={name!r} is unknown; choose one of auto, {', '.join(TRANSPORTS)}")
    return name


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


def _timed_out(error: RuntimeError) -> bool:
    text = str(error).lower()
    return "timed out" in text or "timeout" in text


def _no_bytes(device: torch.device) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=device)
