"""Qwen2-MoE configuration as published in `config.json`, resolved once: defaults, legacy spellings, derived lists.

Follows `Qwen2MoeConfig` of transformers 5. A value that would change the computation and isn't implemented is refused
by name; fields that matter only in training (dropout, initializer, auxiliary loss) are ignored. Doesn't import torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from model.config_fields import ConfigFields
from model.rope_config import RopeConfig, resolve_rope

HeadKind = Literal["causal_lm", "sequence_classification", "token_classification", "question_answering", "base"]
KVGroup = Literal["full", "sliding"]

HEAD_KINDS: Mapping[str, HeadKind] = {
    "Qwen2MoeForCausalLM": "causal_lm",
    "Qwen2MoeForSequenceClassification": "sequence_classification",
    "Qwen2MoeForTokenClassification": "token_classification",
    "Qwen2MoeForQuestionAnswering": "question_answering",
    "Qwen2MoeModel": "base",
}
_LAYER_TYPES: Mapping[str, KVGroup] = {"full_attention": "full", "sliding_attention": "sliding"}
_PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")
_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True, kw_only=True)
class GptqConfig:
    """How GPTQ's tensors are read. Weights have 4 bits; act-order shows in the tensors themselves."""

    zero_point_offset: int
    """What stored zero points lack: 1 in the v1 format, 0 in `checkpoint_format: gptq_v2`."""
    group_size: int | None
    """Inputs that share a scale, fewer in the last group; None: all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """One model: every field resolved and checked. Names are those of the Hugging Face config."""

    head_kind: HeadKind
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    shared_expert_intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    qkv_bias: bool
    rms_norm_eps: float
    max_position_embeddings: int
    rope: RopeConfig
    layer_types: tuple[str, ...]
    sliding_window: int | None
    """Keys a sliding layer sees, the query's own included; None when no layer slides."""
    num_experts: int
    num_experts_per_tok: int
    norm_topk_prob: bool
    moe_layers: tuple[int, ...]
    tie_word_embeddings: bool
    dtype: str | None
    """float32 | bfloat16 | float16, or None when the config doesn't say."""
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None
    id2label: Mapping[int, str]
    problem_type: str | None
    token_classification_bias: bool
    gptq: GptqConfig | None
    bfloat16_activations: bool = False
    """Whether activations are rounded to bfloat16 where they meet a bfloat16 weight; gates and small heads aside."""
    kv_groups: tuple[KVGroup, ...] = field(init=False)
    """The KV groups that have layers, "full" before "sliding"."""

    def __post_init__(self) -> None:
        present = {_LAYER_TYPES[layer_type] for layer_type in self.layer_types}
        groups: tuple[KVGroup, ...] = ("full", "sliding")
        object.__setattr__(self, "kv_groups", tuple(group for group in groups if group in present))

    @classmethod
    def from_directory(cls, path: str | Path) -> ModelConfig:
        """Read `config.json` and, for the end-of-sequence ids, `generation_config.json`. Raises ValueError."""
        directory = Path(path)
        values = _read_json_object(directory / "config.json")
        if (directory / "generation_config.json").is_file():
            generation = _read_json_object(directory / "generation_config.json")
            if generation.get("eos_token_id") is not None:
                values = {**values, "eos_token_id": generation["eos_token_id"]}
        return cls.from_dict(values)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelConfig:
        """Resolve the content of a `config.json`. Raises ValueError with the name, the value and the rule."""
        read = ConfigFields(values)
        head_kind = _resolve_head_kind(values)
        _refuse_unsupported(values, read)
        num_layers, num_heads = read.count("num_hidden_layers", 24), read.count("num_attention_heads", 16)
        num_kv_heads = read.count("num_key_value_heads", num_heads if "num_key_value_heads" in values else 16)
        if num_heads % num_kv_heads:
            raise ValueError(
                f"num_attention_heads {num_heads} is not a multiple of num_key_value_heads {num_kv_heads}: "
                "each key-value head serves an equal group of query heads; correct config.json"
            )
        hidden_size = read.count("hidden_size", 2048)
        head_dim = read.count("head_dim", hidden_size // num_heads)
        if head_dim % 2:
            raise ValueError(f"head_dim {head_dim} is odd: RoPE rotates pairs; correct config.json")
        max_positions = read.count("max_position_embeddings", 32768)
        layer_types = _resolve_layer_types(values, read, num_layers)
        num_experts, num_per_tok = read.count("num_experts", 60, least=0), read.count("num_experts_per_tok", 4)
        moe_layers = _resolve_moe_layers(values, read, num_layers, num_experts)
        if moe_layers and num_per_tok > num_experts:
            raise ValueError(
                f"num_experts_per_tok {num_per_tok} exceeds num_experts {num_experts}: "
                "a token cannot use more experts than there are; correct config.json"
            )
        return cls(
            head_kind=head_kind,
            vocab_size=read.count("vocab_size", 151936),
            hidden_size=hidden_size,
            intermediate_size=read.count("intermediate_size", 5632),
            moe_intermediate_size=read.count("moe_intermediate_size", 1408),
            shared_expert_intermediate_size=read.count("shared_expert_intermediate_size", 5632),
            num_hidden_layers=num_layers,
            num_attention_heads=num_heads,
            num_key_value_heads=num_kv_heads,
            head_dim=head_dim,
            qkv_bias=read.flag("qkv_bias", True),
            rms_norm_eps=read.positive("rms_norm_eps", 1e-6),
            max_position_embeddings=max_positions,
            rope=resolve_rope(values, head_dim=head_dim, max_position_embeddings=max_positions),
            layer_types=layer_types,
            sliding_window=_resolve_sliding_window(values, read, layer_types),
            num_experts=num_experts,
            num_experts_per_tok=num_per_tok,
            norm_topk_prob=read.flag("norm_topk_prob", False),
            moe_layers=moe_layers,
            tie_word_embeddings=read.flag("tie_word_embeddings", False),
            dtype=read.choice("dtype", _DTYPES) or read.choice("torch_dtype", _DTYPES),
            eos_token_ids=_resolve_eos(values),
            pad_token_id=read.optional_count("pad_token_id"),
            id2label=_resolve_labels(values, read),
            problem_type=read.choice("problem_type", _PROBLEM_TYPES),
            token_classification_bias=read.flag("token_classification_bias", True),
            gptq=_resolve_gptq(values),
        )

    @property
    def num_labels(self) -> int:
        return len(self.id2label)

    @property
    def max_context_len(self) -> int:
        """Tokens a sequence may hold (prompt and output): `max_position_embeddings`, stretched by the RoPE kind."""
        return max(self.max_position_embeddings, self.rope.stretched_context_len(self.max_position_embeddings))

    def is_moe_layer(self, layer_idx: int) -> bool:
        return layer_idx in self.moe_layers

    def layer_kv_group(self, layer_idx: int) -> int:
        """Index into `kv_groups` of the group that holds the keys and values of a layer."""
        return self.kv_groups.index(_LAYER_TYPES[self.layer_types[layer_idx]])


def _read_json_object(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist: a model directory needs it; check the path of the model") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}; fetch the file again") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}, expected a JSON object; fetch the file again")
    return values


