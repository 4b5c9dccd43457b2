"""Writes GPTQ checkpoints in AutoGPTQ's v1 format: plain rounding to the nearest, no calibration."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from model.checkpoint import Checkpoint


def is_quantized(name: str) -> bool:
    """Attention and MLP matrices: neither gates nor embeddings."""
    return name.endswith("_proj.weight")


def to_gptq(weight_NK: Tensor, group_size: int) -> tuple[dict[str, Tensor], Tensor]:
    """The four tensors of a matrix rounded to 4 bits, and the rounded matrix in float32."""
    num_inputs = weight_NK.shape[1]
    padded_NK = torch.nn.functional.pad(weight_NK.float(), (0, -num_inputs % group_size))
    groups_NGK = padded_NK.unflatten(1, (-1, group_size))
    low, high = groups_NGK.aminmax(dim=-1, keepdim=True)
    scales = ((high - low) / 15).clamp_min(1e-6).half().float()
    zeros = (-low / scales).round().clamp(1, 15)
    values = (groups_NGK / scales + zeros).round().clamp(0, 15)
    tensors = {
        "qweight": _pack(values.flatten(1)[:, :num_inputs].T),
        "qzeros": _pack(zeros.squeeze(-1) - 1).T.contiguous(),
        "scales": scales.squeeze(-1).T.half().contiguous(),
        "g_idx": (torch.arange(num_inputs) // group_size).int(),
    }
    return tensors, ((values - zeros) * scales).flatten(1)[:, :num_inputs].contiguous()


def write_gptq(source: Path, target: Path, group_size: int) -> None:
    """The checkpoint of `source` with 4-bit matrices, as one file in `target`, which is made."""
    checkpoint = Checkpoint(source)
    tensors: dict[str, Tensor] = {}
    for name in checkpoint.names:
        tensor = checkpoint.tensor(name)
        if is_quantized(name):
            packed, _ = to_gptq(tensor, group_size)
            tensors |= {f"{name.removesuffix('weight')}{part}": value for part, value in packed.items()}
        else:
            tensors[name] = tensor
    target.mkdir(parents=True)
    save_file(tensors, target / "model.safetensors")
    quantization = {"quant_method": "gptq", "bits": 4, "group_size": group_size, "desc_act": False, "sym": False}
    config = json.loads((source / "config.json").read_text("utf-8"))
    (target / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))


def _pack(values: Tensor) -> Tensor:
    """0 .. 15 [8 n, m] -> int32 [n, m], the first value in the lowest bits."""
    nibbles = values.to(torch.int64).view(-1, 8, values.shape[1]) << (4 * torch.arange(8))[None, :, None]
    return nibbles.sum(1).to(torch.int32)
