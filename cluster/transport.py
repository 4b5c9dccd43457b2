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
from dataclasses import dataclass
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
    """What a dispatched exchange still waits for. Holds every buffer until the operations on it are done."""

    headers: list[Header | None]
    replies: list[Tensor | None]
    receives: list[tuple[int, dist.Work]]
    sends: list[tuple[int, dist.Work]]
    buffers: list[Tensor]


class RouterTransport(Protocol):
    """The router's side. All methods raise ExchangeError; after that the group is done for."""

    def send(self, headers: Sequence[Header], messages: Sequence[Message | None]) -> Flight:
        """Start one exchange: headers[i] and messages[i] go to shard i (rank i + 1); None: nothing for it."""

    def receive(self, flight: Flight, deadline_s: float) -> list[Tensor | None]:
        """Wait at most deadline_s for all replies, [num_rows, hidden] each; None where nothing was sent."""

    def announce(self, header: Header) -> None:
        """Send a header without rows (IDLE, CLOSE) to every shard."""


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

    def announce(self, header: Header) -> None:
        tensor = header.to_tensor()
        works = [(i, self._post(i, tensor, HEADER_TAG)) for i in range(len(self.shard_ids))]
        self._wait_all(works, deadline_s=1.0)

    def _post(self, shard_idx: int, tensor: Tensor, tag: int) -> dist.Work:
        group = self.group.control if tag == HEADER_TAG else self.group.data
        try:
            return group.send([tensor], shard_idx + 1, tag)
        except RuntimeError as error:
            raise self._failure(error, (shard_idx,)) from None

    def _wait_all(self, works: Sequence[tuple[int, dist.Work]], deadline_s: float) -> None:
        """Wait for every work; on a failure, look briefly who else is gone, then raise for all of them.

        After a closed connection, others that are merely not done yet are not blamed. After the deadline, everybody
        who isn't done is: gloo ends the whole group at the first timeout, but what has arrived by then still counts.
        """
        end = time.monotonic() + deadline_s
        failed: list[int] = []
        first: RuntimeError | None = None
        for shard_idx, work in works:
            left_s = end - time.monotonic() if first is None else 0.02
            try:
                work.wait(timedelta(seconds=max(left_s, 0.001)))
            except RuntimeError as error:
                if first is None:
                    first = error
                    failed.append(shard_idx)
                elif (_timed_out(first) or not _timed_out(error)) and shard_idx not in failed:
                    failed.append(shard_idx)
        if first is not None:
            raise self._failure(first, tuple(failed))

    def _failure(self, error: RuntimeError, shard_idxs: Sequence[int]) -> ExchangeError:
        suspects = tuple(self.shard_ids[i] for i in shard_idxs)
        kind = PeerSilent if _timed_out(error) else PeerLost
        return kind(f"exchange in group {self.group.name} failed at {list(suspects)}: {first_line(error)}", suspects)


class StarRouter(_RouterBase):
    def send(self, headers: Sequence[Header], messages: Sequence[Message | None]) -> Flight:
        flight = Flight([], [], [], [], [])
        for shard_idx, (header, message) in enumerate(zip(headers, messages, strict=True)):
            if message is None:
                flight.headers.append(None)
                flight.replies.append(None)
                continue
            tensor = header.to_tensor()
            reply = torch.empty(
                header.num_rows, header.hidden_size, dtype=reply_dtype(self.group.device), device=self.group.device
            )
            flight.headers.append(header)
            flight.replies.append(reply)
            flight.buffers += [tensor, message.buffer]
            flight.sends.append((shard_idx, self._post(shard_idx, tensor, HEADER_TAG)))
            flight.sends.append((shard_idx, self._post(shard_idx, message.buffer, MESSAGE_TAG)))
            try:
                work = self.group.data.recv([reply], shard_idx + 1, REPLY_TAG)
            except RuntimeError as error:
                raise self._failure(error, (shard_idx,)) from None
            flight.receives.append((shard_idx, work))
        return flight

    def receive(self, flight: Flight, deadline_s: float) -> list[Tensor | None]:
        end = time.monotonic() + deadline_s
        self._wait_all(flight.receives, deadline_s)
        self._wait_all(flight.sends, max(end - time.monotonic(), 0.001))
        return flight.replies


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
