"""Running many experts over the rows routed to them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from model.layers import MLP

ExpertWeights = MLP
"""One expert: a SwiGLU like that of a dense layer."""


def run_experts(
    x_NH: Tensor,
    pair_rows_P: Tensor,
    pair_experts_P: Tensor,
    pair_weights_P: Tensor,
    experts: Mapping[int, ExpertWeights],
    out_NH: Tensor | None = None,
) -> Tensor:
    """For each pair, `y[row] += weight * expert(x[row])`. -> y_NH, zero where a row has no pair.

    x_NH and pair_weights_P are float32, pair_rows_P and pair_experts_P int64, pairs in any order; out_NH: where y_NH
    goes, rounded to float32 if it is that, instead of into float64 memory of its own. The products are float32 and
    their sum float64: 24 bits in 53 add up exactly unless they lie 2^26 apart, so after the one rounding at the combine
    neither the order of the pairs nor their split over shards shows. Raises KeyError when a pair names an expert that
    isn't in `experts`.

    Plain torch, one pass for each expert that has pairs: the reference for the native kernel, and the path on CUDA,
    where the loop costs one device-to-host sync for the counts.
    """
    y_NH = torch.zeros(x_NH.shape, dtype=torch.float64, device=x_NH.device)
    order_P = pair_experts_P.argsort(stable=True)
    rows_P = pair_rows_P[order_P]
    weights_P1 = pair_weights_P[order_P, None]
    start = 0
    for expert_id, count in enumerate(pair_experts_P.bincount().tolist()):
        if not count:
            continue
        stop = start + count
        rows_n = rows_P[start:stop]
        out_nH = experts[expert_id].forward(x_NH[rows_n])
        y_NH.index_add_(0, rows_n, out_nH.mul_(weights_P1[start:stop]).double())
        start = stop
    return y_NH if out_NH is None else out_NH.copy_(y_NH)
