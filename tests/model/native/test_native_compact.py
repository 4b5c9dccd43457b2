"""Compact panels: every weight comes back, products have the bits of plain panels, and what doesn't fit stays plain."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.checkpoint import Checkpoint
from model.config import ModelConfig
from model.kernels import REFERENCE_KERNELS, select_kernels
from model.layers import MLP
from model.linear import DenseWeight, Incompressible, Weight, linear
from model.load import Loader
from model.native.kernels import NativeKernels
from model.native.packed_weight import PackedWeight
from model.native.shared_object import LEVELS, load_shared_object
from tests.random_checkpoint import write_random_checkpoint

VALUES = {
    "vocab_size": 300,
    "hidden_size": 256,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
}
SHAPES = [(1, 32), (33, 64), (64, 96), (130, 256), (256, 1408), (70, 2048)]


@pytest.fixture(params=LEVELS[1:])
def kernels(request: pytest.FixtureRequest) -> NativeKernels:
    shared_object = load_shared_object(request.param, num_threads=2)
    if shared_object is None:
        pytest.skip(f"this CPU has no {request.param}")
    return NativeKernels(shared_object)


def _pair(kernels: NativeKernels, matrix: Tensor, bfloat16_inputs: bool = False) -> tuple[PackedWeight, PackedWeight]:
    plain = kernels.pack_weight(DenseWeight(matrix, bfloat16_inputs))
    compact = kernels.compact(plain)
    assert isinstance(plain, PackedWeight) and isinstance(compact, PackedWeight)
    assert compact.codebooks is not None
    return plain, compact


def _matrix(num_outputs: int, num_inputs: int) -> Tensor:
    return (torch.randn(num_outputs, num_inputs) / 30).bfloat16()


@pytest.mark.parametrize("bfloat16_inputs", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_products_have_the_bits_of_plain_panels(
    kernels: NativeKernels, shape: tuple[int, int], bfloat16_inputs: bool
) -> None:
    plain, compact = _pair(kernels, _matrix(*shape), bfloat16_inputs)
    bias = torch.randn(shape[0])
    for num_rows in (*range(1, 18), 32, 33, 70, 100, 300, 600):
        x_TK = torch.randn(num_rows, shape[1])
        assert torch.equal(linear(x_TK, compact, bias), linear(x_TK, plain, bias)), num_rows


def test_weights_of_every_kind_come_back(kernels: NativeKernels) -> None:
    matrix = _matrix(40, 512)
    odd = torch.tensor([0.0, -0.0, 1e-30, -1e-40, 3e38, -3e38, float("inf"), -float("inf"), float("nan")]).bfloat16()
    matrix[3, 100 : 100 + len(odd)] = odd
    matrix[39, -len(odd) :] = -odd
    plain, compact = _pair(kernels, matrix)
    assert torch.equal(compact.dequantize().nan_to_num(5.0), matrix.float().nan_to_num(5.0))
    assert torch.equal(compact.dequantize().signbit(), matrix.float().signbit())
    x_TK = torch.randn(20, 512)
    assert torch.equal(linear(x_TK, compact).nan_to_num(5.0), linear(x_TK, plain).nan_to_num(5.0))


@pytest.mark.parametrize("matrix", [torch.zeros(64, 64), torch.full((32, 32), -0.37), torch.eye(96)])
def test_weights_all_alike_come_back(kernels: NativeKernels, matrix: Tensor) -> None:
    _, compact = _pair(kernels, matrix.bfloat16())
    assert torch.equal(compact.dequantize(), matrix.bfloat16().float())


def test_three_quarters_of_the_bytes(kernels: NativeKernels) -> None:
    plain, compact = _pair(kernels, _matrix(1408, 2048))
    assert compact.num_bytes < 0.76 * plain.num_bytes


def test_an_mlp_has_the_bits_of_plain_panels(kernels: NativeKernels) -> None:
    gate_ups, downs = (_pair(kernels, _matrix(*shape)) for shape in ((2 * 96, 128), (128, 96)))
    for num_rows in (1, 16, 40):
        x_TH = torch.randn(num_rows, 128)
        plain, compact = (kernels.mlp(MLP(*matrices), x_TH) for matrices in zip(gate_ups, downs, strict=True))
        assert torch.equal(plain, compact)


def test_experts_have_the_bits_of_plain_panels(kernels: NativeKernels) -> None:
    pairs = [(_pair(kernels, _matrix(2 * 64, 96)), _pair(kernels, _matrix(96, 64))) for _ in range(3)]
    rows, expert_ids = torch.arange(50).repeat_interleave(2), torch.randint(0, 3, (100,))
    x_NH, weights = torch.randn(50, 96), torch.rand(100)
    plain, compact = (
        kernels.run_experts(
            x_NH, rows, expert_ids, weights, {e: MLP(up[way], down[way]) for e, (up, down) in enumerate(pairs)}, None
        )
        for way in (0, 1)
    )
    assert torch.equal(plain, compact)


def test_what_is_unlike_trained_weights_is_refused(kernels: NativeKernels) -> None:
    noise = torch.randint(-(2**15), 2**15, (64, 256), dtype=torch.int16).view(torch.bfloat16)
    with pytest.raises(Incompressible, match="one in 512"):
        kernels.compact(kernels.pack_weight(DenseWeight(noise)))
    one_bad_panel = _matrix(64, 256)
    one_bad_panel[32:] = noise[32:]
    with pytest.raises(Incompressible):
        kernels.compact(kernels.pack_weight(DenseWeight(one_bad_panel)))


def test_other_formats_and_widths_stay_as_they_are_and_all_with_avx2(
    kernels: NativeKernels, levels: list[NativeKernels]
) -> None:
    for matrix in (torch.randn(32, 64), torch.randn(32, 64).half(), _matrix(32, 40)):
        packed = kernels.pack_weight(DenseWeight(matrix))
        assert kernels.compact(packed) is packed
    packed = levels[0].pack_weight(DenseWeight(_matrix(32, 64)))
    assert levels[0].compact(packed) is packed


def test_a_model_is_loaded_compact_but_for_what_does_not_fit(tmp_path: Path) -> None:
    kernels, shared_object = select_kernels(), load_shared_object()
    if shared_object is None or shared_object.compact is None:
        pytest.skip("compact panels need AVX-512")
    directory = write_random_checkpoint(tmp_path / "model", VALUES)
    file, uneven = directory / "layer-1.safetensors", "model.layers.1.mlp.experts.2.down_proj.weight"
    tensors = load_file(file)
    tensors[uneven] = tensors[uneven] * 2.0 ** torch.randint(-60, 60, tensors[uneven].shape)
    save_file(tensors, file)
    checkpoint, config = Checkpoint(directory), ModelConfig.from_directory(directory)
    loaded, expected = (Loader(checkpoint, config, kernels=some) for some in (kernels, REFERENCE_KERNELS))
    decoder = loaded.decoder()
    found = {"qkv": decoder.layers[0].attention.qkv, "head": loaded.head(decoder).weight}
    wanted = {"qkv": expected.decoder().layers[0].attention.qkv, "head": expected.head().weight}
    for (layer_idx, expert_id), expert in loaded.experts().items():
        found[f"{layer_idx} {expert_id}"] = expert.down
        wanted[f"{layer_idx} {expert_id}"] = expected.expert(layer_idx, expert_id).down
    assert {name for name, weight in found.items() if _codebooks(weight) is None} == {"1 2"}
    for name, weight in found.items():
        assert torch.equal(weight.dequantize(), wanted[name].dequantize()), name


def _codebooks(weight: Weight) -> Tensor | None:
    assert isinstance(weight, PackedWeight)
    return weight.codebooks
