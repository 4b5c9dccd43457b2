"""What the parts of a mesh are told at their start. No torch here: the CLI and the ingress make these."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from actors.logs import LogFormat
from cluster.settings import Timeouts

Quantization = Literal["int8", "int4"]
TwoBatchOverlap = Literal["auto", "always", "never"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerLimits:
    """max_queue: requests that may wait; more are refused with 503."""

    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    max_queue: int = 512

    def __post_init__(self) -> None:
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens={self.max_num_batched_tokens} must be at least "
                f"max_num_seqs={self.max_num_seqs}, or decodes would not fit in one step; raise it"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardSpec:
    """What every shard of a mesh is told at its start. model: a directory or a hub id."""

    model: str
    revision: str | None = None
    download_dir: str | None = None
    dtype: str | None = None
    quantization: Quantization | None = None
    timeouts: Timeouts = Timeouts()
    num_threads: int = 1
    log_format: LogFormat = "text"


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterSpec:
    """What every router of a mesh is told. model: directory or hub id; heads: served name -> directory.

    tokenizer: the directory of another than the model's. dtype: rounds wider weights to it, and bfloat16 the
    activations too; None: as the checkpoint's config says. num_kv_blocks: of the full-attention group; None: what
    kv_cache_bytes holds. num_routers: of the whole mesh; transport `auto` depends on it. local: experts in this
    process. two_batch_overlap: see actors.micro_batches.
    """

    model: str
    served_name: str
    revision: str | None = None
    download_dir: str | None = None
    tokenizer: str | None = None
    dtype: str | None = None
    heads: Mapping[str, str] = field(default_factory=dict)
    quantization: Quantization | None = None
    kv_dtype: str = "float32"
    block_size: int = 16
    num_kv_blocks: int | None = None
    kv_cache_bytes: int = 4 << 30
    max_model_len: int | None = None
    prefix_caching: bool = True
    limits: SchedulerLimits = SchedulerLimits()
    timeouts: Timeouts = Timeouts()
    transport: str = "auto"
    two_batch_overlap: TwoBatchOverlap = "auto"
    num_routers: int = 1
    num_threads: int = 1
    local: bool = False
    token: str = ""
