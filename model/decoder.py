"""The decoder: everything of the model that runs on a router, which is all but the routed experts and the head."""

from __future__ import annotations

from dataclasses import dataclass

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

    def forward(self, x_TH: Tensor, delta_TH: Tensor | None, _: Exchange, kernels: Kernels) -> Tensor:
        """x += delta, in place. -> what the layer adds to x, [T, H]."""
        return kernels.mlp(self.mlp, kernels.add_norm(x_TH, delta_TH, self.norm.weight_H, self.norm.eps))


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

    def forward(self, batch: ForwardBatch, kv_cache: KVCache, exchange: Exchange) -> Tensor:
        """One step. -> hidden_TH float32, after the final norm.

        Running the same batch again gives the same result: keys and values go to the same slots.
        """
        cos_sin = self.rope.cos_sin(batch.positions_T, batch.rope_lens_T)
        groups = [
            AttentionInputs(batch, cos_sin, table.block_ids_SB, kv_cache.rows(table.slots_T)) for table in batch.tables
        ]
        x_TH = self.embedding.rows(batch.token_ids_T).contiguous()
        delta_TH = None
        for layer in self.layers:
            delta_TH = self.kernels.attention(layer.attention, x_TH, delta_TH, groups[layer.kv_group], kv_cache)
            delta_TH = layer.mlp.forward(x_TH, delta_TH, exchange, self.kernels)
        return self.kernels.add_norm(x_TH, delta_TH, self.norm.weight_H, self.norm.eps)