def _resolve_head_kind(values: Mapping[str, Any]) -> HeadKind:
    if values.get("model_type") != "qwen2_moe":
        raise ValueError(
            f"model_type {values.get('model_type')!r} is not served: expertmesh runs qwen2_moe checkpoints "
            "(Qwen1.5-MoE, Qwen2-57B-A14B and models of that architecture); choose one of those"
        )
    architectures = values.get("architectures") or ["Qwen2MoeForCausalLM"]
    # A list of the names, here and below: JSON's lists and objects can't be looked up in a mapping.
    if not isinstance(architectures, list) or len(architectures) != 1 or architectures[0] not in list(HEAD_KINDS):
        raise ValueError(
            f"architectures {architectures!r} is not served: expected a list of one of {', '.join(HEAD_KINDS)}; "
            "choose such a checkpoint"
        )
    return HEAD_KINDS[architectures[0]]


def _refuse_unsupported(values: Mapping[str, Any], read: ConfigFields) -> None:
    read.choice("hidden_act", ("silu", "swish"))  # all MLPs are SwiGLU
    neutral = {"is_causal": True, "is_encoder_decoder": False, "pruned_heads": {}}
    for name in ("dual_chunk_attention_config", "per_layer_config", *neutral):
        if values.get(name) not in (None, neutral.get(name)):
            raise ValueError(f"{name} {values[name]!r} is not implemented: remove it or choose another checkpoint")


