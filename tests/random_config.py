"""Random Qwen2-MoE configurations for tests of parity with transformers."""

from __future__ import annotations

import random
from typing import Any

ARCHITECTURES = [
    "Qwen2MoeForCausalLM",
    "Qwen2MoeForSequenceClassification",
    "Qwen2MoeForTokenClassification",
    "Qwen2MoeForQuestionAnswering",
]
ROPE_TYPES = ["default", "linear", "dynamic", "yarn", "longrope", "llama3"]


def rope_params(rng: random.Random, rope_type: str, head_dim: int) -> dict[str, Any]:
    params: dict[str, Any] = {}
    if rope_type != "default":
        params["factor"] = rng.choice([2.0, 4.0, 3.5])
    if rope_type in ("yarn", "longrope", "llama3"):
        params["original_max_position_embeddings"] = rng.choice([8, 16])
    if rope_type == "yarn":
        params |= rng.choice(
            [
                {},
                {"beta_fast": 16.0, "beta_slow": 2.0, "truncate": False},
                {"mscale": 1.0, "mscale_all_dim": 0.5},
                {"attention_factor": 1.3},
            ]
        )
    if rope_type == "longrope":
        params["short_factor"] = [round(rng.uniform(1, 1.5), 2) for _ in range(head_dim // 2)]
        params["long_factor"] = [round(rng.uniform(1.5, 4), 2) for _ in range(head_dim // 2)]
        params |= rng.choice([{}, {"attention_factor": 0.9}])
    if rope_type == "llama3":
        params |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    return params


def random_config(seed: int, tiny_values: dict[str, Any]) -> dict[str, Any]:
    """A raw config.json; every field that changes the computation varies, in modern and legacy spellings."""
    rng = random.Random(seed)
    num_kv_heads = rng.choice([1, 2, 3])
    num_layers = rng.choice([1, 2, 3, 4])
    num_experts = rng.choice([0, 1, 3, 8, 8])
    values = {
        **tiny_values,
        "vocab_size": rng.choice([37, 64]),
        "hidden_size": rng.choice([24, 36]),
        "intermediate_size": rng.choice([20, 48]),
        "moe_intermediate_size": rng.choice([8, 20]),
        "shared_expert_intermediate_size": rng.choice([8, 28]),
        "num_hidden_layers": num_layers,
        "num_key_value_heads": num_kv_heads,
        "num_attention_heads": num_kv_heads * rng.choice([1, 2, 4]),
        "num_experts": num_experts,
        "num_experts_per_tok": rng.randint(1, max(1, min(4, num_experts))),
        "norm_topk_prob": rng.random() < 0.5,
        "decoder_sparse_step": rng.choice([1, 1, 2]),
        "mlp_only_layers": rng.choice([[], [], [0], [1]]),
        "qkv_bias": rng.random() < 0.7,
        "rms_norm_eps": rng.choice([1e-6, 1e-5]),
        "max_position_embeddings": 64,
        "id2label": {str(i): f"L{i}" for i in range(rng.choice([2, 5]))},
        "tie_word_embeddings": rng.random() < 0.3,
    }
    head_dim = values["hidden_size"] // values["num_attention_heads"]
    if head_dim % 2 or head_dim <= 2 or rng.random() < 0.5:
        head_dim = values["head_dim"] = rng.choice([6, 8, 16])
    # The rope type follows the seed, so that every type meets every head.
    rope_type = ROPE_TYPES[seed % len(ROPE_TYPES)]
    params, theta = rope_params(rng, rope_type, head_dim), rng.choice([10000.0, 500.0])
    if rng.random() < 0.5:
        values["rope_parameters"] = {"rope_type": rope_type, "rope_theta": theta, **params}
    else:
        values["rope_theta"] = theta
        if rope_type != "default":
            values["rope_scaling"] = {rng.choice(["type", "rope_type"]): rope_type, **params}
    if rope_type in ("dynamic", "longrope", "yarn"):
        values["max_position_embeddings"] = rng.choice([16, 64])
    sliding = rng.choice(["no", "derived", "listed"])
    if sliding != "no":
        values |= {"use_sliding_window": True, "sliding_window": rng.choice([1, 3, 7])}
    if sliding == "derived":
        values["max_window_layers"] = rng.choice([1, num_layers])
    if sliding == "listed":
        values["layer_types"] = [rng.choice(["full_attention", "sliding_attention"]) for _ in range(num_layers)]
    values[rng.choice(["dtype", "torch_dtype"])] = "float32"
    return values
