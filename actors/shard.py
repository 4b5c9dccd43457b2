"""An expert shard: holds experts, answers every router's exchanges, and knows nothing else.

One listener thread per router group waits for headers; computing is one at a time under a lock, so two routers'
rows never fight for the cores. A group ends when its router says CLOSE, dies, or is silent for too long.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import threading
import time
import traceback
from collections.abc import Iterable
from typing import Any

import torch

from actors.model_source import load_config, locate_model
from actors.specs import ShardSpec
from cluster.errors import ExchangeError, FormationError
from cluster.placement import ExpertKey
from cluster.process_group import connect_store, form_group
from cluster.transport import ShardTransport, shard_transport
from cluster.wire import Header, Message, Opcode
from model.checkpoint import Checkpoint
from model.experts import ExpertWeights
from model.kernels import select_kernels
from model.load import Loader

log = logging.getLogger("expertmesh.shard")


class ExpertShard:
    """Plain class; Ray wraps it. Methods may be called from several threads."""

    def __init__(self, shard_id: str, spec: ShardSpec, *, host: str, node_id: str, device: torch.device) -> None:
        torch.set_num_threads(spec.num_threads)
        self.shard_id = shard_id
        self._spec = spec
        self._host = host
        self._node_id = node_id
        self._device = device
        directory = locate_model(spec.model, spec.revision, spec.download_dir)
        self._config = load_config(directory, spec.dtype)
        self._kernels = select_kernels(device, num_threads=spec.num_threads)
        self._loader = Loader(Checkpoint(directory), self._config, spec.quantization, device, self._kernels)
        self._layers: dict[int, dict[int, ExpertWeights]] = {i: {} for i in self._config.moe_layers}
        self._tables = {i: self._kernels.expert_table(layer) for i, layer in self._layers.items()}
        self._load_lock = threading.Lock()
        self._compute_lock = threading.Lock()
        self._issue_order: contextlib.AbstractContextManager[Any] = (
            threading.Lock() if device.type == "cuda" else contextlib.nullcontext()
        )
        self._groups: dict[str, int] = {}
        self._newest_epoch = 0
        self._order = 0
        self._note: dict[str, Any] = {}
        self._num_rows = 0
        self._num_pairs = 0
        self._busy_s = 0.0
        self._started = time.monotonic()

    def info(self) -> dict[str, Any]:
        """Identity, what it has loaded, also while a load is under way, and what it has done since its start."""
        return {
            "shard_id": self.shard_id,
            "pid": os.getpid(),
            "node_id": self._node_id,
            "host": self._host,
            "device": str(self._device),
            "epoch": self._newest_epoch,
            "order": self._order,
            "note": self._note,
            "num_groups": len(self._groups),
            "num_experts": sum(len(layer) for layer in self._layers.values()),
            "weight_bytes": sum(e.num_bytes for layer in list(self._layers.values()) for e in list(layer.values())),
            "bytes_read": self._loader.checkpoint.bytes_read,
            "tokens": self._num_rows,
            "pairs": self._num_pairs,
            "busy_s": round(self._busy_s, 4),
            "uptime_s": round(time.monotonic() - self._started, 1),
        }

    def ping(self) -> int:
        """The newest epoch this shard has joined a group of."""
        return self._newest_epoch

    def held(self) -> list[ExpertKey]:
        """What it can compute with: nothing of a load that is under way, or that failed."""
        return [(i, e) for i, table in self._tables.items() for e in table]

    def remember(self, note: dict[str, Any]) -> None:
        """Keep a note for the next supervisor; `info` shows it."""
        self._note = note

    def load(self, keys: Iterable[ExpertKey], order: int = 0) -> int:
        """Load what is not there yet; returns the bytes of weights now held. Raises ValueError for a bad checkpoint.

        order: the supervisor's orders rise; see keep_only.
        """
        with self._load_lock:
            self._order = max(self._order, order)
            for layer_idx, expert_id in keys:
                layer = self._layers[layer_idx]
                if expert_id not in layer:
                    layer[expert_id] = self._loader.expert(layer_idx, expert_id)
            self._make_tables()
        return int(self.info()["weight_bytes"])

    def keep_only(self, keys: Iterable[ExpertKey], order: int = 0) -> None:
        """Forget every other expert. A router that still asks for one gets its group closed, and comes again.

        An order below the newest load's came late, and must not take away what that load brought.
        """
        wanted = set(keys)
        with self._load_lock:
            if order < self._order:
                return
            for layer_idx, layer in self._layers.items():
                for expert_id in [e for e in layer if (layer_idx, e) not in wanted]:
                    del layer[expert_id]
            self._make_tables()
        gc.collect()

    def _make_tables(self) -> None:
        """What is computed with from now on. A table is never changed: one in use stays whole."""
        self._tables = {i: self._kernels.expert_table(layer) for i, layer in self._layers.items()}

    def join(
        self,
        *,
        router_id: str,
        store_host: str,
        store_port: int,
        group: str,
        epoch: int,
        rank: int,
        world_size: int,
        transport: str,
    ) -> None:
        """Form the router's group of this epoch and serve it from now on. Collective with the router's side.

        Raises FormationError when the others did not come, or when this shard has seen a newer epoch already.
        """
        if epoch < self._newest_epoch:
            raise FormationError(f"{self.shard_id} is at epoch {self._newest_epoch}; epoch {epoch} is over")
        self._newest_epoch = epoch
        timeouts = self._spec.timeouts
        formed = form_group(
            connect_store(store_host, store_port, timeout_s=timeouts.formation_s),
            group,
            rank=rank,
            world_size=world_size,
            host=self._host,
            device=self._device,
            formation_s=timeouts.formation_s,
            operation_s=timeouts.idle_s,
        )
        exchange = shard_transport(transport, formed)
        self._groups[group] = epoch
        name = f"serve-{router_id}-{epoch}"
        threading.Thread(target=self._serve, args=(exchange, group, epoch), name=name, daemon=True).start()

    def _serve(self, transport: ShardTransport, group: str, epoch: int) -> None:
        try:
            self._answer_until_closed(transport, epoch)
        except ExchangeError as error:
            log.info("%s leaves group %s: %s", self.shard_id, group, error)
        except Exception:
            # As text: a kept traceback would keep the group, and its sockets, open.
            log.error("%s closes group %s: %s", self.shard_id, group, traceback.format_exc())
        finally:
            self._groups.pop(group, None)
            del transport
            gc.collect()  # sockets close with the last reference

    @torch.inference_mode()
    def _answer_until_closed(self, transport: ShardTransport, epoch: int) -> None:
        while True:
            header = transport.next_header()
            if header.epoch != epoch:
                raise ExchangeError(f"header of epoch {header.epoch} in a group of epoch {epoch}")
            if header.opcode == Opcode.CLOSE:
                return
            if header.opcode == Opcode.STEP:
                with self._issue_order:
                    message = transport.receive(header)
                    self._compute(header, message)
                    transport.reply(header, message)

    def _compute(self, header: Header, message: Message) -> None:
        if header.num_rows == 0:
            return
        with self._compute_lock:
            started = time.perf_counter()
            self._kernels.run_experts(
                message.rows_NH,
                message.pair_rows_P,
                message.pair_experts_P,
                message.pair_weights_P,
                self._tables[header.layer],
                message.sums_NH,
            )
            self._busy_s += time.perf_counter() - started
            self._num_rows += header.num_rows
            self._num_pairs += header.num_pairs
