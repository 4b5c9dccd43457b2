"""A shard's end of each transport but `host`, which has its own: cluster.transport says what they promise."""

from __future__ import annotations

import torch
from torch import Tensor

from cluster.errors import ExchangeError, PeerLost, PeerSilent, first_line, timed_out
from cluster.process_group import MeshGroup
from cluster.wire import (
    HEADER_LENGTH,
    HEADER_TAG,
    MESSAGE_TAG,
    REPLY_TAG,
    ROUTER_RANK,
    Arena,
    Header,
    Message,
    no_bytes,
)


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
        self._all_to_all(buffer, no_bytes(self.group.device), [buffer.numel()], [0])

    def _reply(self, sums_NH: Tensor) -> None:
        source = sums_NH.view(-1).view(torch.uint8)
        self._all_to_all(no_bytes(self.group.device), source, [0], [source.numel()])

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
            cause = PeerSilent if timed_out(error) else PeerLost
            raise cause(f"router of group {self.group.name}: {first_line(error)}") from None
