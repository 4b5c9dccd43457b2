"""A tiny random Qwen2-MoE model directory with a tokenizer, made by transformers and tokenizers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
VALUES: dict[str, Any] = {
    "model_type": "qwen2_moe",
    "architectures": ["Qwen2MoeForCausalLM"],
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "max_position_embeddings": 512,
    "use_sliding_window": True,
    "sliding_window": 40,
    "max_window_layers": 3,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}


def write_tiny_model(path: Path, seed: int = 0, **overrides: Any) -> Path:
    """Weights are sharp enough that greedy answers differ between prompts and margins are wide."""
    values = {**VALUES, **overrides}
    config = transformers.Qwen2MoeConfig.from_dict(json.loads(json.dumps(values)))
    with torch.no_grad():
        oracle = getattr(transformers, values["architectures"][0])(config).eval().float()
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in oracle.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.1 * noise if "norm" in name else noise * (0.5 if "embed" in name else 0.2))
    oracle.save_pretrained(path)
    (path / "config.json").write_text(json.dumps(values))
    write_tokenizer(path, values["vocab_size"])
    return path


def prompt_of(seed: int, length: int) -> list[int]:
    """Random token ids, none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VALUES["vocab_size"], (length,), generator=generator).tolist()


def load_oracle(path: Path) -> transformers.PreTrainedModel:
    return transformers.Qwen2MoeForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def oracle_greedy(oracle: transformers.PreTrainedModel, prompt: list[int], count: int) -> list[int]:
    """Greedy continuation without stopping at eos."""
    with torch.no_grad():
        out = oracle.generate(
            torch.tensor([prompt]), max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    return out[0, len(prompt) :].tolist()


def write_tokenizer(path: Path, vocab_size: int) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=specials,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(["the whale and the sea, the ship and the storm " * 20], trainer)
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "eos_token": "<|im_end|>",
                "pad_token": "<|endoftext|>",
                "chat_template": CHAT_TEMPLATE,
            }
        )
    )
