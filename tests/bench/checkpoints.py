"""Random Qwen2-MoE checkpoints in the shapes that are measured, made once and kept under the temporary directory.

`mid` has the layers of Qwen1.5-MoE-A2.7B, four of them (2.4 B parameters); `small` has 0.13 B; `thin` is two layers of
`small`, for what grows with something else. The standard deviations keep activations of order one, as in a trained
model, and the gate decided. bfloat16, a real tokenizer with Qwen2's pattern.
"""

from __future__ import annotations

import json
import shutil
import sysconfig
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

SMALL: dict[str, Any] = {
    "hidden_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 256,
    "shared_expert_intermediate_size": 1024,
    "intermediate_size": 1024,
    "vocab_size": 8192,
    "max_position_embeddings": 32768,
}
SHAPES: dict[str, dict[str, Any]] = {
    "small": SMALL,
    "mid": {
        **SMALL,
        "hidden_size": 2048,
        "num_hidden_layers": 4,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "num_experts": 60,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
        "intermediate_size": 5632,
        "vocab_size": 32000,
    },
    **{f"thin-{num}": {**SMALL, "num_hidden_layers": 2, "num_experts": num} for num in (8, 16, 32, 64, 128)},
}
FIXED: dict[str, Any] = {
    "architectures": ["Qwen2MoeForCausalLM"],
    "model_type": "qwen2_moe",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "use_sliding_window": False,
    "tie_word_embeddings": False,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": False,
    "qkv_bias": True,
    "torch_dtype": "bfloat16",
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def cache_directory() -> Path:
    """Where everything goes that is made once."""
    return Path(tempfile.gettempdir()) / "expertmesh-bench"


def checkpoint(name: str, overrides: dict[str, Any] | None = None) -> Path:
    """The directory of a shape of SHAPES with some values changed, written the first time."""
    values = {**FIXED, **SHAPES[name], **(overrides or {})}
    key = f"{zlib.crc32(json.dumps(values, sort_keys=True).encode()):08x}"
    path = cache_directory() / (name if not overrides else f"{name}-{key}")
    if (path / "values").is_file() and (path / "values").read_text() == key:
        return path
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    print(f"making {path}", flush=True)
    write(path, values)
    (path / "values").write_text(key)
    return path


def write(path: Path, values: dict[str, Any]) -> None:
    """One file of weights for each layer, and one for the rest."""
    pool = torch.randn(1 << 24, generator=torch.Generator().manual_seed(0))
    weight_map: dict[str, str] = {}
    rest: dict[str, Tensor] = {}
    layers: dict[str, dict[str, Tensor]] = {}
    for tensor_name, shape, deviation, mean in tensors(values):
        tensor = drawn(pool, tensor_name, shape).mul_(deviation).add_(mean).to(torch.bfloat16)
        if tensor_name.startswith("model.layers."):
            layers.setdefault(tensor_name.split(".")[2], {})[tensor_name] = tensor
        else:
            rest[tensor_name] = tensor
        for done in [idx for idx in layers if not tensor_name.startswith(f"model.layers.{idx}.")]:
            _save(path, f"layer-{done}.safetensors", layers.pop(done), weight_map)
    _save(path, "rest.safetensors", rest, weight_map)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (path / "config.json").write_text(json.dumps(values, indent=1))
    write_tokenizer(path, values["vocab_size"])


def drawn(pool: Tensor, name: str, shape: tuple[int, ...]) -> Tensor:
    """Numbers of the pool from a place that the name gives: drawing 2.4 billion anew would take a minute."""
    count = 1
    for size in shape:
        count *= size
    offset = zlib.crc32(name.encode()) % max(len(pool) - count, 1)
    if offset + count > len(pool):
        pool = pool.repeat(-(-(offset + count) // len(pool)))
    return pool[offset : offset + count].view(shape).clone()


def _save(path: Path, file: str, tensors: dict[str, Tensor], weight_map: dict[str, str]) -> None:
    save_file(tensors, path / file, metadata={"format": "pt"})
    weight_map.update(dict.fromkeys(tensors, file))


def tensors(values: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...], float, float]]:
    """(name, shape, standard deviation, mean), layer after layer, the head last."""
    hidden, vocab, num_layers = values["hidden_size"], values["vocab_size"], values["num_hidden_layers"]
    key = values["num_key_value_heads"] * hidden // values["num_attention_heads"]
    narrow = hidden**-0.5
    branch = (2 * num_layers) ** -0.5  # residual branches shrink with depth
    yield "model.embed_tokens.weight", (vocab, hidden), 0.5, 0.0
    for idx in range(num_layers):
        layer = f"model.layers.{idx}"
        yield f"{layer}.input_layernorm.weight", (hidden,), 0.05, 1.0
        for part, size in (("q", hidden), ("k", key), ("v", key)):
            yield f"{layer}.self_attn.{part}_proj.weight", (size, hidden), narrow, 0.0
            yield f"{layer}.self_attn.{part}_proj.bias", (size,), 0.1, 0.0
        yield f"{layer}.self_attn.o_proj.weight", (hidden, hidden), branch * narrow, 0.0
        yield f"{layer}.post_attention_layernorm.weight", (hidden,), 0.05, 1.0
        yield f"{layer}.mlp.gate.weight", (values["num_experts"], hidden), 2 * narrow, 0.0
        yield f"{layer}.mlp.shared_expert_gate.weight", (1, hidden), narrow, 0.0
        mlps = {f"experts.{expert}": values["moe_intermediate_size"] for expert in range(values["num_experts"])}
        for mlp, inner in {"shared_expert": values["shared_expert_intermediate_size"], **mlps}.items():
            yield f"{layer}.mlp.{mlp}.gate_proj.weight", (inner, hidden), 1.5 * narrow, 0.0
            yield f"{layer}.mlp.{mlp}.up_proj.weight", (inner, hidden), 1.5 * narrow, 0.0
            yield f"{layer}.mlp.{mlp}.down_proj.weight", (hidden, inner), 1.5 * branch * inner**-0.5, 0.0
    yield "model.norm.weight", (hidden,), 0.05, 1.0
    yield "lm_head.weight", (vocab, hidden), 3 * narrow, 0.0


def write_tokenizer(path: Path, vocab_size: int) -> None:
    """A byte-level BPE of the standard library's sources."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    sources = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    tokenizer.train_from_iterator((file.read_text(errors="ignore") for file in sources), trainer)
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "chat_template": CHAT_TEMPLATE,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
