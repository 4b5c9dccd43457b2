"""How many KV blocks a router has, and how long a context surely fits in them. No torch: the ingress asks it too."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass

from actors.specs import RouterSpec
from model.config import ModelConfig

NUMBER_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True, slots=True)
class KVBudget:
    """num_blocks: of each of `ModelConfig.kv_groups`. max_model_len: tokens of prompt and output."""

    num_blocks: tuple[int, ...]
    max_model_len: int


def kv_budget(spec: RouterSpec, config: ModelConfig) -> KVBudget:
    """A context length that was asked for must fit, else ValueError; without one, it is as long as fits.

    A sliding group needs only its window for each running sequence, plus one step's tokens."""
    max_model_len = min(spec.max_model_len or config.max_context_len, config.max_context_len)
    block_bytes = kv_block_bytes(config, spec.block_size, NUMBER_BYTES[spec.kv_dtype])
    limits = spec.limits
    of_a_window = -(-(config.sliding_window or 0) // spec.block_size) + 2
    of_a_step = -(-limits.max_num_batched_tokens // spec.block_size)

    def counts(full_blocks: int) -> tuple[int, ...]:
        sliding = min(full_blocks, limits.max_num_seqs * of_a_window + of_a_step + 1)
        return tuple(sliding if name == "sliding" else full_blocks for name in config.kv_groups)

    def num_bytes(full_blocks: int) -> int:
        return sum(n * b for n, b in zip(counts(full_blocks), block_bytes, strict=True))

    full = spec.num_kv_blocks
    if full is None:
        most = limits.max_num_seqs * -(-max_model_len // spec.block_size) + 1
        full = max(2, bisect_right(range(most + 1), spec.kv_cache_bytes, key=num_bytes) - 1)
    capacity = (full - 1) * spec.block_size
    if "full" not in config.kv_groups and full > of_a_window + of_a_step:
        capacity = max_model_len  # what is out of the window gives its blocks back
    if capacity < max_model_len:
        if spec.max_model_len is not None:
            raise ValueError(
                f"max_model_len={max_model_len} needs {-(-max_model_len // spec.block_size) + 1} KV blocks, but there "
                f"are {full}; raise kv_cache_bytes or num_kv_blocks, or lower max_model_len"
            )
        max_model_len = capacity
    return KVBudget(counts(full), max_model_len)


def kv_block_bytes(config: ModelConfig, block_size: int, number_bytes: int) -> tuple[int, ...]:
    """Bytes of one block in all layers of its group, keys and values together, for each of `config.kv_groups`."""
    layer_bytes = 2 * config.num_key_value_heads * config.head_dim * block_size * number_bytes
    groups = [config.layer_kv_group(i) for i in range(config.num_hidden_layers)]
    return tuple(groups.count(group) * layer_bytes for group in range(len(config.kv_groups)))
