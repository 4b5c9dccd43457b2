"""The exchange over the mesh: plan, send, wait, add up; and when a shard is lost, again on the next epoch.

A layer's input stays with its receipt until all partial sums are back. So when an exchange fails, only that layer's
exchange is repeated: at once where replicas hold what is lost, else on the next epoch. The step goes on as if nothing
had happened; nothing is ever committed with a contribution missing.

Two exchanges may be under way at once, for two micro-batches that take turns. Where one finds that the group is lost,
the other finds itself without one when its turn comes, and is repeated too.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from actors.metrics import Traffic
from cluster.dispatch import DispatchPlan, RoutingTable, plan_dispatch, routing_tables
from cluster.errors import ExchangeError, MeshUnavailable
from cluster.settings import Timeouts
from cluster.transport import RouterTransport
from cluster.view import MeshView
from cluster.wire import LANES, Header, Message, Opcode, sums_dtype

log = logging.getLogger("expertmesh.exchange")
HALF_LIFE_S = 10.0


@dataclass(frozen=True, slots=True)
class Connection:
    """One epoch's view and a group that serves it. formed: the epoch that the group was formed for."""

    view: MeshView
    transport: RouterTransport
    tables: Mapping[int, RoutingTable]
    formed: int

    @staticmethod
    def over(view: MeshView, transport: RouterTransport, formed: int) -> Connection:
        """Raises ValueError where an expert has no holder in the group."""
        return Connection(view, transport, routing_tables(view.placement, transport.shard_ids), formed)


class Membership(Protocol):
    """What the exchange asks of the mesh. See actors.membership for the real one."""

    def newest(self) -> Connection | None:
        """The newest formed connection."""

    def kept(self) -> Connection | None:
        """With the group that later epochs may use, if there is one; it may lack experts."""

    def report(
        self, failed: Connection, suspects: tuple[str, ...], reason: str, *, left: Connection | None, goes_on: bool
    ) -> None:
        """Tell the supervisor. Returns at once.

        left: the same group without the suspects, where it can be used further; goes_on: it lacks nothing."""

    def wait_newer(self, epoch: int, deadline_s: float) -> Connection:
        """The first formed connection above `epoch`. Raises MeshUnavailable after deadline_s."""


@dataclass(slots=True)
class _Receipt:
    """formed: the epoch of the group that it was sent to. sent: the plan that is under way and where its sums will be;
    None after a failure, which combine mends. total_TH: zeros to add the sums to, where they come from several shards.
    """

    layer_idx: int
    x_TH: Tensor
    topk_ids_TK: np.ndarray
    topk_weights_TK: Tensor
    started: float
    lane: int
    formed: int = 0
    sent: tuple[DispatchPlan, Message] | None = None
    failure: tuple[tuple[str, ...], str] | None = None
    total_TH: Tensor | None = None


class DeadlineEstimate:
    """How long an exchange may take: a few times what the slow ones among recent ones took, by their rows."""

    def __init__(self, timeouts: Timeouts, clock: Callable[[], float]) -> None:
        self._timeouts = timeouts
        self._clock = clock
        self._slowest_s = timeouts.exchange_max_s
        self._slowest_row_s = 0.0
        self._num_seen = 0
        self._seen_at = 0.0

    def observe(self, duration_s: float, num_rows: int) -> None:
        """The slowest one fades with time: what another router's long prefill at a shard took, its next one takes too,
        however many exchanges lie between. Its share of each row fades by 1 % an exchange, as it may be a wait that
        had nothing to do with rows. The first few (cold caches) say nothing."""
        self._num_seen += 1
        if self._num_seen < 8:
            return
        if self._num_seen == 8:
            self._slowest_s = self._slowest_row_s = 0.0
        now = self._clock()
        fading = 0.5 ** ((now - self._seen_at) / HALF_LIFE_S)
        self._seen_at = now
        self._slowest_s = max(duration_s, self._slowest_s * fading)
        self._slowest_row_s = max(duration_s / max(num_rows, 1), self._slowest_row_s * 0.99)

    def deadline_s(self, num_rows: int) -> float:
        expected_s = max(self._slowest_s, self._slowest_row_s * num_rows)
        limits = self._timeouts
        return min(max(limits.exchange_factor * expected_s, limits.exchange_min_s), limits.exchange_max_s)


