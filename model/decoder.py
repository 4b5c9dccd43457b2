"""The decoder: everything of the model that runs on a router, which is all but the routed experts and the head."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.attention import Attention, AttentionInputs
from model.config import ModelConfig
from model.forward_batch import ForwardBatch
from model.kernels import Kernels
from model.kv_cache import KVCache
from model.layers import MLP, RMSNorm, Rope
from model.linear import Embedding
from model.moe import Exchange, MoeBlock


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseBlock:
    """A norm and an MLP, in layers without experts."""

    norm: RMSNorm
    mlp: MLP

    def start(self, x_TH: Tensor, delta_TH: Tensor | None, _: Exchange, kernels: Kernels) -> Callable[[], Tensor]:
        """x += delta, in place. -> gives what the layer adds to x, [T, H]."""
        added_TH = kernels.mlp(self.mlp, kernels.add_norm(x_TH, delta_TH, self.norm.weight_H, self.norm.eps))
        return lambda: added_TH


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderLayer:
    attention: Attention
    mlp: DenseBlock | MoeBlock
    kv_group: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoder:
    """Built by `Loader`. Holds no state between steps; the KV cache comes in with each."""

    config: ModelConfig
    embedding: Embedding
    """[V, H]. A tied LM head is the same weight."""
    layers: tuple[DecoderLayer, ...]
    norm: RMSNorm
    rope: Rope
    kernels: Kernels

    def forward(self, batches: Sequence[ForwardBatch], kv_cache: KVCache, exchange: Exchange) -> Tensor:
        """One step. -> hidden_TH float32 of all batches, one after the other, after the final norm.

        Running the same batch again gives the same result: keys and values go to the same slots. Two batches take
        turns: while one's tokens are with the experts, this side works on the other (MegaScale-Infer,
        arXiv:2504.02263, section 4.1). The bits are those of one batch.

            router    attention A | attention B | attention A, next layer | ...
            shards                | experts A   | experts B               | ...

        A later one may go on where an earlier one's chunk of a prompt ends: in each layer keys are written in turn.
        """
        streams = [_Stream(self, batch, kv_cache) for batch in batches]
        for layer in self.layers:
            for stream in streams:
                inputs = stream.attention_inputs[layer.kv_group]
                delta_TH = self.kernels.attention(layer.attention, stream.x_TH, stream.take_added(), inputs, kv_cache)
                stream.finish_mlp = layer.mlp.start(stream.x_TH, delta_TH, exchange, self.kernels)
        norm = self.norm
        hidden = [self.kernels.add_norm(one.x_TH, one.take_added(), norm.weight_H, norm.eps) for one in streams]
        return hidden[0] if len(hidden) == 1 else torch.cat(hidden)


class _Stream:
    """A batch on its way through the layers."""

    def __init__(self, decoder: Decoder, batch: ForwardBatch, kv_cache: KVCache) -> None:
        cos_sin = decoder.rope.cos_sin(batch.positions_T, batch.rope_lens_T)
        self.attention_inputs = [
            AttentionInputs(batch, cos_sin, table.block_ids_SB, kv_cache.rows(table.slots_T)) for table in batch.tables
        ]
        self.x_TH = decoder.embedding.rows(batch.token_ids_T).contiguous()
        self.finish_mlp: Callable[[], Tensor] | None = None

    def take_added(self) -> Tensor | None:
        """Waits for what the last layer adds to x; once, so that its memory is free for the next."""
        finish, self.finish_mlp = self.finish_mlp, None
        return finish() if finish is not None else None
