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

from collections.abc import Collection, Sequence
from typing import Protocol

import torch

from cluster.host_transport import Channels, is_supported, meet_router, meet_shards
from cluster.process_group import MeshGroup
from cluster.router_transports import AllToAllRouter, PairRouter
from cluster.shard_transports import AllToAllShard, StarShard
from cluster.wire import Header, Message


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
