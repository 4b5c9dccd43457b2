"""Build the parts of a model from a checkpoint: each process reads only the tensors that it owns."""

from __future__ import annotations

import contextlib
import functools
import itertools
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor

from model.attention import Attention
from model.checkpoint import FLOATS, Checkpoint
from model.config import ModelConfig
from model.decoder import Decoder, DecoderLayer, DenseBlock
from model.experts import ExpertWeights
from model.heads import Head
from model.kernels import REFERENCE_KERNELS, Kernels
from model.layers import MLP, RMSNorm, Rope
from model.linear import DenseWeight, Embedding, Incompressible, Int4Weight, Weight, stack_rows
from model.moe import Gate, MoeBlock
from model.quantize import check_same_groups, from_gptq

# A matrix is read and packed in 16 blocks, but not in such small ones that Python takes longer than the work, nor in
# such large ones that they leave the cache.
_BLOCK_ELEMENTS = 1 << 16, 1 << 19


@dataclass(frozen=True, slots=True)
class _Matrix:
    """A matrix in a checkpoint, or one of the matrices of a fused tensor; `shape` is the whole tensor's."""

    name: str
    shape: tuple[int, ...]
    index: int | None = None


@dataclass(frozen=True, slots=True)
class Loader:
    """Reads from one checkpoint what a process owns. All that is malformed raises ValueError, as `Checkpoint` does.

    `quantization` applies to attention, MLPs, experts and an LM head of its own; either makes the
    embedding int8. Gates, small heads and norms keep the checkpoint's storage, rounded to `config.dtype` where that is
    narrower, and their inputs are float32 whatever `config.bfloat16_activations` says.
    """

    checkpoint: Checkpoint
    config: ModelConfig
    quantization: Literal["int8", "int4"] | None = None
    device: torch.device | str = "cpu"
    kernels: Kernels = REFERENCE_KERNELS

    def decoder(self) -> Decoder:
        """Everything but the routed experts and the head."""
        _refuse_another_models_tensors(self.checkpoint, self.config)
        return Decoder(
            config=self.config,
            embedding=self._embedding(),
            layers=tuple(self._layer(layer_idx) for layer_idx in range(self.config.num_hidden_layers)),
            norm=self._norm(f"{self.checkpoint.prefix}norm"),
            rope=Rope(self.config, self.device),
            kernels=self.kernels,
        )

    def experts(self, num_threads: int = 1) -> dict[tuple[int, int], ExpertWeights]:
        """All of them, by (layer_idx, expert_id). torch's own threads would only stand in the way of these."""
        keys = list(itertools.product(self.config.moe_layers, range(self.config.num_experts)))
        if num_threads == 1:
            return {key: self.expert(*key) for key in keys}
        with ThreadPoolExecutor(num_threads) as pool:
            try:
                return dict(zip(keys, pool.map(lambda key: self.expert(*key), keys), strict=True))
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def expert(self, layer_idx: int, expert_id: int) -> ExpertWeights:
        """One routed expert, from per-expert tensors or a slice of fused ones."""
        hidden, inner = self.config.hidden_size, self.config.moe_intermediate_size
        experts = f"{self.checkpoint.prefix}layers.{layer_idx}.mlp.experts"
        if f"{experts}.gate_up_proj" not in self.checkpoint:
            return self._mlp(f"{experts}.{expert_id}", inner)
        gate_up = _Matrix(f"{experts}.gate_up_proj", (self.config.num_experts, 2 * inner, hidden), expert_id)
        down = _Matrix(f"{experts}.down_proj", (self.config.num_experts, hidden, inner), expert_id)
        return ExpertWeights(self._weight([gate_up], self.quantization), self._weight([down], self.quantization))

    def head(self, decoder: Decoder | None = None) -> Head:
        """The head that `config.head_kind` names; a base model has none. A tied LM head is the decoder's embedding."""
        kind, num_labels = self.config.head_kind, self.config.num_labels
        if kind == "base":
            raise ValueError(
                "architectures ['Qwen2MoeModel'] has no head: serve one of the four heads, or add one to the checkpoint"
            )
        if kind == "causal_lm":
            if self.config.tie_word_embeddings:
                return Head(kind=kind, weight=decoder.embedding if decoder else self._embedding(), bias=None)
            table = _Matrix("lm_head.weight", (self.config.vocab_size, self.config.hidden_size))
            return Head(kind=kind, weight=self._weight([table], self.quantization), bias=None)
        module, num_outputs, has_bias = {
            "sequence_classification": ("score", num_labels, False),
            "token_classification": ("score", num_labels, self.config.token_classification_bias),
            "question_answering": ("qa_outputs", 2, True),
        }[kind]
        return Head(
            kind=kind,
            weight=self._unquantized(_Matrix(f"{module}.weight", (num_outputs, self.config.hidden_size))),
            bias=self._vector(f"{module}.bias", num_outputs) if has_bias else None,
            pad_token_id=self.config.pad_token_id if kind == "sequence_classification" else None,
        )

    def _layer(self, layer_idx: int) -> DecoderLayer:
        layer = f"{self.checkpoint.prefix}layers.{layer_idx}"
        return DecoderLayer(
            attention=self._attention(f"{layer}.self_attn", layer_idx, self._norm(f"{layer}.input_layernorm")),
            mlp=self._mlp_block(f"{layer}.mlp", layer_idx, self._norm(f"{layer}.post_attention_layernorm")),
            kv_group=self.config.layer_kv_group(layer_idx),
        )

    def _mlp_block(self, name: str, layer_idx: int, norm: RMSNorm) -> DenseBlock | MoeBlock:
        config = self.config
        if not config.is_moe_layer(layer_idx):
            return DenseBlock(norm=norm, mlp=self._mlp(name, config.intermediate_size))
        weight = self._unquantized(
            _Matrix(f"{name}.gate.weight", (config.num_experts, config.hidden_size)),
            _Matrix(f"{name}.shared_expert_gate.weight", (1, config.hidden_size)),
        )
        return MoeBlock(
            layer_idx=layer_idx,
            norm=norm,
            gate=Gate(weight, config.num_experts_per_tok, config.norm_topk_prob),
            shared_expert=self._mlp(f"{name}.shared_expert", config.shared_expert_intermediate_size),
        )

    def _attention(self, name: str, layer_idx: int, norm: RMSNorm) -> Attention:
        config = self.config
        num_heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads, "v": config.num_key_value_heads}
        projections = [(f"{name}.{part}_proj", number * config.head_dim) for part, number in num_heads.items()]
        bias = None
        if config.qkv_bias:
            bias = torch.cat([self._vector(f"{module}.bias", num_outputs) for module, num_outputs in projections])
        return Attention(
            layer_idx=layer_idx,
            norm=norm,
            qkv=self._linear(projections, config.hidden_size),
            qkv_bias=bias,
            o=self._linear([(f"{name}.o_proj", config.hidden_size)], config.num_attention_heads * config.head_dim),
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            window=config.sliding_window if config.layer_types[layer_idx] == "sliding_attention" else None,
        )

    def _mlp(self, name: str, inner: int) -> MLP:
        hidden = self.config.hidden_size
        return MLP(
            gate_up=self._linear([(f"{name}.gate_proj", inner), (f"{name}.up_proj", inner)], hidden),
            down=self._linear([(f"{name}.down_proj", hidden)], inner),
        )

    def _norm(self, name: str) -> RMSNorm:
        return RMSNorm(self._vector(f"{name}.weight", self.config.hidden_size), self.config.rms_norm_eps)

    def _vector(self, name: str, length: int) -> Tensor:
        """Norms and biases: float32, since they meet float32 activations elementwise."""
        return self.checkpoint.float_tensor(name, (length,), None).float().to(self.device)

    def _embedding(self) -> Embedding:
        """Packed where it is the LM head too, so that there is one copy for both."""
        table = f"{self.checkpoint.prefix}embed_tokens.weight", (self.config.vocab_size, self.config.hidden_size)
        is_head = self.config.tie_word_embeddings and self.config.head_kind == "causal_lm"
        return cast(
            Embedding, self._weight([_Matrix(*table)], self.quantization and "int8", packed=is_head, compact=False)
        )

    def _unquantized(self, *matrices: _Matrix) -> Weight:
        """Gates and small heads."""
        return self._weight(matrices, None, exact=True)

    def _linear(self, modules: Sequence[tuple[str, int]], num_inputs: int) -> Weight:
        """The weights of several modules (name, outputs) with the same input, as one matrix of all their rows."""
        if f"{modules[0][0]}.qweight" in self.checkpoint:
            return self._gptq(modules, num_inputs)
        return self._weight(
            [_Matrix(f"{name}.weight", (size, num_inputs)) for name, size in modules], self.quantization
        )

    def _weight(
        self,
        matrices: Sequence[_Matrix],
        quantization: str | None,
        *,
        packed: bool = True,
        compact: bool = True,
        exact: bool = False,
    ) -> Weight:
        """The rows of all matrices as one weight. Read, quantized and packed in blocks of rows, so that loading takes
        little more memory than the weight that stays. A compact one's rows can't be looked up."""

        def store(block: Tensor) -> Weight:
            round_inputs = self.config.bfloat16_activations and block.dtype == torch.bfloat16 and not exact
            weight: Weight = DenseWeight(block, round_inputs)
            if quantization is not None:
                weight = self.kernels.quantize(block, quantization)
            return self.kernels.pack_weight(weight) if packed else weight

        num_rows = sum(one.shape[-2] for one in matrices)
        step = _block_rows(num_rows, matrices[0].shape[-1])
        if compact and not exact:
            with contextlib.suppress(Incompressible):
                return stack_rows(
                    (self.kernels.compact(store(block)) for block in self._row_blocks(matrices, step)), num_rows
                )
        return stack_rows(map(store, self._row_blocks(matrices, step)), num_rows)

    def _row_blocks(self, matrices: Sequence[_Matrix], step: int) -> Iterator[Tensor]:
        """All rows in order, in blocks of `step`; one may hold rows of several matrices. All have the widest dtype."""
        dtypes = (self.checkpoint.float_dtype(one.name, one.shape, self.config.dtype) for one in matrices)
        dtype = functools.reduce(torch.promote_types, dtypes)
        pieces: list[Tensor] = []
        room = step
        for one in matrices:
            start, num_rows = 0, one.shape[-2]
            while start < num_rows:
                rows = slice(start, min(start + room, num_rows))
                pieces.append(self.checkpoint.float_tensor(one.name, one.shape, self.config.dtype, one.index, rows))
                room -= rows.stop - start
                start = rows.stop
                if room == 0:
                    yield _joined(pieces).to(self.device, dtype)
                    pieces, room = [], step
        if pieces:
            yield _joined(pieces).to(self.device, dtype)

    def _gptq(self, modules: Sequence[tuple[str, int]], num_inputs: int) -> Weight:
        """Read and packed in blocks of outputs too, where the kernels' panels of 32 allow it."""
        first: list[Int4Weight] = []
        in_panels = all(num_outputs % 32 == 0 for _, num_outputs in modules)

        def store(block: Int4Weight) -> Weight:
            first.append(block) if not first else check_same_groups(first[0], block)
            return self.kernels.pack_weight(block) if in_panels else block

        blocks = (block for name, num_outputs in modules for block in self._gptq_blocks(name, num_outputs, num_inputs))
        whole = stack_rows(map(store, blocks), sum(num_outputs for _, num_outputs in modules))
        return whole if in_panels else self.kernels.pack_weight(whole)

    def _gptq_blocks(self, name: str, num_outputs: int, num_inputs: int) -> Iterator[Int4Weight]:
        gptq = self.config.gptq
        if gptq is None:
            raise ValueError(f"tensor '{name}.qweight' is GPTQ's, but config.json has no quantization_config; add it")

        if num_inputs % 8:
            raise ValueError(f"tensor '{name}.qweight' packs inputs in eights, and {num_inputs} is no multiple of 8")
        if num_outputs % 8:
            raise ValueError(f"tensor '{name}.qzeros' packs outputs in eights, and {num_outputs} is no multiple of 8")

        def read(part: str, shape: tuple[int, ...], dtypes: tuple[str, ...]) -> Tensor:
            self.checkpoint.check(f"{name}.{part}", shape, dtypes)
            return self.checkpoint.tensor(f"{name}.{part}").to(self.device)

        group_size = min(gptq.group_size or num_inputs, num_inputs)
        num_groups = -(-num_inputs // group_size)
        qweight = read("qweight", (num_inputs // 8, num_outputs), ("I32",))
        qzeros = read("qzeros", (num_groups, num_outputs // 8), ("I32",))
        scales = read("scales", (num_groups, num_outputs), FLOATS)
        g_idx = read("g_idx", (num_inputs,), ("I32", "I64")) if f"{name}.g_idx" in self.checkpoint else None
        step = _block_rows(num_outputs, num_inputs)
        for start in range(0, num_outputs, step):
            part, octets = slice(start, start + step), slice(start // 8, (start + step) // 8)
            tensors = qweight[:, part], qzeros[:, octets], scales[:, part], g_idx
            try:
                yield from_gptq(*tensors, group_size=group_size, zero_point_offset=gptq.zero_point_offset)
            except ValueError as error:
                raise ValueError(f"{self.checkpoint.directory}: tensors '{name}.*': {error}") from None


def _refuse_another_models_tensors(checkpoint: Checkpoint, config: ModelConfig) -> None:
    """What config.json has no place for would be left out, and another model served than was trained."""
    for name in sorted(checkpoint.names):
        layer = re.match(rf"{checkpoint.prefix}layers\.(\d+)\.(self_attn\.[qkv]_proj\.bias)?", name)
        rule = None
        if layer and int(layer[1]) >= config.num_hidden_layers:
            rule = f"expected layers 0 to {config.num_hidden_layers - 1} by num_hidden_layers"
        elif layer and layer[2] and not config.qkv_bias and config.gptq is None:  # GPTQ's tools add zeros everywhere
            rule = "expected none by qkv_bias false"
        if rule is not None:
            raise ValueError(
                f"{checkpoint.directory}: tensor {name!r} has no place in the model, {rule} in config.json; "
                "the weights and config.json belong to different models"
            )


def _block_rows(num_rows: int, num_inputs: int) -> int:
    """A multiple of 32, so that blocks fill whole panels."""
    least, most = _BLOCK_ELEMENTS
    return max(32, min(max(num_rows * num_inputs // 16, least), most) // num_inputs // 32 * 32)


def _joined(pieces: list[Tensor]) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)
