"""Loading in blocks of rows: the same weights as in one piece, and little more memory than what stays."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from model.checkpoint import Checkpoint
from model.config import ModelConfig
from model.kernels import REFERENCE_KERNELS, Kernels
from model.linear import DenseWeight, Weight, stack_rows
from model.load import Loader
from model.quantize import quantize_int4, quantize_int8
from tests.bench.quantization import Loaded, resident_bytes
from tests.gptq import write_gptq
from tests.random_checkpoint import write_random_checkpoint

VALUES: dict[str, Any] = {
    "vocab_size": 6000,
    "hidden_size": 512,
    "moe_intermediate_size": 200,
    "shared_expert_intermediate_size": 1424,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "num_experts": 32,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
}


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors that torch has made and that still live, and the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor):
                self._watch(tensor.untyped_storage())
        return out

    def _watch(self, storage: torch.UntypedStorage) -> None:
        address, num_bytes = storage._cdata, storage.nbytes()
        if address in self._known:
            return
        self._known.add(address)
        self.now += num_bytes
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._forget, address, num_bytes)

    def _forget(self, address: int, num_bytes: int) -> None:
        self._known.discard(address)
        self.now -= num_bytes


def stores() -> dict[str, Callable[[Tensor], Weight]]:
    return {"bfloat16": lambda m: DenseWeight(m.bfloat16()), "int8": quantize_int8, "int4": quantize_int4}


@pytest.mark.parametrize("storage", stores())
@pytest.mark.parametrize("num_outputs", [32, 64, 100, 129])
def test_blocks_of_rows_become_the_weight_of_all_rows(storage: str, num_outputs: int, fast_kernels: Kernels) -> None:
    matrix = torch.randn(num_outputs, 72)
    for kernels in (REFERENCE_KERNELS, fast_kernels):
        blocks = (kernels.pack_weight(stores()[storage](block)) for block in matrix.split(64))
        stacked, whole = stack_rows(blocks, num_outputs), kernels.pack_weight(stores()[storage](matrix))
        assert stacked.shape == whole.shape and stacked.num_bytes == whole.num_bytes
        assert torch.equal(stacked.dequantize(), whole.dequantize())
        assert torch.equal(stacked.multiply(matrix), whole.multiply(matrix))


def test_blocks_of_several_storages_are_refused() -> None:
    for other in (torch.randn(32, 72).half(), torch.randn(32, 71)):
        with pytest.raises(ValueError, match=r"tensor: torch.float.*expected torch.float32 \[\.\.\., 72\]"):
            stack_rows([DenseWeight(torch.randn(32, 72)), DenseWeight(other)], 64)


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("dtypes", itertools.permutations((torch.float32, torch.bfloat16, torch.float16), 2))
def test_matrices_of_several_dtypes_become_one_of_the_widest(
    dtypes: tuple[torch.dtype, torch.dtype], native: bool, fast_kernels: Kernels, tmp_path: Path
) -> None:
    gate, up = (torch.randn(200, 512).to(dtype) for dtype in dtypes)
    expert = "model.layers.0.mlp.experts.0"
    tensors = {f"{expert}.gate_proj.weight": gate, f"{expert}.up_proj.weight": up}
    tensors |= {f"{expert}.down_proj.weight": torch.randn(512, 200), "model.embed_tokens.weight": torch.zeros(1)}
    save_file(tensors, tmp_path / "model.safetensors")
    config = ModelConfig.from_dict({"model_type": "qwen2_moe", **VALUES})

    kernels = fast_kernels if native else REFERENCE_KERNELS
    gate_up = Loader(Checkpoint(tmp_path), config, kernels=kernels).expert(0, 0).gate_up

    expected, x_TK = torch.cat([gate.float(), up.float()]), torch.randn(5, 512)
    assert torch.equal(gate_up.dequantize(), expected)
    torch.testing.assert_close(gate_up.multiply(x_TK), x_TK @ expected.T, atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """About 50 MB in bfloat16."""
    path = tmp_path_factory.mktemp("checkpoints")
    plain = write_random_checkpoint(path / "plain", VALUES)
    write_gptq(plain, path / "gptq", 8)
    fused = write_random_checkpoint(path / "fused", VALUES, fused=True)
    wide = write_random_checkpoint(path / "wide", {**VALUES, "dtype": "bfloat16"}, dtype=torch.float32)
    tied = write_random_checkpoint(path / "tied", {**VALUES, "tie_word_embeddings": True})
    return {"plain": plain, "gptq": path / "gptq", "fused": fused, "wide": wide, "tied": tied}


@pytest.mark.parametrize("part", ["router", "shard"])
@pytest.mark.parametrize(
    ("name", "quantization"),
    [
        ("plain", None),
        ("plain", "int8"),
        ("plain", "int4"),
        ("fused", None),
        ("fused", "int4"),
        ("wide", None),
        ("tied", "int4"),
        ("gptq", None),
        ("gptq", "int8"),
    ],
)
def test_loading_takes_at_most_a_fifth_more_than_what_stays(
    name: str, quantization: str | None, part: str, checkpoints: dict[str, Path], fast_kernels: Kernels
) -> None:
    config, checkpoint = ModelConfig.from_directory(checkpoints[name]), Checkpoint(checkpoints[name])
    loader = Loader(checkpoint, config, quantization, kernels=fast_kernels)
    loaded: Any
    with LiveBytes() as live:
        if part == "router":
            decoder = loader.decoder()
            loaded = (decoder.embedding, decoder.layers, decoder.norm, loader.head(decoder))
        else:
            loaded = loader.experts()
    assert live.most <= 1.2 * resident_bytes(loaded), (live.most, resident_bytes(loaded))


@pytest.mark.parametrize(("quantization", "share"), [("int8", 0.55), ("int4", 0.32)])
@pytest.mark.parametrize("name", ["plain", "tied"])
def test_a_quantized_model_takes_its_share_of_bfloat16_in_all_processes(
    name: str, quantization: str, share: float, checkpoints: dict[str, Path], fast_kernels: Kernels
) -> None:
    small = Loaded.from_directory(checkpoints[name], fast_kernels, quantization)
    bfloat16 = Loaded.from_directory(checkpoints[name], REFERENCE_KERNELS)  # two bytes each; ours may take fewer
    num_bytes, full_bytes = (model.router_bytes + model.shard_bytes for model in (small, bfloat16))
    assert num_bytes <= share * full_bytes, num_bytes / full_bytes
