"""The mixture-of-experts block, and the exchange through which it reaches its experts, wherever they are."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from model.experts import ExpertWeights, run_experts
from model.layers import MLP, RMSNorm, add_norm
from model.linear import Weight, linear

if TYPE_CHECKING:
    from model.kernels import Kernels

Receipt = Any
"""What `dispatch` returns and `combine` needs; each exchange has its own."""


class Exchange(Protocol):
    """Sends tokens to their experts and brings the weighted sums back; at most twice at a time."""

    def dispatch(self, layer_idx: int, x_TH: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor) -> Receipt:
        """Start the experts on these rows; returns without waiting for them where it can.

        x_TH float32, topk_ids_TK int64, topk_weights_TK float32. x_TH stays unchanged until `combine`.
        """

    def combine(self, receipt: Receipt) -> Tensor:
        """Each token's weighted sum of its experts' outputs, float32 [T, H], summed in float64 and rounded once."""


class LocalExchange:
    """All experts in this process: the reference for every other exchange."""

    def __init__(self, experts: Mapping[tuple[int, int], ExpertWeights], kernels: Kernels | None = None) -> None:
        """`experts` by (layer_idx, expert_id); kernels: None for the reference."""
        layers: dict[int, dict[int, ExpertWeights]] = {}
        for (layer_idx, expert_id), weights in experts.items():
            layers.setdefault(layer_idx, {})[expert_id] = weights
        expert_table = kernels.expert_table if kernels else dict
        self._layers = {layer_idx: expert_table(layer) for layer_idx, layer in layers.items()}
        self._run_experts = kernels.run_experts if kernels else run_experts

    def dispatch(self, layer_idx: int, x_TH: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor) -> Receipt:
        return self._run_experts(
            x_TH,
            _rows_of_pairs(*topk_ids_TK.shape, x_TH.device),
            topk_ids_TK.flatten(),
            topk_weights_TK.flatten(),
            self._layers[layer_idx],
            torch.empty_like(x_TH),
        )

    def combine(self, receipt: Receipt) -> Tensor:
        assert isinstance(receipt, Tensor)
        return receipt


@functools.lru_cache(maxsize=64)
def _rows_of_pairs(num_tokens: int, num_picks: int, device: torch.device) -> Tensor:
    """0 0 0 0 1 1 1 1 ...; not to be written to."""
    return torch.arange(num_tokens, device=device).repeat_interleave(num_picks)


@dataclass(frozen=True, slots=True)
class Gate:
    """Softmax over all experts, then the k most probable, as Qwen2-MoE does it."""

    weight: Weight
    """[E + 1, H]: the router's gate, and the shared expert's as its last row. Both read the same inputs."""
    num_experts_per_tok: int
    norm_topk_prob: bool
    """Whether the k weights are scaled to sum to 1; otherwise they keep their share of all experts' probability."""

    def forward(self, x_TH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """-> topk_ids_TK int64 and topk_weights_TK float32, most probable first, no expert twice in a row, and the
        shared expert's logits float32 [T, 1].

        A row's choice depends on that row alone, also among equal probabilities: `topk` orders each row by itself.
        """
        logits_TE = linear(x_TH, self.weight)
        probabilities_TE = logits_TE[:, :-1].softmax(dim=-1)
        topk_weights_TK, topk_ids_TK = probabilities_TE.topk(self.num_experts_per_tok, dim=-1)
        if self.norm_topk_prob:
            topk_weights_TK = topk_weights_TK / topk_weights_TK.sum(dim=-1, keepdim=True)
        return topk_ids_TK, topk_weights_TK, logits_TE[:, -1:].contiguous()


class Routed(NamedTuple):
    """The rows for the experts, and which ones each goes to; shapes as in `Gate.forward`."""

    x_TH: Tensor
    topk_ids_TK: Tensor
    topk_weights_TK: Tensor
    shared_gate_T1: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeBlock:
    """A norm, routed experts through the exchange, and a shared expert scaled by its own sigmoid gate."""

    layer_idx: int
    norm: RMSNorm
    gate: Gate
    shared_expert: MLP

    def start(
        self, x_TH: Tensor, delta_TH: Tensor | None, exchange: Exchange, kernels: Kernels
    ) -> Callable[[], Tensor]:
        """x += delta, in place. -> waits for the experts and gives what the layer adds to x, [T, H]."""
        normed_TH, topk_ids_TK, topk_weights_TK, shared_gate_T1 = kernels.route(self, x_TH, delta_TH)
        receipt = exchange.dispatch(self.layer_idx, normed_TH, topk_ids_TK, topk_weights_TK)
        # The shared expert runs while the tokens are away, and hides the exchange.
        shared_TH = kernels.mlp(self.shared_expert, normed_TH)
        return lambda: kernels.add_gated(exchange.combine(receipt), shared_TH, shared_gate_T1)


def route_reference(block: MoeBlock, x_TH: Tensor, delta_TH: Tensor | None) -> Routed:
    """x += delta, in place; then norm and gate."""
    normed_TH = add_norm(x_TH, delta_TH, block.norm.weight_H, block.norm.eps)
    return Routed(normed_TH, *block.gate.forward(normed_TH))
