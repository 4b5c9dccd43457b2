"""The hot operators behind one seam, chosen once at start by device and CPU."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from model.attention import Attention, AttentionInputs, attention_reference
from model.experts import ExpertWeights, run_experts
from model.kv_cache import KVCache
from model.layers import MLP, add_gated, add_norm
from model.linear import Weight
from model.moe import MoeBlock, Routed, route_reference
from model.native.kernels import NativeKernels
from model.native.shared_object import load_shared_object
from model.quantize import quantize
from model.sampling import DrawTokens, draw_tokens_reference

log = logging.getLogger("expertmesh.model")


RunExperts = Callable[[Tensor, Tensor, Tensor, Tensor, Mapping[int, ExpertWeights], Tensor | None], Tensor]
"""`run_experts` or its equal."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernels:
    """One implementation of each hot operator; all give the reference's result within float32 rounding.

    Quantized weights are the exception: the native kernels round activations to 8 bits too, the reference doesn't.
    """

    attention: Callable[[Attention, Tensor, Tensor | None, AttentionInputs, KVCache], Tensor]
    route: Callable[[MoeBlock, Tensor, Tensor | None], Routed]
    run_experts: RunExperts
    mlp: Callable[[MLP, Tensor], Tensor]
    add_norm: Callable[[Tensor, Tensor | None, Tensor, float], Tensor]
    add_gated: Callable[[Tensor, Tensor, Tensor], Tensor]
    draw_tokens: DrawTokens
    expert_table: Callable[[Mapping[int, ExpertWeights]], Mapping[int, ExpertWeights]]
    """A layer's experts as `run_experts` is fast with, to be made once for as long as they are the same."""
    pack_weight: Callable[[Weight], Weight]
    """A weight in the layout that `linear` and `run_experts` are fast with, for when it is loaded."""
    compact: Callable[[Weight], Weight]
    """A packed weight in fewer bytes, where `linear` and `run_experts` read it so: the same values and bits. Raises
    Incompressible; its rows can't be looked up."""
    quantize: Callable[[Tensor, str], Weight]
    """A float matrix as int8 or int4."""


REFERENCE_KERNELS = Kernels(
    attention=attention_reference,
    route=route_reference,
    run_experts=run_experts,
    mlp=MLP.forward,
    add_norm=add_norm,
    add_gated=add_gated,
    draw_tokens=draw_tokens_reference,
    expert_table=dict,
    pack_weight=lambda weight: weight,
    compact=lambda weight: weight,
    quantize=quantize,
)


def select_kernels(device: torch.device | str = "cpu", *, native: bool = True, num_threads: int = 1) -> Kernels:
    """The fastest kernels for this device and machine. Call once per process and pass them on.

    native=False takes plain torch, as do CUDA, a machine without AVX2, and an installation without a C compiler.
    num_threads is for the native kernels; torch has its own setting.
    """
    if not native or torch.device(device).type != "cpu":
        return REFERENCE_KERNELS
    shared_object = load_shared_object(num_threads=num_threads)
    if shared_object is None:
        log.warning(
            "no native kernels here, plain torch is several times slower: they need x86-64 with AVX2, and gcc 11 or "
            "later when expertmesh is installed; build them with `python -m model.native.build`"
        )
        return REFERENCE_KERNELS
    kernels = NativeKernels(shared_object)
    return Kernels(
        attention=kernels.attention,
        route=kernels.route,
        run_experts=kernels.run_experts,
        mlp=kernels.mlp,
        add_norm=kernels.add_norm,
        add_gated=kernels.add_gated,
        draw_tokens=kernels.draw_tokens,
        expert_table=kernels.expert_table,
        pack_weight=kernels.pack_weight,
        compact=kernels.compact,
        quantize=kernels.quantize,
    )
