"""Loading with quantization, and loading checkpoints that were quantized before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.kernels import REFERENCE_KERNELS, Kernels
from model.quantize import quantize_int4, quantize_int8

GROUP = 8
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": False}


def pack(values: Tensor) -> Tensor:
    """uint4 [8 n, m] -> int32 [n, m], the first value in the lowest bits."""
    nibbles = values.to(torch.int64).view(-1, 8, values.shape[1]) << (4 * torch.arange(8))[None, :, None]
    return nibbles.sum(1).to(torch.int32)


def to_gptq(weight_NK: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """GPTQ's v1 tensors of a matrix rounded to 4 bits, and the rounded matrix."""
    groups_NGK = weight_NK.unflatten(1, (-1, GROUP))
    low, high = groups_NGK.aminmax(dim=-1, keepdim=True)
    scales = ((high - low) / 15).half().float()
    zeros = (-low / scales).round().clamp(1, 15)
    values = (groups_NGK / scales + zeros).round().clamp(0, 15)
    tensors = {
        "qweight": pack(values.flatten(1).T),
        "qzeros": pack(zeros.squeeze(-1) - 1).T.contiguous(),
        "scales": scales.squeeze(-1).T.half().contiguous(),
        "g_idx": (torch.arange(weight_NK.shape[1]) // GROUP).int(),
    }
    return tensors, ((values - zeros) * scales).flatten(1)


def is_quantized(name: str) -> bool:
    return name.endswith("_proj.weight")


@pytest.mark.parametrize("native", [False, True])
def test_a_gptq_checkpoint_computes_with_its_rounded_weights(
    native: bool, fast_kernels: Kernels, tiny: Any, tmp_path: Path
) -> None:
    tiny.write_checkpoint(tmp_path / "dense", tiny.values, tiny.build_oracle(tiny.values))
    dense, packed = {}, {}
    for name, tensor in load_file(tmp_path / "dense" / "model.safetensors").items():
        dense[name] = packed[name] = tensor
        if is_quantized(name):
            tensors, dense[name] = to_gptq(packed.pop(name))
            packed |= {f"{name.removesuffix('weight')}{part}": value for part, value in tensors.items()}
    (tmp_path / "gptq").mkdir()
    save_file(dense, tmp_path / "dense" / "model.safetensors")
    save_file(packed, tmp_path / "gptq" / "model.safetensors")
    (tmp_path / "gptq" / "config.json").write_text(json.dumps({**tiny.values, "quantization_config": GPTQ}))

    expected = tiny.engine(tmp_path / "dense").scores(list(range(1, 20)))

    kernels = fast_kernels if native else REFERENCE_KERNELS
    scores = tiny.engine(tmp_path / "gptq", kernels=kernels).scores(list(range(1, 20)))
    # The native kernel also rounds activations to 8 bits; tests of the kernel itself compare more closely.
    torch.testing.assert_close(scores, expected, atol=0.5 if native else 1e-4, rtol=0)


def test_gptq_tensors_without_a_quantization_config_are_refused(tiny: Any, tmp_path: Path) -> None:
    tiny.write_checkpoint(tmp_path, tiny.values, tiny.build_oracle(tiny.values))
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.self_attn.o_proj"
    packed, _ = to_gptq(tensors.pop(f"{name}.weight"))
    save_file(tensors | {f"{name}.{part}": value for part, value in packed.items()}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"layers.0.self_attn.o_proj.qweight' is GPTQ's.*quantization_config"):
        tiny.engine(tmp_path)


@pytest.mark.parametrize("quantization", ["int8", "int4"])
@pytest.mark.parametrize("fused", [False, True])
def test_matrices_are_quantized_while_loading_and_gates_are_not(
    quantization: str, fused: bool, tiny: Any, tmp_path: Path
) -> None:
    oracle = tiny.build_oracle(tiny.values)
    engine = tiny.engine(tiny.write_checkpoint(tmp_path, tiny.values, oracle, fused=fused), quantization=quantization)
    quantize = {"int8": quantize_int8, "int4": quantize_int4}[quantization]
    ours, theirs = engine.decoder.layers[1], oracle.model.layers[1]

    qkv = torch.cat([getattr(theirs.self_attn, f"{part}_proj").weight for part in "qkv"])
    assert torch.equal(ours.attention.qkv.dequantize(), quantize(qkv).dequantize())
    assert torch.equal(ours.mlp.gate.weight.dequantize(), theirs.mlp.gate.weight)
    expert = engine.experts[1, 4]
    assert torch.equal(expert.gate_up.dequantize(), quantize(theirs.mlp.experts.gate_up_proj[4]).dequantize())
