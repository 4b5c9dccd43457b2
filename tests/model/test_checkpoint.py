"""Reading checkpoints: only what is asked for, never wider than stored, and every defect in one clear line."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.checkpoint import Checkpoint
from model.config import ModelConfig
from model.kernels import REFERENCE_KERNELS, Kernels
from model.load import Loader

EXPERT_BYTES = 3 * 16 * 32 * 4  # gate, up and down of the tiny config in float32
INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("sharded", [False, True])
def test_an_expert_reads_only_its_own_bytes(fused: bool, sharded: bool, tiny: Any, tmp_path: Path) -> None:
    oracle = tiny.build_oracle(tiny.values)
    tiny.write_checkpoint(tmp_path, tiny.values, oracle, fused=fused, sharded=sharded)
    checkpoint, config = Checkpoint(tmp_path), ModelConfig.from_directory(tmp_path)

    expert = Loader(checkpoint, config).expert(1, 3)

    assert checkpoint.bytes_read == expert.num_bytes == EXPERT_BYTES
    stacked = oracle.model.layers[1].mlp.experts
    assert torch.equal(expert.gate_up.dequantize(), stacked.gate_up_proj[3])
    assert torch.equal(expert.down.dequantize(), stacked.down_proj[3])


def test_the_parts_together_read_each_tensor_once(tiny: Any, tmp_path: Path) -> None:
    tiny.write_checkpoint(tmp_path, tiny.values, tiny.build_oracle(tiny.values))
    engine = tiny.engine(tmp_path)
    assert engine.checkpoint.bytes_read == sum(t.nbytes for t in load_file(tmp_path / "model.safetensors").values())


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("quantization", [None, "int8", "int4"])
def test_a_tied_head_is_the_embedding(
    quantization: str | None, native: bool, fast_kernels: Kernels, tiny: Any, tmp_path: Path
) -> None:
    tiny.make(tmp_path, tie_word_embeddings=True)
    kernels = fast_kernels if native else REFERENCE_KERNELS
    engine = tiny.engine(tmp_path, quantization=quantization, kernels=kernels)
    assert engine.head.weight is engine.decoder.embedding


@pytest.mark.parametrize(
    ("stored", "configured", "kept"),
    [
        (torch.bfloat16, "bfloat16", torch.bfloat16),
        (torch.bfloat16, "float32", torch.bfloat16),
        (torch.float32, "bfloat16", torch.bfloat16),
        (torch.float32, None, torch.float32),
        (torch.bfloat16, "float16", torch.float16),
    ],
)
def test_weights_are_kept_as_stored_or_narrower(
    stored: torch.dtype, configured: str | None, kept: torch.dtype, tiny: Any, tmp_path: Path
) -> None:
    values = {**tiny.values, "dtype": configured}
    tiny.write_checkpoint(tmp_path, values, tiny.build_oracle(values), dtype=stored)
    engine = tiny.engine(tmp_path)
    expert = Loader(engine.checkpoint, engine.config).expert(0, 0)
    for weight in (engine.head.weight, engine.decoder.layers[0].attention.qkv, expert.gate_up, expert.down):
        assert weight.tensor.dtype == kept
    assert engine.decoder.embedding.tensor.dtype == kept


def test_heads_in_sibling_directories_share_one_backbone(tiny: Any, tmp_path: Path) -> None:
    values = {**tiny.values, "architectures": ["Qwen2MoeForTokenClassification"]}
    oracle = tiny.build_oracle(values)
    backbone = tiny.write_checkpoint(tmp_path / "backbone", values, oracle)
    head = tmp_path / "head"
    head.mkdir()
    save_file({"score.weight": torch.ones(2, 32), "score.bias": torch.zeros(2)}, head / "head.safetensors")
    names = [name for name in load_file(backbone / "model.safetensors") if not name.startswith("score")]
    weight_map = dict.fromkeys(names, "../backbone/model.safetensors") | dict.fromkeys(
        ("score.weight", "score.bias"), "head.safetensors"
    )
    (head / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    (head / "config.json").write_text(json.dumps(values))

    assert Checkpoint(head).backbone_id() == Checkpoint(backbone).backbone_id()
    assert torch.equal(tiny.engine(head).head.weight.dequantize(), torch.ones(2, 32))


@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_other_base_prefixes_are_read_too(prefix: str, tiny: Any, tmp_path: Path) -> None:
    tiny.write_checkpoint(tmp_path, tiny.values, tiny.build_oracle(tiny.values))
    expected = tiny.engine(tmp_path).scores([1, 2, 3])
    path = tmp_path / "model.safetensors"
    save_file({name.replace("model.", prefix, 1): tensor for name, tensor in load_file(path).items()}, path)

    assert torch.equal(tiny.engine(tmp_path).scores([1, 2, 3]), expected)


def test_a_base_model_has_a_decoder_and_no_head(tiny: Any, tmp_path: Path) -> None:
    values = {**tiny.values, "architectures": ["Qwen2MoeModel"]}
    tiny.write_checkpoint(tmp_path, values, tiny.build_oracle(values))
    engine = tiny.engine(tmp_path)
    with pytest.raises(ValueError, match=r"Qwen2MoeModel.*no head"):
        Loader(engine.checkpoint, engine.config).head()


def damage_tensor(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    def damage(path: Path) -> None:
        tensors = load_file(path / "model.safetensors")
        change(tensors)
        save_file(tensors, path / "model.safetensors")

    return damage


def truncate(path: Path, size: int) -> None:
    os.truncate(path, size)


def replace_header(path: Path, header: bytes) -> None:
    path.write_bytes(len(header).to_bytes(8, "little") + header)


NORM = "model.layers.1.input_layernorm.weight"


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: (path / "model.safetensors").unlink(), ["model.safetensors", "neither"]),
        (lambda path: truncate(path / "model.safetensors", 5), ["model.safetensors", "truncated"]),
        (lambda path: truncate(path / "model.safetensors", 100), ["model.safetensors", "truncated", "100"]),
        (lambda path: truncate(path / "model.safetensors", 60_000), ["model.safetensors", "truncated", "60000"]),
        (lambda path: replace_header(path / "model.safetensors", b"not json"), ["model.safetensors", "no JSON"]),
        (lambda path: replace_header(path / "model.safetensors", b"[" * 200_000), ["model.safetensors", "no JSON"]),
        (lambda path: replace_header(path / "model.safetensors", b"1" * 5000), ["model.safetensors", "no JSON"]),
        (lambda path: replace_header(path / "model.safetensors", b'{"a": 1}'), ["model.safetensors", "dtype"]),
        (
            lambda path: replace_header(
                path / "model.safetensors", b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 0]}}'
            ),
            ["'a'", "0 bytes", "expected 8"],
        ),
        (
            lambda path: replace_header(
                path / "model.safetensors", b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}}'
            ),
            ["model.safetensors", "offsets"],
        ),
        (
            lambda path: replace_header(
                path / "model.safetensors", b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, Infinity]}}'
            ),
            ["model.safetensors", "offsets"],
        ),
        *(
            (
                lambda path, entry=entry: replace_header(
                    path / "model.safetensors", b'{"a": {"dtype": "F32", %s}}' % entry
                ),
                ["model.safetensors", "its header has no dtype, shape and offsets"],
            )
            for entry in (
                b'"shape": [-1, -2], "data_offsets": [0, 8]',
                b'"shape": [2.5], "data_offsets": [0, 8]',
                b'"shape": [true], "data_offsets": [0, 4]',
                b'"shape": ["2"], "data_offsets": [0, 8]',
                b'"shape": [0, 1%s], "data_offsets": [0, 0]' % (b"0" * 30),
                b'"shape": [2], "data_offsets": [0, 8.0]',
                b'"shape": [2], "data_offsets": [0, 8, 16]',
            )
        ),
        (damage_tensor(lambda tensors: tensors.pop(NORM)), [NORM, "missing"]),
        (damage_tensor(lambda tensors: tensors.pop("lm_head.weight")), ["lm_head.weight", "missing"]),
        (damage_tensor(lambda tensors: tensors.pop("model.embed_tokens.weight")), ["model.embed_tokens.weight"]),
        (
            damage_tensor(lambda tensors: tensors.update({NORM: torch.ones(7)})),
            [NORM, "shape [7]", "expected [32]"],
        ),
        (
            damage_tensor(lambda tensors: tensors.update({NORM: torch.ones(32, dtype=torch.int8)})),
            [NORM, "dtype I8", "BF16"],
        ),
        (
            damage_tensor(lambda tensors: tensors.update({NORM: torch.ones(32, dtype=torch.float8_e4m3fn)})),
            [NORM, "dtype F8_E4M3", "BF16"],
        ),
        (
            damage_tensor(
                lambda tensors: tensors.update({"model.layers.1.mlp.experts.2.down_proj.weight": torch.ones(32, 15)})
            ),
            ["model.layers.1.mlp.experts.2.down_proj.weight", "shape [32, 15]", "expected [32, 16]"],
        ),
        (
            damage_tensor(lambda tensors: tensors.update({NORM.replace("1", "2", 1): torch.ones(32)})),
            ["'model.layers.2.input_layernorm.weight'", "expected layers 0 to 1", "num_hidden_layers"],
        ),
        (lambda path: (path / INDEX).write_text("{"), [INDEX, "JSON"]),
        (lambda path: (path / INDEX).write_text("[" * 200_000), [INDEX, "JSON"]),
        (lambda path: (path / INDEX).write_text("1" * 5000), [INDEX, "JSON"]),
        (lambda path: (path / INDEX).write_text("[]"), [INDEX, "weight_map"]),
        (lambda path: (path / INDEX).write_text('{"weight_map": {"a": "../../b"}}'), [INDEX, "'../../b'", "sibling"]),
        (lambda path: (path / INDEX).write_text('{"weight_map": {"a": "/etc/passwd"}}'), [INDEX, "'/etc/passwd'"]),
        *(
            (
                lambda path, file=file: (path / INDEX).write_text(json.dumps({"weight_map": {"a": file}})),
                [INDEX, repr(file[:9])[:-1]],
            )
            for file in ("x\0y", "y" * 5000, "\ud800")
        ),
        (
            lambda path: (path / INDEX).write_text('{"weight_map": {"a": "b.safetensors"}}'),
            ["b.safetensors", "missing"],
        ),
        (
            lambda path: (path / INDEX).write_text(
                '{"weight_map": {"model.embed_tokens.weight": "model.safetensors", "ghost": "model.safetensors"}}'
            ),
            ["'model.layers.0.", "missing"],
        ),
    ],
)
def test_every_defect_is_one_line_with_its_name(
    damage: Callable[[Path], object], words: list[str], tiny: Any, tmp_path: Path
) -> None:
    tiny.write_checkpoint(tmp_path, tiny.values, tiny.build_oracle(tiny.values))
    damage(tmp_path)
    with pytest.raises(ValueError) as failure:  # noqa: PT011 - the words are checked below
        tiny.engine(tmp_path)
    message = str(failure.value)
    assert all(word in message for word in words), message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("architecture", "fused", "name", "shape", "expected"),
    [
        ("Qwen2MoeForCausalLM", True, "model.layers.1.mlp.experts.gate_up_proj", (5, 32, 32), "[6, 32, 32]"),
        ("Qwen2MoeForCausalLM", True, "model.layers.1.mlp.experts.down_proj", None, "missing"),
        ("Qwen2MoeForCausalLM", False, "model.layers.0.mlp.gate.weight", (7, 32), "[6, 32]"),
        ("Qwen2MoeForCausalLM", False, "model.layers.0.self_attn.k_proj.bias", (9,), "[16]"),
        ("Qwen2MoeForCausalLM", False, "lm_head.weight", (61, 31), "[61, 32]"),
        ("Qwen2MoeForSequenceClassification", False, "score.weight", (3, 32), "[2, 32]"),
        ("Qwen2MoeForTokenClassification", False, "score.bias", (3,), "[2]"),
        ("Qwen2MoeForQuestionAnswering", False, "qa_outputs.weight", None, "missing"),
    ],
)
def test_every_part_names_tensor_expected_and_found_shape(
    architecture: str,
    fused: bool,
    name: str,
    shape: tuple[int, ...] | None,
    expected: str,
    tiny: Any,
    tmp_path: Path,
) -> None:
    values = {**tiny.values, "architectures": [architecture]}
    tiny.write_checkpoint(tmp_path, values, tiny.build_oracle(values), fused=fused)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[name]
    save_file(tensors | ({} if shape is None else {name: torch.ones(shape)}), tmp_path / "model.safetensors")
    found = "" if shape is None else re.escape(f"has shape {list(shape)}") + ".*"
    with pytest.raises(ValueError, match=f"tensor {name!r} .*{found}{re.escape(expected)}") as failure:
        tiny.engine(tmp_path)
    assert "\n" not in str(failure.value)


def test_biases_that_the_config_denies_are_no_detail(tiny: Any, tmp_path: Path) -> None:
    tiny.write_checkpoint(tmp_path, tiny.values, tiny.build_oracle(tiny.values))
    with pytest.raises(ValueError, match=r"tensor 'model.layers.0.self_attn.[qkv]_proj.bias' .*qkv_bias"):
        Loader(Checkpoint(tmp_path), ModelConfig.from_dict({**tiny.values, "qkv_bias": False})).decoder()


def test_a_tensor_that_its_file_lacks_is_named_with_the_file(tiny: Any, tmp_path: Path) -> None:
    tiny.write_checkpoint(tmp_path, tiny.values, tiny.build_oracle(tiny.values))
    names = [*load_file(tmp_path / "model.safetensors"), "ghost"]
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, "model.safetensors")}))
    with pytest.raises(ValueError, match=r"model.safetensors: tensor 'ghost' is missing.*index"):
        Checkpoint(tmp_path).tensor("ghost")


def test_a_file_that_went_after_its_header_was_read_is_named(tiny: Any, tmp_path: Path) -> None:
    checkpoint = Checkpoint(tiny.write_checkpoint(tmp_path, tiny.values, tiny.build_oracle(tiny.values)))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read: No such file"):
        checkpoint.tensor(NORM)


def test_weights_of_another_size_are_refused_with_both_shapes(tiny: Any, tmp_path: Path) -> None:
    tiny.write_checkpoint(tmp_path, tiny.values, tiny.build_oracle(tiny.values))
    config = ModelConfig.from_dict({**tiny.values, "vocab_size": 62})
    with pytest.raises(ValueError, match=r"'model.embed_tokens.weight' has shape \[61, 32\], expected \[62, 32\]"):
        Loader(Checkpoint(tmp_path), config).decoder()


def test_threads_load_the_same_experts_and_stop_at_the_first_defect(tiny: Any, tmp_path: Path) -> None:
    tiny.write_checkpoint(tmp_path, tiny.values, tiny.build_oracle(tiny.values))
    config, alone, together = ModelConfig.from_dict(tiny.values), Checkpoint(tmp_path), Checkpoint(tmp_path)
    expected, found = Loader(alone, config).experts(), Loader(together, config).experts(num_threads=3)
    assert list(found) == list(expected) and together.bytes_read == alone.bytes_read
    for key, expert in expected.items():
        assert torch.equal(found[key].down.dequantize(), expert.down.dequantize())
    tensors = load_file(tmp_path / "model.safetensors")
    tensors.pop(name := "model.layers.1.mlp.experts.3.down_proj.weight")
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=f"tensor {name!r} is missing"):
        Loader(Checkpoint(tmp_path), config).experts(num_threads=3)
