"""The hot operators behind one seam, chosen once at start by device and CPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from model.attention import paged_attention_reference
from model.experts import ExpertWeights, run_experts


class PagedAttention(Protocol):
    """See `paged_attention_reference`."""

    def __call__(
        self,
        q_TAD: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        block_ids_SB: Tensor,
        query_starts: Tensor,
        context_lens_S: Tensor,
        window: int | None,
        scale: float,
    ) -> Tensor: ...


class RunExperts(Protocol):
    """See `run_experts`."""

    def __call__(
        self,
        x_NH: Tensor,
        pair_rows_P: Tensor,
        pair_experts_P: Tensor,
        pair_weights_P: Tensor,
        experts: Mapping[int, ExpertWeights],
    ) -> Tensor: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernels:
    """One implementation of each hot operator; all give the reference's result within float32 rounding."""

    paged_attention: PagedAttention
    run_experts: RunExperts


REFERENCE_KERNELS = Kernels(paged_attention=paged_attention_reference, run_experts=run_experts)


def select_kernels(device: torch.device | str = "cpu") -> Kernels:
    """The fastest kernels for this device and machine. Call once per process and pass them on."""
    return REFERENCE_KERNELS
