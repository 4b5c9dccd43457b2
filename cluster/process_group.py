"""Process groups for one router and its shards, without torch.distributed's global state.

Rank 0 is the router, which also hosts the TCPStore: when the router dies, its groups die with it and nobody
else's do. Every epoch's group has a prefix of its own in that store.

Seen with gloo in torch 2.13 and relied upon here: a killed peer makes pending operations raise within tens of
milliseconds, all but a send that was posted between the death and its discovery, which waits for its own deadline; a
stopped peer only at the deadline; an operation that times out closes the whole group; sockets close when the last
Python reference to the group (and to its pending works) is dropped, and that waits for collectives still under way,
whose deadline is formation_s whatever their wait() says. So: a group with a silent member is dropped, never reused and
never waited for, as is one whose collectives failed; and where collectives are used its connections are closed first.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass
from datetime import timedelta
from typing import cast

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, ProcessGroup, ProcessGroupGloo, TCPStore  # type: ignore[attr-defined]

from cluster.errors import FormationError, first_line


@dataclass(slots=True)
class MeshGroup:
    """One epoch's group as one member sees it.

    control: gloo, host memory: headers, always. data: rows; the same group on CPU, NCCL on CUDA.
    formation_s: how long a step of its forming may wait. operation_s: how long any other operation may, unless the
    caller gives a deadline of its own.
    """

    name: str
    rank: int
    world_size: int
    device: torch.device
    formation_s: float
    operation_s: float
    control: ProcessGroup
    data: ProcessGroup

    @property
    def operation_timeout(self) -> timedelta:
        return timedelta(seconds=self.operation_s)


def host_store(host: str, *, timeout_s: float) -> TCPStore:
    """Start the router's store on `host` and nowhere else (left to itself, TCPStore listens on every address);
    `.port` says where it listens."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family, backlog=1024) as listening:
        port, fd = listening.getsockname()[1], listening.detach()  # the store closes it
    return TCPStore(host, port, None, True, timedelta(seconds=timeout_s), wait_for_workers=False, master_listen_fd=fd)


def connect_store(host: str, port: int, *, timeout_s: float) -> TCPStore:
    """A shard's connection to a router's store."""
    return TCPStore(host, port, None, False, timedelta(seconds=timeout_s))


def form_group(
    store: TCPStore,
    name: str,
    *,
    rank: int,
    world_size: int,
    host: str,
    device: torch.device,
    formation_s: float,
    operation_s: float,
) -> MeshGroup:
    """Join the group `name`. Collective: every rank must call it with the same name and world size.

    host is this member's own address on the cluster network. Raises FormationError when not all of them came
    within formation_s. Afterwards each operation may take operation_s.
    """
    prefixed = PrefixStore(name, store)
    try:
        options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._timeout = timedelta(seconds=formation_s)
        options._devices = [ProcessGroupGloo.create_device(hostname=host)]
        options._threads = 1
        control = cast(ProcessGroup, ProcessGroupGloo(prefixed, rank, world_size, options))
        data = control if device.type != "cuda" else _nccl_group(prefixed, rank, world_size, device, operation_s)
    except RuntimeError as error:
        raise FormationError(f"group {name} (rank {rank} of {world_size}): {first_line(error)}") from None
    return MeshGroup(
        name=name,
        rank=rank,
        world_size=world_size,
        device=device,
        formation_s=formation_s,
        operation_s=operation_s,
        control=control,
        data=data,
    )


def _nccl_group(
    store: PrefixStore, rank: int, world_size: int, device: torch.device, operation_s: float
) -> ProcessGroup:
    """Read, not run: no GPU was at hand. The communicator is made eagerly, so a member that is missing shows in
    formation and not in the first step."""
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timedelta(seconds=operation_s)
    group = dist.ProcessGroupNCCL(PrefixStore("nccl", store), rank, world_size, options)
    group.eager_connect_single_device(device)
    return cast(ProcessGroup, group)


def forget_groups(store: TCPStore, owner: str, *, before: int) -> None:
    """Delete what the groups "<owner>/<epoch>" below epoch `before` left in the store, whether they formed or not.

    Not the newest one's keys: rank 0 may be done while others still read each other's addresses. A member that is
    still forming an older group waits in vain until its deadline, and that group is over anyway.
    """
    for key in store.list_keys():
        name, _, rest = key.partition("/")
        epoch = rest.partition("/")[0]
        if name == owner and epoch.isdigit() and int(epoch) < before:
            store.delete_key(key)
