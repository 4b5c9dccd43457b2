"""From settings to what each part of the mesh is told."""

from __future__ import annotations

from pathlib import Path

from actors.mesh_plan import MeshPlan
from actors.model_source import locate_model
from actors.ray_shards import ShardResources
from actors.specs import RouterSpec, SchedulerLimits, ShardSpec
from cluster.settings import AutoscalePolicy, BalancePolicy, Timeouts
from deploy.node_report import Source
from deploy.settings import Settings
from model.config import ModelConfig

DEMO = Path(__file__).parent / "demo"
DEMO_HEADS = ("topics", "entities", "answers")


def model_path(settings: Settings) -> str:
    """Directory or hub id; "demo" is the model in the package."""
    return str(DEMO / "model") if settings.model.path == "demo" else settings.model.path


def model_directory(settings: Settings) -> Path:
    """The model's files on this node. Raises ValueError."""
    return locate_model(model_path(settings), settings.model.revision, settings.model.download_dir)


def model_everywhere(settings: Settings) -> Source:
    """What any node finds the model by: a directory, or a hub id with revision and cache, which is each node's own."""
    path = model_path(settings)
    path = str(model_directory(settings)) if Path(path).expanduser().is_dir() else path
    return path, settings.model.revision, settings.model.download_dir


def served_names(settings: Settings) -> tuple[str, ...]:
    """Names in the API; the first one is in answers."""
    if settings.model.served_names:
        return settings.model.served_names
    return (settings.model.path if settings.model.path == "demo" else Path(settings.model.path).name,)


def heads(settings: Settings) -> dict[str, str]:
    """Further heads on the backbone: served name -> directory. The demo brings its own."""
    found = {name: str(DEMO / name) for name in DEMO_HEADS} if settings.model.path == "demo" else {}
    return {**{n: p for n, p in found.items() if Path(p, "config.json").is_file()}, **settings.model.heads}


def timeouts(settings: Settings) -> Timeouts:
    return Timeouts(exchange_max_s=settings.mesh.step_timeout_s, recovery_s=settings.mesh.recovery_timeout_s)


def mesh_plan(settings: Settings, config: ModelConfig) -> MeshPlan:
    """Raises ValueError where the numbers can't be."""
    mesh = settings.mesh
    return MeshPlan(
        moe_layers=tuple(config.moe_layers),
        num_experts=config.num_experts,
        num_shards=0 if mesh.local else mesh.shards,
        replicas=mesh.replicas,
        num_spares=mesh.spares,
        balance=BalancePolicy(
            enabled=mesh.rebalance,
            objective=mesh.rebalance_objective,
            interval_s=mesh.rebalance_interval_s,
            window_s=mesh.rebalance_window_s,
            redundant_slots=mesh.redundant_slots,
        ),
        autoscale=AutoscalePolicy(
            enabled=mesh.autoscale,
            min_shards=mesh.min_shards,
            max_shards=mesh.max_shards,
            cooldown_s=mesh.autoscale_cooldown_s,
        ),
    )


def shard_spec(settings: Settings) -> ShardSpec:
    return ShardSpec(
        model=model_path(settings),
        revision=settings.model.revision,
        download_dir=settings.model.download_dir,
        dtype=_dtype(settings),
        quantization=settings.engine.quantization,
        timeouts=timeouts(settings),
        num_threads=1,
        log_format=settings.server.log_format,
    )


def shard_resources(settings: Settings) -> ShardResources:
    mesh = settings.mesh
    return ShardResources(
        num_cpus=mesh.shard_cpus, num_gpus=mesh.shard_gpus, resources=mesh.shard_resources, spread=mesh.spread
    )


def router_spec(settings: Settings, num_cores: int = 1) -> RouterSpec:
    """num_cores: of the router's node. Raises ValueError where the limits contradict each other."""
    engine, mesh = settings.engine, settings.mesh
    # Shards take a core each, but they wait while a router attends: two threads are worth it even where that is all.
    cores = num_cores if mesh.local else max(min(2, num_cores), num_cores - mesh.shards)
    threads = max(1, cores // mesh.routers)
    return RouterSpec(
        model=model_path(settings),
        served_name=served_names(settings)[0],
        revision=settings.model.revision,
        download_dir=settings.model.download_dir,
        tokenizer=settings.model.tokenizer,
        dtype=_dtype(settings),
        heads=heads(settings),
        quantization=engine.quantization,
        kv_dtype=_kv_dtype(settings),
        block_size=engine.block_size,
        num_kv_blocks=engine.num_kv_blocks,
        kv_cache_bytes=engine.kv_cache_bytes,
        max_model_len=settings.model.max_model_len,
        prefix_caching=engine.prefix_cache,
        limits=SchedulerLimits(
            max_num_seqs=engine.max_num_seqs,
            max_num_batched_tokens=engine.max_num_batched_tokens,
            max_queue=engine.max_waiting,
        ),
        timeouts=timeouts(settings),
        transport=mesh.transport,
        two_batch_overlap=mesh.two_batch_overlap,
        num_routers=mesh.routers,
        num_threads=engine.threads or threads,
        local=mesh.local,
        token=mesh.token or "",
    )


def _dtype(settings: Settings) -> str | None:
    return None if settings.engine.dtype == "auto" else settings.engine.dtype


def _kv_dtype(settings: Settings) -> str:
    """Keys and values are activations: where those are rounded anyway, wider ones would only take more room."""
    if settings.engine.kv_dtype != "auto":
        return settings.engine.kv_dtype
    return "bfloat16" if settings.engine.dtype == "bfloat16" else "float32"
