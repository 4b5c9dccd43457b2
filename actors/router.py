"""The router process: attention, KV cache and requests on one side, the link server and the mesh on the other.

ingress ==link==> LinkServer --> Engine --> Decoder --> RemoteExchange ==group==> shards
                                                             ^
                                   supervisor ==view==> RouterMembership
"""

from __future__ import annotations

import logging
import os
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from actors.blocks import BlockManager, BlockPool
from actors.engine import Engine, StepExchange
from actors.engine_model import EngineModel
from actors.kv_budget import kv_budget
from actors.link_server import LinkServer
from actors.membership import MeshClient, RouterMembership
from actors.mesh_watch import RouterFigures
from actors.model_source import load_config, locate_model
from actors.remote_exchange import RemoteExchange
from actors.scheduler import Scheduler
from actors.specs import RouterSpec
from model.checkpoint import Checkpoint
from model.config import ModelConfig
from model.heads import Head
from model.kernels import REFERENCE_KERNELS, Kernels, select_kernels
from model.kv_cache import KV_DTYPES, KVCache
from model.load import Loader
from model.moe import LocalExchange
from model.structured import GrammarCompiler
from model.tokenizer import Tokenizer

log = logging.getLogger("expertmesh.router")


class Router:
    """Builds everything and runs it. Raises ValueError for a model that can't be served."""

    def __init__(
        self, router_id: str, spec: RouterSpec, *, host: str, device: torch.device, client: MeshClient
    ) -> None:
        torch.set_num_threads(spec.num_threads)
        self.router_id = router_id
        self.host = host
        self._spec = spec
        directory = locate_model(spec.model, spec.revision, spec.download_dir)
        config = load_config(directory, spec.dtype)
        compiler = None
        tokenizer_directory = Path(spec.tokenizer or directory)
        if spec.tokenizer or (tokenizer_directory / "tokenizer.json").is_file():
            tokenizer = Tokenizer.without_template(tokenizer_directory)
            config = replace(config, eos_token_ids=tokenizer.end_ids(config.eos_token_ids))
            compiler = GrammarCompiler(tokenizer, config.vocab_size, config.eos_token_ids)
        kernels = select_kernels(device, num_threads=spec.num_threads)
        model, blocks = _load(spec, directory, config, kernels, device)
        if kernels is not REFERENCE_KERNELS:
            torch.set_num_threads(1)  # what torch still does is small, and its threads would stand in the kernels' way
        self.membership = RouterMembership(
            client,
            router_id=router_id,
            host=host,
            transport=spec.transport,
            device=device,
            timeouts=spec.timeouts,
            num_routers=spec.num_routers,
            live_epoch=lambda: self.exchange.epoch if isinstance(self.exchange, RemoteExchange) else 0,
        )
        self.exchange: StepExchange
        if spec.local:
            loader = Loader(Checkpoint(directory), config, spec.quantization, device, kernels)
            self.exchange = _LocalSteps(loader.experts(spec.num_threads), kernels)
        else:
            self.exchange = RemoteExchange(
                self.membership,
                num_experts=config.num_experts,
                hidden_size=config.hidden_size,
                timeouts=spec.timeouts,
                device=device,
                clock=time.monotonic,
            )
        self.server = LinkServer(
            router_id=router_id,
            token=spec.token,
            models=[spec.served_name, *spec.heads],
            compiler=compiler,
            commands={"reset_prefix_cache": self._reset_prefix_cache, "stats": self.stats},
            load=self._load_report,
        )
        self.engine = Engine(
            model,
            Scheduler(spec.limits, blocks),
            self.exchange,
            self.server.deliver,
            two_batch_overlap=spec.two_batch_overlap,
        )
        self._thread = threading.Thread(target=self.engine.run, name="engine", daemon=True)
        self.port = 0

    def start(self) -> int:
        """Start watching the mesh, computing and listening; returns the link's port."""
        self.port = self.server.start(self.engine, self.host)
        self.membership.start()
        self._thread.start()
        return self.port

    def stop(self) -> None:
        self.server.stop()
        self.engine.stop()
        self._thread.join(timeout=10)
        self.membership.close()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def is_ready(self) -> bool:
        """A complete mesh is connected, so requests can finish."""
        return self.is_alive and (self._spec.local or self.membership.newest() is not None)

    def figures(self) -> RouterFigures | None:
        """What the supervisor balances by; None with local experts."""
        exchange = self.exchange
        if not isinstance(exchange, RemoteExchange):
            return None
        return {
            "tokens": {i: counts.tolist() for i, counts in list(exchange.expert_tokens.items())},
            "activated": {i: counts.tolist() for i, counts in list(exchange.expert_uses.items())},
            "wait_s": exchange.traffic.combine.total,
            "time_s": time.monotonic(),
        }

    def stats(self) -> dict[str, Any]:
        """Figures since the start. Best called on the engine's thread."""
        engine, scheduler, exchange = self.engine, self.engine.scheduler, self.exchange
        stats: dict[str, Any] = {
            "router_id": self.router_id,
            "pid": os.getpid(),
            **{name: getattr(engine.stats, name) for name in type(engine.stats).__slots__},
            **self._load_report(),
            "num_preemptions": scheduler.num_preemptions,
            "prefix_cache_queries": scheduler.num_prefix_queries,
            "prefix_cache_hits": scheduler.num_prefix_hits,
            "kv_blocks_used": [pool.num_used for pool in scheduler.blocks.pools],
            "kv_blocks_total": [pool.num_blocks - 1 for pool in scheduler.blocks.pools],
        }
        if isinstance(exchange, RemoteExchange):
            stats |= {
                "epoch": exchange.epoch,
                "num_store_keys": self.membership.num_store_keys(),
                "num_recoveries": exchange.num_recoveries,
                "recovery_s": exchange.recovery_s,
                "last_recovery_s": exchange.last_recovery_s,
                "exchange": exchange.traffic.to_dict(),
                "expert_tokens": {str(i): counts.tolist() for i, counts in exchange.expert_tokens.items()},
            }
        return stats

    def _load_report(self) -> dict[str, Any]:
        scheduler = self.engine.scheduler
        return {
            "ready": self.is_ready,
            "running": len(scheduler.running),
            "waiting": len(scheduler.waiting),
            "kv_usage": round(scheduler.blocks.usage(), 4),
        }

    def _reset_prefix_cache(self) -> dict[str, Any]:
        for pool in self.engine.scheduler.blocks.pools:
            pool.forget_names()
        return {"ok": True}


