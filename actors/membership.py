"""A router's side of membership: follow the supervisor's views and have each one's process group ready.

One thread waits for views; each new view is connected by a thread of its own, so that a member which never comes
holds up nothing but its own epoch. The engine picks up the newest connection between steps. An epoch whose members
are all in the group that is there needs no other one: it is ready at once.

    supervisor --view--> watcher --join--> shards        rank 0 forms the group with them
                                 --form--> connection --> engine
"""

from __future__ import annotations

import gc
import logging
import threading
from collections.abc import Callable
from typing import Protocol

import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from actors.remote_exchange import Connection
from cluster.errors import FormationError, MeshUnavailable, first_line
from cluster.process_group import connect_store, forget_groups, form_group, host_store
from cluster.settings import Timeouts
from cluster.transport import choose_transport, router_transport
from cluster.view import MeshView

log = logging.getLogger("expertmesh.membership")


class MeshClient(Protocol):
    """The calls a router makes across the cluster. The real one goes through Ray; tests use their own."""

    def next_view(self, router_id: str, seen_epoch: int, live_epoch: int) -> MeshView | None:
        """Wait (some seconds at most) for a view above seen_epoch; None when none came. Raises on trouble."""

    def join(
        self, view: MeshView, *, router_id: str, store_host: str, store_port: int, group: str, transport: str
    ) -> Callable[[], tuple[str, ...]]:
        """Ask every shard of the view to join the group. The returned function waits and names who failed."""

    def report(self, router_id: str, epoch: int, suspects: tuple[str, ...], reason: str) -> None:
        """Returns at once."""


