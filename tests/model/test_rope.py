"""RoPE frequencies against transformers, at lengths and thetas the tiny models don't reach."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeRotaryEmbedding

from model.config import ModelConfig
from model.layers import Rope, rotate

FACTORS = [1.0 + 0.05 * i for i in range(32)]
KINDS: list[dict[str, Any]] = [
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 3.0},
    {"rope_type": "dynamic", "factor": 4.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024},
    {"rope_type": "yarn", "factor": 8.0, "mscale": 0.7, "mscale_all_dim": 1.0, "beta_fast": 20, "truncate": False},
    {
        "rope_type": "longrope",
        "original_max_position_embeddings": 1024,
        "short_factor": FACTORS,
        "long_factor": [4 * factor for factor in FACTORS],
    },
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "original_max_position_embeddings": 1024,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    },
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind["rope_type"])
@pytest.mark.parametrize("length", [900, 3000, 5000])
def test_cos_and_sin_equal_those_of_transformers(kind: dict[str, Any], length: int) -> None:
    values = {
        "model_type": "qwen2_moe",
        "head_dim": 64,
        "max_position_embeddings": 4096,
        "rope_parameters": {"rope_theta": 1e6, **kind},
    }
    config = ModelConfig.from_dict(values)
    positions = torch.arange(min(length, config.max_context_len))
    oracle = Qwen2MoeRotaryEmbedding(transformers.Qwen2MoeConfig.from_dict(values))
    expected_cos, expected_sin = oracle(torch.zeros(1), positions[None])

    cos, signed_sin = Rope(config).cos_sin(positions, torch.full_like(positions, len(positions)))

    # Frequencies agree to float32 rounding; an angle is up to 5000 times that.
    torch.testing.assert_close(cos[:, 0], expected_cos[0], atol=1e-3, rtol=0)
    torch.testing.assert_close(signed_sin[:, 0, 32:], expected_sin[0, :, 32:], atol=1e-3, rtol=0)
    torch.testing.assert_close(signed_sin[:, 0, :32], -expected_sin[0, :, :32], atol=1e-3, rtol=0)


def test_rotating_a_pair_by_a_quarter_turn() -> None:
    # Pairs are (0, 2) and (1, 3): the first turns by 90 degrees, the second stays.
    cos, sin = torch.tensor([[[0.0, 1, 0, 1]]]), torch.tensor([[[-1.0, 0, 1, 0]]])
    assert rotate(torch.tensor([[[1.0, 2, 3, 4]]]), cos, sin).tolist() == [[[-3, 2, 1, 4]]]


def test_only_dynamic_and_longrope_look_at_the_length() -> None:
    config = ModelConfig.from_dict(
        {"model_type": "qwen2_moe", "max_position_embeddings": 8, "rope_scaling": {"type": "dynamic", "factor": 2.0}}
    )
    rope, position = Rope(config), torch.tensor([5, 5, 5])
    cos, _ = rope.cos_sin(position, torch.tensor([6, 8, 12]))
    assert torch.equal(cos[0], cos[1])
    assert not torch.equal(cos[1], cos[2])
