"""Loading with quantization, and loading checkpoints that were quantized before."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.kernels import REFERENCE_KERNELS, Kernels
from model.quantize import quantize_int4, quantize_int8
from tests.gptq import is_quantized, to_gptq, write_gptq

GROUP = 8
GPTQ = {"quant_method": "gptq", "bits": 4, "desc_act": False, "sym": False}


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("group_size", [GROUP, 12])  # of 32 and 16 inputs: with 12 the last group is shorter
@pytest.mark.parametrize("has_g_idx", [False, True])
def test_a_gptq_checkpoint_computes_with_its_rounded_weights(
    has_g_idx: bool, group_size: int, native: bool, fast_kernels: Kernels, tiny: Any, tmp_path: Path
) -> None:
    tiny.write_checkpoint(tmp_path / "dense", tiny.values, tiny.build_oracle(tiny.values))
    dense, packed = {}, {}
    for name, tensor in load_file(tmp_path / "dense" / "model.safetensors").items():
        dense[name] = packed[name] = tensor
        if is_quantized(name):
            tensors, dense[name] = to_gptq(packed.pop(name), group_size)
            if not has_g_idx:
                del tensors["g_idx"]
            packed |= {f"{name.removesuffix('weight')}{part}": value for part, value in tensors.items()}
    (tmp_path / "gptq").mkdir()
    save_file(dense, tmp_path / "dense" / "model.safetensors")
    save_file(packed, tmp_path / "gptq" / "model.safetensors")
    values = {**tiny.values, "quantization_config": {**GPTQ, "group_size": group_size}}
    (tmp_path / "gptq" / "config.json").write_text(json.dumps(values))

    expected = tiny.engine(tmp_path / "dense").scores(list(range(1, 20)))

    kernels = fast_kernels if native else REFERENCE_KERNELS
    scores = tiny.engine(tmp_path / "gptq", kernels=kernels).scores(list(range(1, 20)))
    # The native kernel also rounds activations to 8 bits; tests of the kernel itself compare more closely.
    torch.testing.assert_close(scores, expected, atol=0.5 if native else 1e-4, rtol=0)


def test_gptq_tensors_without_a_quantization_config_are_refused(tiny: Any, tmp_path: Path) -> None:
    tiny.write_checkpoint(tmp_path, tiny.values, tiny.build_oracle(tiny.values))
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.self_attn.o_proj"
    packed, _ = to_gptq(tensors.pop(f"{name}.weight"), GROUP)
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
    gates = torch.cat([theirs.mlp.gate.weight, theirs.mlp.shared_expert_gate.weight])
    assert torch.equal(ours.mlp.gate.weight.dequantize(), gates)
    expert = engine.experts[1, 4]
    assert torch.equal(expert.gate_up.dequantize(), quantize(theirs.mlp.experts.gate_up_proj[4]).dequantize())


O_PROJ = "model.layers.1.self_attn.o_proj"


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda t: t.pop(f"{O_PROJ}.qzeros"), [f"{O_PROJ}.qzeros", "missing"]),
        (lambda t: t.pop(f"{O_PROJ}.scales"), [f"{O_PROJ}.scales", "missing"]),
        (
            lambda t: t.update({f"{O_PROJ}.qweight": torch.zeros(4, 31, dtype=torch.int32)}),
            [f"{O_PROJ}.qweight", "shape [4, 31]", "expected [4, 32]"],
        ),
        (
            lambda t: t.update({f"{O_PROJ}.qzeros": torch.zeros(3, 4, dtype=torch.int32)}),
            [f"{O_PROJ}.qzeros", "shape [3, 4]", "expected [4, 4]"],
        ),
        (
            lambda t: t.update({f"{O_PROJ}.scales": torch.zeros(4, 32, dtype=torch.int32)}),
            [f"{O_PROJ}.scales", "dtype I32", "F16"],
        ),
        (
            lambda t: t.update({f"{O_PROJ}.scales": torch.zeros((), dtype=torch.float16)}),
            [f"{O_PROJ}.scales", "shape []", "expected [4, 32]"],
        ),
        (
            lambda t: t.update({f"{O_PROJ}.qweight": torch.zeros(4, 32)}),
            [f"{O_PROJ}.qweight", "dtype F32", "I32"],
        ),
        (
            lambda t: t.update({f"{O_PROJ}.g_idx": torch.zeros(5, dtype=torch.int32)}),
            [f"{O_PROJ}.g_idx", "shape [5]", "expected [32]"],
        ),
        (
            lambda t: t.update({f"{O_PROJ}.g_idx": torch.zeros(32, dtype=torch.int32)}),
            ["layers.1.self_attn.o_proj", "g_idx does not put 8 of 32 inputs"],
        ),
    ],
)
def test_every_defect_of_gptq_tensors_is_one_line_with_its_name(
    damage: Callable[[dict[str, Tensor]], object], words: list[str], tiny: Any, tmp_path: Path
) -> None:
    tiny.write_checkpoint(tmp_path / "dense", tiny.values, tiny.build_oracle(tiny.values))
    write_gptq(tmp_path / "dense", tmp_path / "gptq", GROUP)
    file = tmp_path / "gptq" / "model.safetensors"
    tensors = load_file(file)
    damage(tensors)
    save_file(tensors, file)
    with pytest.raises(ValueError) as failure:  # noqa: PT011 - the words are checked below
        tiny.engine(tmp_path / "gptq")
    message = str(failure.value)
    assert all(word in message for word in words), message
    assert "\n" not in message


def test_outputs_that_do_not_fill_words_of_zero_points_are_refused(tiny: Any, tmp_path: Path) -> None:
    values = {**tiny.values, "head_dim": 6}  # 24 outputs of q_proj, 12 of k_proj
    tiny.write_checkpoint(tmp_path, values, tiny.build_oracle(values))
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj"
    packed, _ = to_gptq(tensors.pop(f"{name}.weight"), GROUP)
    save_file(tensors | {f"{name}.{part}": value for part, value in packed.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({**values, "quantization_config": {**GPTQ, "group_size": GROUP}}))
    with pytest.raises(ValueError, match=r"k_proj\.qzeros' packs outputs in eights, and 12 is no multiple of 8"):
        tiny.engine(tmp_path)


def test_groups_that_the_kernels_cannot_read_are_refused_by_tensor(tiny: Any, tmp_path: Path) -> None:
    tiny.write_checkpoint(tmp_path / "dense", tiny.values, tiny.build_oracle(tiny.values))
    write_gptq(tmp_path / "dense", tmp_path / "gptq", 6)
    with pytest.raises(ValueError, match=r"'model\.layers\.0\..*_proj\.\*': GPTQ group_size 6 must be a multiple of 4"):
        tiny.engine(tmp_path / "gptq")


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.layers.1.mlp.experts.gate_up_proj", (5, 32, 32)),
        ("model.layers.1.mlp.experts.gate_up_proj", (6, 16, 32)),
        ("model.layers.1.mlp.experts.down_proj", (6, 16, 32)),
        ("model.layers.0.mlp.gate.weight", (5, 32)),
    ],
)
def test_fused_experts_of_another_count_or_size_are_refused(
    name: str, shape: tuple[int, ...], tiny: Any, tmp_path: Path
) -> None:
    tiny.write_checkpoint(tmp_path, tiny.values, tiny.build_oracle(tiny.values), fused=True)
    tensors = load_file(tmp_path / "model.safetensors")
    found, tensors[name] = list(tensors[name].shape), torch.zeros(shape)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError) as failure:  # noqa: PT011 - the words are checked below
        tiny.engine(tmp_path)
    message = str(failure.value)
    assert name in message and f"shape {list(shape)}, expected {found}" in message and "\n" not in message
