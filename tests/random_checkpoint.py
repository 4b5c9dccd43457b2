"""Writes random Qwen2-MoE checkpoints of any size without building the model in transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor


def write_random_checkpoint(
    path: Path, values: dict[str, Any], *, fused: bool = False, dtype: torch.dtype = torch.bfloat16
) -> Path:
    """`values` as config.json, which must spell out every size, and one file for each layer."""
    path.mkdir(parents=True, exist_ok=True)
    hidden, vocab = values["hidden_size"], values["vocab_size"]
    generator = torch.Generator().manual_seed(0)

    def matrix(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=generator) * 0.02).to(dtype)

    def mlp(name: str, inner: int) -> dict[str, Tensor]:
        return {
            f"{name}.gate_proj.weight": matrix(inner, hidden),
            f"{name}.up_proj.weight": matrix(inner, hidden),
            f"{name}.down_proj.weight": matrix(hidden, inner),
        }

    weight_map: dict[str, str] = {}

    def save(file: str, tensors: dict[str, Tensor]) -> None:
        save_file(tensors, path / file)
        weight_map.update(dict.fromkeys(tensors, file))

    outer = {"model.embed_tokens.weight": matrix(vocab, hidden), "model.norm.weight": torch.ones(hidden, dtype=dtype)}
    if not values.get("tie_word_embeddings"):
        outer["lm_head.weight"] = matrix(vocab, hidden)
    save("outer.safetensors", outer)
    head_dim = values.get("head_dim", hidden // values["num_attention_heads"])
    query, key = values["num_attention_heads"] * head_dim, values["num_key_value_heads"] * head_dim
    num_experts, inner = values["num_experts"], values["moe_intermediate_size"]
    for idx in range(values["num_hidden_layers"]):
        layer = f"model.layers.{idx}"
        tensors = {
            f"{layer}.input_layernorm.weight": torch.ones(hidden, dtype=dtype),
            f"{layer}.post_attention_layernorm.weight": torch.ones(hidden, dtype=dtype),
            f"{layer}.self_attn.o_proj.weight": matrix(hidden, query),
            f"{layer}.mlp.gate.weight": matrix(num_experts, hidden),
            f"{layer}.mlp.shared_expert_gate.weight": matrix(1, hidden),
            **mlp(f"{layer}.mlp.shared_expert", values["shared_expert_intermediate_size"]),
        }
        for part, size in (("q", query), ("k", key), ("v", key)):
            tensors[f"{layer}.self_attn.{part}_proj.weight"] = matrix(size, hidden)
            tensors[f"{layer}.self_attn.{part}_proj.bias"] = matrix(size)
        if fused:
            tensors[f"{layer}.mlp.experts.gate_up_proj"] = matrix(num_experts, 2 * inner, hidden)
            tensors[f"{layer}.mlp.experts.down_proj"] = matrix(num_experts, hidden, inner)
        else:
            for expert in range(num_experts):
                tensors |= mlp(f"{layer}.mlp.experts.{expert}", inner)
        save(f"layer-{idx}.safetensors", tensors)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (path / "config.json").write_text(json.dumps({"model_type": "qwen2_moe", **values}))
    return path
