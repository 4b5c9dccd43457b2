"""The shard's side of a transport under test: it doubles the rows it gets. Run in a thread or in a process. And a
process that is no shard."""

from __future__ import annotations

import os
import socket

import torch

from cluster.errors import ExchangeError
from cluster.host_transport import ANSWER_TAG, HELLO, NAME_BYTES, NAME_TAG, _address
from cluster.process_group import MeshGroup, connect_store, form_group
from cluster.shard_transports import StarShard
from cluster.transport import ShardTransport, shard_transport
from cluster.wire import LANES, Opcode


def form(store, name, rank, world_size, formation_s=10.0, operation_s=20.0) -> MeshGroup:
    return form_group(
        store,
        name,
        rank=rank,
        world_size=world_size,
        host="127.0.0.1",
        device=torch.device("cpu"),
        formation_s=formation_s,
        operation_s=operation_s,
    )


def decline(group: MeshGroup) -> StarShard:
    """What a shard on another host does with the router's offer of a channel."""
    group.control.recv([torch.zeros(NAME_BYTES, dtype=torch.uint8)], 0, NAME_TAG).wait()
    group.control.send([torch.zeros(1, dtype=torch.int64)], 0, ANSWER_TAG).wait()
    return StarShard(group)


def serve(transport, store_port, name, rank, world_size, *, is_far=False, formation_s=10.0, operation_s=20.0) -> int:
    """Answer every STEP until CLOSE or until the router is gone; returns how many."""
    try:
        store = connect_store("127.0.0.1", store_port, timeout_s=10)
        group = form(store, name, rank, world_size, formation_s, operation_s)
        return _answer(decline(group) if is_far else shard_transport(transport, group))
    except ExchangeError as error:
        failure = type(error)(str(error))
    raise failure  # without the frames that would keep the group, and its sockets, open


def ask_for_memory(name, pipe) -> None:
    """As a process of another user that has learnt a router's name; tells how many files and bytes it was given."""
    os.setuid(65534)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as router:
        router.connect(_address(name))
        router.send(HELLO.pack(1))
        pipe.send("connected")
        try:
            data, fds, _, _ = socket.recv_fds(router, 1, LANES)
        except ConnectionError:
            data, fds = b"", []
        pipe.send((len(fds), len(data)))


def _answer(shard: ShardTransport) -> int:
    served = 0
    while True:
        header = shard.next_header()
        if header.opcode == Opcode.CLOSE:
            return served
        if header.opcode == Opcode.STEP:
            message = shard.receive(header)
            message.sums_NH.copy_(message.rows_NH.double() * 2 + message.pair_weights_P.sum())
            message.sums_NH[message.pair_rows_P] += message.pair_experts_P[:, None]
            shard.reply(header, message)
            served += 1
