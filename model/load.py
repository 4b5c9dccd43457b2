"""Build the parts of a model from a checkpoint: each process reads only the tensors that it owns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from model.attention import Attention
from model.checkpoint import Checkpoint
from model.config import HeadKind, ModelConfig
from model.decoder import Decoder, DecoderLayer
from model.experts import ExpertWeights
from model.gate import Gate
from model.heads import Head
from model.kernels import REFERENCE_KERNELS, Kernels
from model.layers import MLP, Rope
from model.linear import DenseWeight, Embedding, Int4Weight, Weight
from model.moe import MoeBlock
from model.quantize import concatenate_int4, from_gptq, quantize_int4, quantize_int8

QUANTIZATIONS = ("int8", "int4")
_HEAD_MODULES: dict[HeadKind, str] = {
    "causal_lm": "lm_head",
    "sequence_classification": "score",
    "token_classification": "score",
    "question_answering": "qa_outputs",
}


def load_decoder(
    checkpoint: Checkpoint,
    config: ModelConfig,
    quantization: str | None = None,
    device: torch.device | str = "cpu",
    kernels: Kernels = REFERENCE_KERNELS,
) -> Decoder:
    """Everything but the routed experts and the head.

    `quantization` (int8 | int4 | None) applies to attention and MLPs, either makes the embedding int8; norms and gates
    keep the checkpoint's storage, rounded to `config.dtype` where that is narrower. Raises ValueError as `Checkpoint`.
    """
    read = _Reader(checkpoint, config, quantization, device, kernels)
    return Decoder(
        config=config,
        embedding=read.embedding(),
        layers=tuple(_load_layer(read, config, layer_idx) for layer_idx in range(config.num_hidden_layers)),
        norm_H=read.vector("norm.weight", config.hidden_size),
        rope=Rope(config, device),
        kernels=kernels,
    )


def load_expert(
    checkpoint: Checkpoint,
    config: ModelConfig,
    layer_idx: int,
    expert_id: int,
    quantization: str | None = None,
    device: torch.device | str = "cpu",
    kernels: Kernels = REFERENCE_KERNELS,
) -> ExpertWeights:
    """One routed expert, from per-expert tensors or a slice of fused ones. Raises ValueError as `Checkpoint` does."""
    read = _Reader(checkpoint, config, quantization, device, kernels)
    hidden, inner = config.hidden_size, config.moe_intermediate_size
    experts = f"layers.{layer_idx}.mlp.experts"
    if f"{checkpoint.prefix}{experts}.gate_up_proj" in checkpoint:
        num_experts = config.num_experts
        gate_up = read.matrix(f"{experts}.gate_up_proj", (num_experts, 2 * inner, hidden), row=expert_id)
        down = read.matrix(f"{experts}.down_proj", (num_experts, hidden, inner), row=expert_id)
        return ExpertWeights(read.quantized(gate_up), read.quantized(down))
    mlp = _load_mlp(read, f"{experts}.{expert_id}", hidden, inner)
    return ExpertWeights(mlp.gate_up, mlp.down)


def load_head(
    checkpoint: Checkpoint,
    config: ModelConfig,
    quantization: str | None = None,
    device: torch.device | str = "cpu",
    decoder: Decoder | None = None,
    kernels: Kernels = REFERENCE_KERNELS,
) -> Head:
    """The head that `config.head_kind` names. A tied LM head is the decoder's embedding where one is given.

    Raises ValueError as `Checkpoint` does, and for a base model, which has no head.
    """
    kind, hidden = config.head_kind, config.hidden_size
    if kind == "base":
        raise ValueError(
            "architectures ['Qwen2MoeModel'] has no head: serve one of the four heads, or add one to the checkpoint"
        )
    read = _Reader(checkpoint, config, quantization, device, kernels)
    if kind == "causal_lm":
        if config.tie_word_embeddings:
            weight: Weight = read.embedding() if decoder is None else decoder.embedding
        else:
            weight = read.quantized(read.matrix("lm_head.weight", (config.vocab_size, hidden), base=False))
        return Head(kind=kind, weight=weight, bias=None)
    num_outputs = 2 if kind == "question_answering" else config.num_labels
    module = _HEAD_MODULES[kind]
    has_bias = kind == "question_answering" or (kind == "token_classification" and config.token_classification_bias)
    return Head(
        kind=kind,
        weight=read.dense(f"{module}.weight", (num_outputs, hidden), base=False),
        bias=read.vector(f"{module}.bias", num_outputs, base=False) if has_bias else None,
        pad_token_id=config.pad_token_id if kind == "sequence_classification" else None,
    )


@dataclass(frozen=True, slots=True)
class _Reader:
    """Reads of the kinds a model is made of. Names are relative to the base prefix unless `base` is false."""

    checkpoint: Checkpoint
    config: ModelConfig
    quantization: str | None
    device: torch.device | str
    kernels: Kernels

    def __post_init__(self) -> None:
        if self.quantization not in (None, *QUANTIZATIONS):
            raise ValueError(
                f"quantization {self.quantization!r} is not known: expected one of {', '.join(QUANTIZATIONS)}"
            )

    def matrix(self, name: str, shape: tuple[int, ...], *, row: int | None = None, base: bool = True) -> Tensor:
        tensor = self.checkpoint.float_tensor(self._name(name, base), shape, self.config.dtype, row)
        return tensor.to(self.device)

    def vector(self, name: str, length: int, *, base: bool = True) -> Tensor:
        """Norms and biases: float32, since they meet float32 activations elementwise."""
        return self.checkpoint.float_tensor(self._name(name, base), (length,), None).float().to(self.device)

    def embedding(self) -> Embedding:
        """Packed where it is the LM head too, so that there is one copy for both."""
        table = self.matrix("embed_tokens.weight", (self.config.vocab_size, self.config.hidden_size))
        weight = DenseWeight(table) if self.quantization is None else quantize_int8(table)
        is_head = self.config.tie_word_embeddings and self.config.head_kind == "causal_lm"
        return cast(Embedding, self.kernels.pack_weight(weight)) if is_head else weight

    def dense(self, name: str, shape: tuple[int, int], *, base: bool = True) -> Weight:
        """A matrix that is never quantized: gates and small heads."""
        return self.kernels.pack_weight(DenseWeight(self.matrix(name, shape, base=base)))

    def quantized(self, matrix: Tensor) -> Weight:
        if self.quantization == "int8":
            return self.kernels.pack_weight(quantize_int8(matrix))
        if self.quantization == "int4":
            return self.kernels.pack_weight(quantize_int4(matrix))
        return self.kernels.pack_weight(DenseWeight(matrix))

    def linear(self, modules: Sequence[tuple[str, int]], num_inputs: int) -> Weight:
        """The weights of several modules (name, outputs) with the same input, as one matrix of all their rows."""
        if f"{self.checkpoint.prefix}{modules[0][0]}.qweight" in self.checkpoint:
            parts = [self._gptq(name, (num_outputs, num_inputs)) for name, num_outputs in modules]
            return self.kernels.pack_weight(parts[0] if len(parts) == 1 else concatenate_int4(parts))
        matrices = [self.matrix(f"{name}.weight", (num_outputs, num_inputs)) for name, num_outputs in modules]
        return self.quantized(matrices[0] if len(matrices) == 1 else torch.cat(matrices))

    def _gptq(self, name: str, shape: tuple[int, int]) -> Int4Weight:
        gptq = self.config.gptq
        if gptq is None:
            raise ValueError(f"tensor '{name}.qweight' is GPTQ's, but config.json has no quantization_config; add it")
        qweight, qzeros, scales = (
            self.checkpoint.tensor(self._name(f"{name}.{part}", True)).to(self.device)
            for part in ("qweight", "qzeros", "scales")
        )
        g_idx_name = self._name(f"{name}.g_idx", True)
        g_idx = self.checkpoint.tensor(g_idx_name) if g_idx_name in self.checkpoint else None
        weight = from_gptq(qweight, qzeros, scales, g_idx, zero_point_offset=gptq.zero_point_offset)
        if weight.shape != shape:
            raise ValueError(
                f"GPTQ tensor '{name}.qweight' is a matrix of shape {list(weight.shape)}, expected {list(shape)} by "
                "config.json; the weights and config.json belong to different models"
            )
        return weight

    def _name(self, name: str, base: bool) -> str:
        return f"{self.checkpoint.prefix}{name}" if base else name


def _load_layer(read: _Reader, config: ModelConfig, layer_idx: int) -> DecoderLayer:
    layer, hidden = f"layers.{layer_idx}", config.hidden_size
    mlp: MLP | MoeBlock
    if config.is_moe_layer(layer_idx):
        mlp = MoeBlock(
            layer_idx=layer_idx,
            gate=Gate(
                read.dense(f"{layer}.mlp.gate.weight", (config.num_experts, hidden)),
                config.num_experts_per_tok,
                config.norm_topk_prob,
            ),
            shared_expert=_load_mlp(read, f"{layer}.mlp.shared_expert", hidden, config.shared_expert_intermediate_size),
            shared_expert_gate=read.dense(f"{layer}.mlp.shared_expert_gate.weight", (1, hidden)),
        )
    else:
        mlp = _load_mlp(read, f"{layer}.mlp", hidden, config.intermediate_size)
    return DecoderLayer(
        input_norm_H=read.vector(f"{layer}.input_layernorm.weight", hidden),
        attention=_load_attention(read, config, layer_idx),
        post_attention_norm_H=read.vector(f"{layer}.post_attention_layernorm.weight", hidden),
        mlp=mlp,
        kv_group=config.layer_kv_group(layer_idx),
    )


def _load_attention(read: _Reader, config: ModelConfig, layer_idx: int) -> Attention:
    attention = f"layers.{layer_idx}.self_attn"
    query_dim = config.num_attention_heads * config.head_dim
    key_dim = config.num_key_value_heads * config.head_dim
    projections = [
        (f"{attention}.q_proj", query_dim),
        (f"{attention}.k_proj", key_dim),
        (f"{attention}.v_proj", key_dim),
    ]
    bias = None
    if config.qkv_bias:
        bias = torch.cat([read.vector(f"{name}.bias", num_outputs) for name, num_outputs in projections])
    return Attention(
        layer_idx=layer_idx,
        qkv=read.linear(projections, config.hidden_size),
        qkv_bias=bias,
        o=read.linear([(f"{attention}.o_proj", config.hidden_size)], query_dim),
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        window=config.sliding_window if config.layer_types[layer_idx] == "sliding_attention" else None,
    )


def _load_mlp(read: _Reader, name: str, hidden: int, inner: int) -> MLP:
    return MLP(
        gate_up=read.linear([(f"{name}.gate_proj", inner), (f"{name}.up_proj", inner)], hidden),
        down=read.linear([(f"{name}.down_proj", hidden)], inner),
    )