class _LocalSteps(LocalExchange, StepExchange):
    """`--local`: all experts in the router's own process. For one device, and the reference for the mesh."""


def _load(
    spec: RouterSpec, directory: Path, config: ModelConfig, kernels: Kernels, device: torch.device
) -> tuple[EngineModel, BlockManager]:
    checkpoint = Checkpoint(directory)
    loader = Loader(checkpoint, config, spec.quantization, device, kernels)
    decoder = loader.decoder()
    lm_head = loader.head(decoder) if config.head_kind == "causal_lm" else None
    heads = {name: _load_further_head(path, checkpoint, config, device) for name, path in spec.heads.items()}
    if config.head_kind not in ("causal_lm", "base"):
        heads[spec.served_name] = loader.head(decoder)
    budget = kv_budget(spec, config)
    windows = [config.sliding_window if name == "sliding" else None for name in config.kv_groups]
    blocks = BlockManager(
        [BlockPool(n) for n in budget.num_blocks],
        windows,
        spec.block_size,
        spec.prefix_caching and not config.rope.depends_on_length,
    )
    model = EngineModel(
        decoder=decoder,
        lm_head=lm_head,
        heads=heads,
        kv_cache=KVCache.allocate(
            config,
            num_blocks=budget.num_blocks,
            block_size=spec.block_size,
            dtype=KV_DTYPES[spec.kv_dtype],
            device=device,
        ),
        device=device,
        max_model_len=budget.max_model_len,
        eos_token_ids=tuple(token_id for token_id in config.eos_token_ids if token_id < config.vocab_size),
    )
    return model, blocks


def _load_further_head(path: str, backbone: Checkpoint, config: ModelConfig, device: torch.device) -> Head:
    """A head of another checkpoint on the same backbone files. Raises ValueError when the backbone is another."""
    checkpoint = Checkpoint(path)
    if checkpoint.backbone_id() != backbone.backbone_id():
        raise ValueError(
            f"{path} has a backbone of its own and cannot share this mesh; serve it as a model with its own mesh"
        )
    head_config = ModelConfig.from_directory(Path(path))
    if head_config.hidden_size != config.hidden_size:
        raise ValueError(f"{path}: hidden_size={head_config.hidden_size}, but the backbone's is {config.hidden_size}")
    return Loader(checkpoint, head_config, device=device).head()