class RemoteExchange:
    """The router's Exchange. Used by the engine's thread only.

    expert_tokens[layer_idx][expert_id] counts the pairs sent since the start, expert_uses the exchanges in which the
    expert got any.
    """

    num_lanes = LANES

    def __init__(
        self,
        membership: Membership,
        *,
        num_experts: int,
        hidden_size: int,
        timeouts: Timeouts,
        device: torch.device,
        clock: Callable[[], float],
    ) -> None:
        self._membership = membership
        self._num_experts = num_experts
        self._hidden_size = hidden_size
        self._timeouts = timeouts
        self._device = device
        self._clock = clock
        self._connection: Connection | None = None
        self._estimate = DeadlineEstimate(timeouts, clock)
        self._step = 0
        self._kept_alive_at = 0.0
        self._free_lanes = [True] * LANES
        self.expert_tokens: dict[int, np.ndarray] = {}
        self.expert_uses: dict[int, np.ndarray] = {}
        self.traffic = Traffic()
        self.num_recoveries = 0
        self.recovery_s = 0.0
        self.last_recovery_s = 0.0
        self.while_waiting: Callable[[], None] = lambda: None

    @property
    def epoch(self) -> int:
        return self._connection.view.epoch if self._connection else 0

    def begin_step(self) -> None:
        """Move to the newest epoch between steps. Raises MeshUnavailable where there is none within
        recovery_s: at the start, or after a loss."""
        self._step += 1
        if not all(self._free_lanes):  # nobody will ask for those sums, and later ones must not be taken for them
            self._free_lanes = [True] * LANES
            self._lose((), "a step was broken off while shards computed for it")
        self._keep_alive()
        newest = self._membership.newest()
        if newest is None:
            if self._connection is None:
                self._connection = self._wait_newer(0, self._clock() + self._timeouts.recovery_s)
        elif newest.view.epoch > self.epoch:
            self._use(newest)

    def idle(self) -> None:
        """Between steps with nothing to do: keep the group alive, follow epoch changes, notice the dead."""
        newest = self._membership.newest()
        if newest is not None and newest.view.epoch > self.epoch:
            self._use(newest)
        self._keep_alive()

    def close(self) -> None:
        if self._connection is not None:
            self._say_goodbye(self._connection)
            self._connection = None

    def dispatch(self, layer_idx: int, x_TH: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor) -> _Receipt:
        ids = topk_ids_TK.cpu().numpy()  # on CUDA: one device-to-host sync a layer
        receipt = _Receipt(layer_idx, x_TH, ids, topk_weights_TK, self._clock(), self._free_lanes.index(True))
        self._free_lanes[receipt.lane] = False
        self._send(receipt)
        self.traffic.dispatch.observe(self._clock() - receipt.started)
        # What can wait is done while the shards compute.
        self._count(layer_idx, np.bincount(ids.reshape(-1), minlength=self._num_experts))
        if receipt.sent is not None and not receipt.sent[0].is_on_one_shard:
            receipt.total_TH = torch.zeros(x_TH.shape, dtype=sums_dtype(self._device), device=self._device)
        return receipt

    def combine(self, receipt: _Receipt) -> Tensor:
        """Raises MeshUnavailable when no complete mesh came back within recovery_s."""
        summed_TH = self._finish(receipt)
        self._free_lanes[receipt.lane] = True
        return summed_TH

    def _finish(self, receipt: _Receipt) -> Tensor:
        asked = self._clock()
        give_up = asked + self._timeouts.recovery_s
        failed_at: float | None = None
        while True:
            summed = self._collect(receipt)
            if summed is not None:
                if failed_at is not None:
                    self._note_recovery(self._clock() - failed_at)
                self.traffic.combine.observe(self._clock() - asked)
                return summed
            assert receipt.failure is not None
            suspects, reason = receipt.failure
            receipt.sent, receipt.failure = None, None
            if not self._is_mended(receipt.formed, suspects):
                if failed_at is None:
                    failed_at = self._clock()
                failed_epoch = self.epoch
                self._lose(suspects, reason)
                if self._connection is None:
                    self._use(self._wait_newer(failed_epoch, give_up))
                assert self._connection is not None
                if suspects and set(suspects) <= self._connection.view.placement.shards():
                    # Nobody is dead, somebody only slow: wait longer next time.
                    self._estimate.observe(self._clock() - receipt.started, len(receipt.x_TH))
            receipt.started = self._clock()
            self._send(receipt)

    def _is_mended(self, formed: int, suspects: tuple[str, ...]) -> bool:
        """Whether the other exchange under way met the same failure, and goes on in another group or without them."""
        if self._connection is None:
            return False
        if formed != self._connection.formed:
            return True
        here = self._connection.view.placement.shards()
        return bool(suspects) and here.isdisjoint(suspects) and self._connection.transport.can_serve(here)

    def _wait_newer(self, epoch: int, give_up: float) -> Connection:
        """Wait until `give_up` on the clock, looking after everything else meanwhile. Raises MeshUnavailable."""
        while True:
            left_s = max(give_up - self._clock(), 0.0)
            try:
                return self._membership.wait_newer(epoch, min(left_s, 0.2))
            except MeshUnavailable:
                if left_s <= 0.2:
                    raise
            self._keep_alive()
            self.while_waiting()

    def _keep_alive(self) -> None:
        """Shards that hear nothing for idle_s leave the group: those that get no rows, and all of one that is kept for
        a later epoch."""
        now = self._clock()
        if now - self._kept_alive_at < self._timeouts.heartbeat_s:
            return
        self._kept_alive_at = now
        connection = self._connection or self._membership.kept()
        if connection is None:
            return
        try:
            connection.transport.keep_alive(Header(opcode=Opcode.IDLE, epoch=connection.formed))
        except ExchangeError as error:
            if self._connection is None:
                connection.transport.leave_out(error.suspects)
            else:
                self._lose(error.suspects, str(error))

    def _count(self, layer_idx: int, tokens_E: np.ndarray) -> None:
        if layer_idx not in self.expert_tokens:
            self.expert_tokens[layer_idx] = np.zeros_like(tokens_E)
            self.expert_uses[layer_idx] = np.zeros_like(tokens_E)
        self.expert_tokens[layer_idx] += tokens_E
        self.expert_uses[layer_idx] += tokens_E > 0

    def _send(self, receipt: _Receipt) -> None:
        """Start the exchange; a failure is kept in the receipt for combine() to mend."""
        connection = self._connection
        if connection is None:
            receipt.failure = ((), "no connection to the shards")
            return
        receipt.formed = connection.formed
        num_shards = len(connection.transport.shard_ids)
        table = connection.tables[receipt.layer_idx]
        plan = plan_dispatch(receipt.topk_ids_TK, table, num_shards, turn=self._step)
        rows, pairs = plan.row_starts, plan.pair_starts

        def header(first: int, end: int) -> Header:
            """For the shards [first, end)."""
            return Header(
                Opcode.STEP,
                connection.formed,
                self._step,
                receipt.layer_idx,
                self._hidden_size,
                rows[first],
                rows[end] - rows[first],
                pairs[first],
                pairs[end] - pairs[first],
                rows[-1],
                pairs[-1],
                receipt.lane,
            )

        headers = [header(i, i + 1) for i in range(num_shards)]
        try:
            message = connection.transport.prepare(header(0, num_shards))
            self._pack(receipt, plan, message)
            connection.transport.send(headers)
            receipt.sent = plan, message
            self.traffic.num_exchanges += 1
            self.traffic.dispatch_bytes += sum(header.message_bytes for header in headers)
        except ExchangeError as error:
            receipt.failure = (error.suspects, str(error))

    def _pack(self, receipt: _Receipt, plan: DispatchPlan, message: Message) -> None:
        message.pair_rows_P.copy_(self._to_device(plan.pair_rows_P))
        message.pair_experts_P.copy_(self._to_device(plan.pair_experts_P))
        weights = receipt.topk_weights_TK.reshape(-1)
        torch.index_select(weights, 0, self._to_device(plan.pair_index_P), out=message.pair_weights_P)
        torch.index_select(receipt.x_TH, 0, self._to_device(plan.token_of_row_N), out=message.rows_NH)

    def _collect(self, receipt: _Receipt) -> Tensor | None:
        """The combined rows, or None with receipt.failure set."""
        connection = self._connection
        if receipt.sent is None or connection is None or connection.formed != receipt.formed:
            if receipt.failure is None:
                receipt.failure = ((), "no connection to the shards")
            return None
        plan, message = receipt.sent
        num_tokens = len(receipt.x_TH)
        try:
            connection.transport.receive(self._estimate.deadline_s(num_tokens), receipt.lane)
        except ExchangeError as error:
            receipt.failure = (error.suspects, str(error))
            return None
        self._estimate.observe(self._clock() - receipt.started, num_tokens)
        sums_NH = message.sums_NH
        self.traffic.combine_bytes += sums_NH.nbytes
        if plan.is_on_one_shard:  # rows are all tokens, in order
            return sums_NH.float()
        total_TH = receipt.total_TH
        if total_TH is None:
            total_TH = torch.zeros(receipt.x_TH.shape, dtype=sums_NH.dtype, device=sums_NH.device)
        total_TH.index_add_(0, self._to_device(plan.token_of_row_N), sums_NH)
        return total_TH.float()

    def _to_device(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self._device, non_blocking=True)

    def _use(self, newest: Connection) -> None:
        old, self._connection = self._connection, newest
        if old is not None and old.transport is not newest.transport:
            self._say_goodbye(old)
        newest.transport.keep_only(newest.view.shard_ids, Header(opcode=Opcode.CLOSE, epoch=newest.formed))

    def _lose(self, suspects: tuple[str, ...], reason: str) -> None:
        """Report the suspects. Where replicas hold all that is lost, and the others' connections are whole, nobody need
        be waited for: the connection is the same group without them. Else there is none."""
        failed = self._connection
        if failed is None:
            return
        view, left = failed.view, None
        rest = view.placement.without(suspects)
        if suspects and failed.transport.leave_out(suspects):
            left = replace(failed, view=replace(view, placement=rest, reason=f"without {', '.join(suspects)}"))
        goes_on = left is not None and not rest.missing()
        if left is not None and goes_on:
            left = Connection.over(left.view, left.transport, left.formed)
        log.warning("epoch %d %s: %s", view.epoch, "goes on" if goes_on else "failed", reason)
        self._connection = left if goes_on else None
        self._membership.report(failed, suspects, reason, left=left, goes_on=goes_on)
        if left is None:
            del failed
            gc.collect()  # the group's sockets close with the last reference, and its peers wake up

    def _say_goodbye(self, connection: Connection) -> None:
        try:
            connection.transport.announce(Header(opcode=Opcode.CLOSE, epoch=connection.formed))
        except ExchangeError as error:
            log.info("closing epoch %d: %s", connection.view.epoch, error)

    def _note_recovery(self, duration_s: float) -> None:
        self.num_recoveries += 1
        self.recovery_s += duration_s
        self.last_recovery_s = duration_s
        view = self._connection.view if self._connection else None
        log.warning(
            "recovered: epoch %d (%s), %.0f ms from detection to the resumed step",
            self.epoch,
            view.reason if view else "",
            duration_s * 1e3,
        )
