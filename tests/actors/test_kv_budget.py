from __future__ import annotations

from typing import Any

import pytest

from actors.kv_budget import kv_block_bytes, kv_budget
from actors.specs import RouterSpec, SchedulerLimits
from model.config import ModelConfig

VALUES = {
    "model_type": "qwen2_moe",
    "num_hidden_layers": 3,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "sliding_window": 64,
}
FULL = ModelConfig.from_dict(VALUES)
MIXED = ModelConfig.from_dict({**VALUES, "use_sliding_window": True, "max_window_layers": 2})


def spec(**options: Any) -> RouterSpec:
    limits = SchedulerLimits(max_num_seqs=4, max_num_batched_tokens=32)
    return RouterSpec(model="m", served_name="m", block_size=16, limits=limits, **options)


def test_a_block_has_the_bytes_of_its_groups_layers() -> None:
    # 2 tensors x 2 heads x 8 dims x 4 tokens x 2 bytes = 256 bytes a layer: two full layers, one sliding.
    assert kv_block_bytes(MIXED, block_size=4, number_bytes=2) == (512, 256)


def test_a_context_is_as_long_as_fits_unless_a_length_is_asked_for() -> None:
    plenty = kv_budget(spec(), FULL)
    assert plenty.max_model_len == 4096 and plenty.num_blocks == (4 * 256 + 1,)
    assert kv_budget(spec(max_model_len=100), FULL).max_model_len == 100
    block_bytes = kv_block_bytes(FULL, 16, 4)[0]
    tight = kv_budget(spec(kv_cache_bytes=100 * block_bytes), FULL)
    assert tight.num_blocks == (100,) and tight.max_model_len == 99 * 16
    halved = kv_budget(spec(kv_cache_bytes=100 * block_bytes, kv_dtype="bfloat16"), FULL)
    assert halved.num_blocks == (200,)
    with pytest.raises(ValueError, match="raise kv_cache_bytes"):
        kv_budget(spec(kv_cache_bytes=100 * block_bytes, max_model_len=4096), FULL)


def test_a_sliding_group_takes_only_its_windows() -> None:
    full, sliding = kv_budget(spec(), MIXED).num_blocks
    assert full == 4 * 256 + 1
    assert sliding == 4 * (64 // 16 + 2) + 32 // 16 + 1


def test_where_all_layers_slide_a_context_is_bounded_only_by_a_pool_smaller_than_a_window() -> None:
    sliding = ModelConfig.from_dict({**VALUES, "use_sliding_window": True, "num_hidden_layers": 1})
    assert sliding.kv_groups == ("sliding",)
    assert kv_budget(spec(num_kv_blocks=9), sliding).max_model_len == 4096  # 4 + 2 of a window, 2 of a step, 1 empty
    assert kv_budget(spec(num_kv_blocks=8), sliding).max_model_len == 7 * 16
