"""The gate: which experts each token goes to, and with what weight."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from model.linear import Weight, linear


@dataclass(frozen=True, slots=True)
class Gate:
    """Softmax over all experts, then the k most probable, as Qwen2-MoE does it."""

    weight: Weight
    """[E, H]."""
    num_experts_per_tok: int
    norm_topk_prob: bool
    """Whether the k weights are scaled to sum to 1; otherwise they keep their share of all experts' probability."""

    def forward(self, x_TH: Tensor) -> tuple[Tensor, Tensor]:
        """-> topk_ids_TK int64 and topk_weights_TK float32, most probable first, no expert twice in a row.

        A row's choice depends on that row alone, also among equal probabilities: `topk` orders each row by itself.
        """
        probabilities_TE = linear(x_TH, self.weight).softmax(dim=-1)
        topk_weights_TK, topk_ids_TK = probabilities_TE.topk(self.num_experts_per_tok, dim=-1)
        if self.norm_topk_prob:
            topk_weights_TK = topk_weights_TK / topk_weights_TK.sum(dim=-1, keepdim=True)
        return topk_ids_TK, topk_weights_TK