class RouterMembership:
    """Implements actors.remote_exchange.Membership. start() begins watching; close() ends it."""

    def __init__(
        self,
        client: MeshClient,
        *,
        router_id: str,
        host: str,
        transport: str,
        device: torch.device,
        timeouts: Timeouts,
        live_epoch: Callable[[], int],
        num_routers: int = 1,
    ) -> None:
        self._client = client
        self._router_id = router_id
        self._host = host
        self._transport = transport
        self._device = device
        self._timeouts = timeouts
        self._live_epoch = live_epoch
        self._num_routers = num_routers
        self._store: TCPStore = host_store(host, timeout_s=timeouts.formation_s)
        self._changed = threading.Condition()
        self._newest: Connection | None = None
        self._reusable: Connection | None = None  # with the group that later epochs may use; may lack experts
        self._latest_epoch = 0
        self._closed = False
        self._failure: tuple[int, tuple[str, ...], str] | None = None
        self.view: MeshView | None = None

    def start(self) -> None:
        threading.Thread(target=self._watch, name="mesh-watch", daemon=True).start()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._newest = self._reusable = None
            self._changed.notify_all()

    def newest(self) -> Connection | None:
        return self._newest

    def kept(self) -> Connection | None:
        return self._reusable

    def num_store_keys(self) -> int:
        return len(self._store.list_keys())

    def report(
        self, failed: Connection, suspects: tuple[str, ...], reason: str, *, left: Connection | None, goes_on: bool
    ) -> None:
        epoch = failed.view.epoch
        with self._changed:
            if self._newest is not None and self._newest.transport is failed.transport:
                epoch = max(epoch, self._newest.view.epoch)  # a later one that was to use this group fails with it
                self._newest = left if goes_on else None
            if self._reusable is not None and self._reusable.transport is failed.transport:
                self._reusable = left
        self._tell(epoch, suspects, reason)

    def _tell(self, epoch: int, suspects: tuple[str, ...], reason: str) -> None:
        """Said again by the watcher until a newer view comes: the supervisor may be away just now."""
        with self._changed:
            if self._failure is None or self._failure[0] <= epoch:
                self._failure = (epoch, suspects, reason)
        self._client.report(self._router_id, epoch, suspects, reason)

    def wait_newer(self, epoch: int, deadline_s: float) -> Connection:
        with self._changed:
            self._changed.wait_for(
                lambda: self._closed or (self._newest is not None and self._newest.view.epoch > epoch), deadline_s
            )
            if self._newest is None or self._newest.view.epoch <= epoch:
                why = f" ({self._failure[2]})" if self._failure else ""
                raise MeshUnavailable(
                    f"no complete mesh after epoch {epoch} within {deadline_s:.1f} s{why}; see GET /mesh for what is "
                    "missing"
                )
            return self._newest

    def _watch(self) -> None:
        pause_s = 0.05
        while not self._closed:
            try:
                view = self._client.next_view(self._router_id, self._latest_epoch, self._live_epoch())
                pause_s = 0.05
            except Exception as error:  # the supervisor is away: serving goes on, ask again soon
                log.warning("supervisor unreachable: %s", str(error)[:200])
                with self._changed:
                    self._changed.wait_for(lambda: self._closed, pause_s)
                pause_s = min(2 * pause_s, 1.0)
                continue
            failure = self._failure
            if view is None and failure is not None and failure[0] >= self._latest_epoch and not self._closed:
                self._client.report(self._router_id, *failure)
            if view is not None and view.epoch > self._latest_epoch:
                self._latest_epoch = view.epoch
                self.view = view
                name = f"connect-{view.epoch}"
                threading.Thread(target=self._connect, args=(view,), name=name, daemon=True).start()

    def _connect(self, view: MeshView) -> None:
        try:
            with self._changed:
                if self._reuse(view):
                    return
            connection = self._form(view)
        except Exception as error:  # torch's own too, of the store, and Ray's: a thread that ends here tells nobody
            suspects = error.suspects if isinstance(error, FormationError) else ()
            if not isinstance(error, FormationError):  # nothing that another try would mend: no hurry to fail again
                log.error("epoch %d can't be formed: %s", view.epoch, error)
                with self._changed:
                    self._changed.wait_for(lambda: self._closed, 2.0)
            if view.epoch == self._latest_epoch and not self._closed:
                self._tell(view.epoch, suspects, str(error))
            return
        with self._changed:
            was_kept = self._newest is None and self._reusable is not None
            if not self._closed and view.epoch == self._latest_epoch:
                self._newest = self._reusable = connection
                self._changed.notify_all()
        if was_kept:
            gc.collect()  # a group that was kept for nothing closes with its last reference

    def _reuse(self, view: MeshView) -> bool:
        """Serve the view with the group that is there, if all members are in it. Called with the lock held.

        Not across a thousand: after its restart the supervisor asks shards for the newest epoch they formed a group
        for, and goes on in the next thousand."""
        held = self._reusable
        if held is None or held.formed // 1000 != view.epoch // 1000 or not held.transport.can_serve(view.shard_ids):
            return False
        if not self._closed and view.epoch == self._latest_epoch:
            self._newest = self._reusable = Connection.over(view, held.transport, held.formed)
            self._changed.notify_all()
        return True

    def _watch_joins(self, view: MeshView, failures: Callable[[], tuple[str, ...]]) -> None:
        """A shard that can't even be called is known at once; forming would only find out at its deadline."""
        missing = failures()
        if missing and view.epoch == self._latest_epoch and not self._closed:
            self._tell(view.epoch, missing, "could not be asked to join")

    def _form(self, view: MeshView) -> Connection:
        transport = choose_transport(self._transport, self._device, self._num_routers)
        name = f"{self._router_id}/{view.epoch}"
        failures = self._client.join(
            view,
            router_id=self._router_id,
            store_host=self._host,
            store_port=self._store.port,
            group=name,
            transport=transport,
        )
        threading.Thread(target=self._watch_joins, args=(view, failures), name="joins", daemon=True).start()
        try:
            # A connection of its own: one that waits for a member which never comes lets nothing else through.
            group = form_group(
                connect_store(self._host, self._store.port, timeout_s=self._timeouts.formation_s),
                name,
                rank=0,
                world_size=len(view.shards) + 1,
                host=self._host,
                device=self._device,
                formation_s=self._timeouts.formation_s,
                operation_s=self._timeouts.exchange_max_s,
            )
        except FormationError as error:
            raise FormationError(str(error), failures()) from None  # waits no longer than forming did
        try:
            forget_groups(self._store, self._router_id, before=view.epoch)
        except RuntimeError as error:
            log.warning("keys of older groups stay in the store: %s", first_line(error))
        exchange = router_transport(transport, group, view.shard_ids)
        return Connection.over(view, exchange, view.epoch)