def _resolve_layer_types(values: Mapping[str, Any], read: ConfigFields, num_layers: int) -> tuple[str, ...]:
    layer_types = values.get("layer_types")
    if layer_types is None:
        slides = read.flag("use_sliding_window", False)
        max_window_layers = read.count("max_window_layers", 28, least=0)
        return tuple(
            "sliding_attention" if slides and i < max_window_layers and i % 2 == 0 else "full_attention"
            for i in range(num_layers)
        )
    if not isinstance(layer_types, list) or len(layer_types) != num_layers:
        raise ValueError(
            f"layer_types {layer_types!r} must be a list with one entry for each of the {num_layers} layers "
            "(num_hidden_layers); correct config.json"
        )
    for layer_type in layer_types:
        if layer_type not in list(_LAYER_TYPES):
            raise ValueError(
                f"layer_types entry {layer_type!r} is not implemented: expected one of {', '.join(_LAYER_TYPES)}"
            )
    return tuple(layer_types)


def _resolve_sliding_window(values: Mapping[str, Any], read: ConfigFields, layer_types: tuple[str, ...]) -> int | None:
    if "sliding_attention" not in layer_types:
        return None
    if not read.flag("use_sliding_window", False) or ("sliding_window" in values and not values["sliding_window"]):
        raise ValueError(
            "layer_types has sliding_attention layers, but the window is off: use_sliding_window "
            f"{values.get('use_sliding_window', False)!r}, sliding_window {values.get('sliding_window', 4096)!r}; "
            "set use_sliding_window to true and sliding_window to a number of tokens"
        )
    return read.count("sliding_window", 4096)


def _resolve_moe_layers(
    values: Mapping[str, Any], read: ConfigFields, num_layers: int, num_experts: int
) -> tuple[int, ...]:
    mlp_only = values.get("mlp_only_layers") or []
    if not isinstance(mlp_only, list) or not all(isinstance(i, int) for i in mlp_only):
        raise ValueError(f"mlp_only_layers {mlp_only!r} must be a list of layer numbers; correct config.json")
    sparse_step = read.count("decoder_sparse_step", 1)
    if num_experts == 0:
        return ()
    return tuple(i for i in range(num_layers) if i not in mlp_only and (i + 1) % sparse_step == 0)


def _resolve_eos(values: Mapping[str, Any]) -> tuple[int, ...]:
    eos = values.get("eos_token_id")
    ids = [] if eos is None else eos if isinstance(eos, list) else [eos]
    if not all(isinstance(token_id, int) and not isinstance(token_id, bool) and token_id >= 0 for token_id in ids):
        raise ValueError(f"eos_token_id {eos!r} must be a token id or a list of them; correct config.json")
    return tuple(dict.fromkeys(ids))


def _resolve_labels(values: Mapping[str, Any], read: ConfigFields) -> Mapping[int, str]:
    labels = values.get("id2label")
    if labels is None:
        return {i: f"LABEL_{i}" for i in range(read.count("num_labels", 2))}
    try:
        id2label = {int(i): str(label) for i, label in labels.items()}
    except (AttributeError, ValueError):
        id2label = {}
    if not id2label:
        raise ValueError(f"id2label {labels!r} must map label numbers to names; correct config.json")
    if sorted(id2label) != list(range(len(id2label))):
        raise ValueError(f"id2label has the numbers {sorted(id2label)}, expected 0 to {len(id2label) - 1} once each")
    return dict(sorted(id2label.items()))


def _resolve_gptq(values: Mapping[str, Any]) -> GptqConfig | None:
    quantization = values.get("quantization_config")
    if quantization is None:
        return None
    if not isinstance(quantization, Mapping) or quantization.get("quant_method") != "gptq":
        method = quantization.get("quant_method") if isinstance(quantization, Mapping) else quantization
        raise ValueError(
            f"quantization_config.quant_method {method!r} is not implemented: expected 'gptq', or a checkpoint in "
            "float32, bfloat16 or float16, which expertmesh can quantize itself while loading"
        )
    if (bits := quantization.get("bits")) != 4:
        raise ValueError(f"quantization_config.bits {bits!r} is not implemented: GPTQ weights are read with 4 bits")
    read = ConfigFields(quantization, where="quantization_config.")
    return GptqConfig(
        zero_point_offset=0 if quantization.get("checkpoint_format") == "gptq_v2" else 1,
        group_size=None if quantization.get("group_size") == -1 else read.count("group_size", 128),
    )
