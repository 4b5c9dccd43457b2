"""config.json resolved once: defaults, legacy spellings, refusals by name."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers import masking_utils, modeling_layers
from transformers.models.qwen2_moe import modeling_qwen2_moe

from model.config import GptqConfig, ModelConfig


def resolve(**fields: Any) -> ModelConfig:
    return ModelConfig.from_dict({"model_type": "qwen2_moe", **fields})


def test_defaults_are_those_of_transformers() -> None:
    ours, theirs = resolve(), transformers.Qwen2MoeConfig()

    same = "vocab_size hidden_size intermediate_size moe_intermediate_size shared_expert_intermediate_size rms_norm_eps"
    same += " num_hidden_layers num_attention_heads num_key_value_heads num_experts num_experts_per_tok norm_topk_prob"
    same += " qkv_bias max_position_embeddings tie_word_embeddings"
    for name in same.split():
        assert getattr(ours, name) == getattr(theirs, name), name
    assert list(ours.layer_types) == theirs.layer_types
    assert ours.rope.theta == theirs.rope_parameters["rope_theta"]


# A value of each field that is neither its default nor neutral: it changes what we resolve, or is refused by name.
CHANGES: dict[str, Any] = {
    "architectures": ["Qwen2MoeForTokenClassification"],
    "decoder_sparse_step": 2,
    "dtype": "float16",
    "eos_token_id": [3, 4],
    "head_dim": 6,
    "hidden_act": "gelu",
    "hidden_size": 4096,
    "id2label": {"0": "a", "1": "b", "2": "c"},
    "intermediate_size": 8,
    "is_causal": False,
    "is_encoder_decoder": True,
    "layer_types": ["sliding_attention"] + ["full_attention"] * 23,
    "max_position_embeddings": 64,
    "max_window_layers": 2,
    "mlp_only_layers": [1],
    "moe_intermediate_size": 8,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
    "num_key_value_heads": 8,
    "num_labels": 3,
    "pad_token_id": 3,
    "per_layer_config": {"0": {"head_dim": 8}},
    "problem_type": "regression",
    "qkv_bias": False,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 7.0},
    "shared_expert_intermediate_size": 8,
    "sliding_window": 7,
    "tie_word_embeddings": True,
    "token_classification_bias": False,
    "use_sliding_window": False,
    "vocab_size": 64,
}
# Fields of training, of how transformers answers in Python, and of nothing in this model.
WITHOUT_EFFECT = {
    *("attention_dropout", "classifier_dropout", "hidden_dropout", "initializer_range", "router_aux_loss_coef"),
    *("output_hidden_states", "output_router_logits", "return_dict", "transformers_version", "use_cache"),
    *("chunk_size_feed_forward", "label2id", "bos_token_id"),
}
OF_OTHER_MODELS = {"chain_hidden_post_norm", "logits_mup_width_multiplier", "mtp_hidden_states_first"}
OF_OTHER_MODELS |= {"unpadded_vocab_size", "attention_chunk_size"}


def test_every_field_that_transformers_reads_is_known_here() -> None:
    sources = [inspect.getsource(module) for module in (modeling_qwen2_moe, modeling_layers, masking_utils)]
    read = {
        name for source in sources for name in re.findall(r"(?:getattr\([\w.]*config, \"|\bconfig\.)([a-z]\w+)", source)
    }
    methods = {name for name in read if hasattr(transformers.Qwen2MoeConfig, name) and name not in CHANGES}
    fields = {field.name for field in dataclasses.fields(transformers.Qwen2MoeConfig)}
    unknown = (fields | read) - CHANGES.keys() - WITHOUT_EFFECT - OF_OTHER_MODELS - (methods - fields)
    assert not unknown


@pytest.mark.parametrize("name", CHANGES)
def test_every_field_has_its_effect_or_is_refused_by_name(name: str) -> None:
    base = {"use_sliding_window": True, "id2label": None}
    try:
        changed = resolve(**{**base, name: CHANGES[name]})
    except ValueError as refusal:
        assert name in str(refusal)  # noqa: PT017 - both outcomes are good
    else:
        assert changed != resolve(**base)


def test_importing_it_does_not_import_torch() -> None:
    code = "import sys; import model.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("fields", "moe_layers"),
    [
        ({}, (0, 1, 2, 3)),
        ({"decoder_sparse_step": 2}, (1, 3)),
        ({"mlp_only_layers": [0, 3]}, (1, 2)),
        ({"decoder_sparse_step": 2, "mlp_only_layers": [3]}, (1,)),
        ({"num_experts": 0}, ()),
    ],
)
def test_moe_layers_follow_the_sparse_step_and_the_exceptions(
    fields: dict[str, Any], moe_layers: tuple[int, ...]
) -> None:
    config = resolve(num_hidden_layers=4, **fields)
    assert config.moe_layers == moe_layers
    assert [i for i in range(4) if config.is_moe_layer(i)] == list(moe_layers)


def test_legacy_sliding_fields_give_the_layer_types_of_transformers() -> None:
    fields = {"num_hidden_layers": 6, "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 3}
    config = resolve(**fields)
    assert list(config.layer_types) == transformers.Qwen2MoeConfig(**fields).layer_types
    assert config.sliding_window == 9
    assert config.kv_groups == ("full", "sliding")
    assert [config.layer_kv_group(i) for i in range(6)] == [1, 0, 1, 0, 0, 0]


def test_kv_groups_without_layers_are_left_out() -> None:
    assert resolve(num_hidden_layers=2).kv_groups == ("full",)
    sliding = resolve(num_hidden_layers=1, use_sliding_window=True, layer_types=["sliding_attention"])
    assert sliding.kv_groups == ("sliding",)
    assert sliding.layer_kv_group(0) == 0


def test_a_window_without_sliding_layers_has_no_effect() -> None:
    assert resolve(sliding_window=64).sliding_window is None


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 7.0, "factor": 2.0}},
        {"rope_theta": 7.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_theta": 7, "rope_scaling": {"rope_type": "linear", "factor": 2}},
        {"rope_theta": 9.0, "rope_scaling": {"rope_type": "linear", "factor": 2.0, "rope_theta": 7.0}},
    ],
)
def test_both_rope_spellings_mean_the_same(fields: dict[str, Any]) -> None:
    rope = resolve(**fields).rope
    assert (rope.type, rope.theta, rope.factor) == ("linear", 7.0, 2.0)


def test_context_is_as_long_as_the_rope_was_stretched() -> None:
    def context(**params: Any) -> int:
        return resolve(max_position_embeddings=64, rope_scaling=params).max_context_len

    assert resolve(max_position_embeddings=64).max_context_len == 64
    assert context(type="dynamic", factor=2.0) == 128
    assert context(type="yarn", factor=4.0, original_max_position_embeddings=32) == 128
    assert context(type="yarn", factor=4.0) == 256


@pytest.mark.parametrize("spelling", ["dtype", "torch_dtype"])
def test_dtype_has_two_spellings(spelling: str) -> None:
    assert resolve(**{spelling: "bfloat16"}).dtype == "bfloat16"


def test_end_of_sequence_ids_come_from_the_generation_config_first(tmp_path: Path) -> None:
    config = {"model_type": "qwen2_moe", "eos_token_id": 5}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert ModelConfig.from_directory(tmp_path).eos_token_ids == (5,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 5, 7]}))
    assert ModelConfig.from_directory(tmp_path).eos_token_ids == (7, 5)


def test_labels_come_from_id2label_or_num_labels() -> None:
    assert resolve(id2label={"1": "b", "0": "a"}).id2label == {0: "a", 1: "b"}
    assert resolve(num_labels=3).id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"model_type": "llama"}, ["model_type 'llama'", "qwen2_moe"]),
        ({"architectures": ["Qwen3MoeForCausalLM"]}, ["architectures ['Qwen3MoeForCausalLM']", "Qwen2MoeForCausalLM"]),
        ({"architectures": [["Qwen2MoeForCausalLM"]]}, ["architectures [['Qwen2MoeForCausalLM']]"]),
        ({"architectures": [{}]}, ["architectures [{}]"]),
        ({"hidden_act": "gelu"}, ["hidden_act 'gelu'", "silu"]),
        ({"num_attention_heads": 6, "num_key_value_heads": 4}, ["num_attention_heads 6", "num_key_value_heads 4"]),
        ({"head_dim": 7}, ["head_dim 7", "odd"]),
        ({"hidden_size": 0}, ["hidden_size 0", "at least 1"]),
        ({"hidden_size": "64"}, ["hidden_size '64'", "integer"]),
        ({"qkv_bias": 1}, ["qkv_bias 1", "true or false"]),
        ({"num_experts": 2, "num_experts_per_tok": 3}, ["num_experts_per_tok 3", "num_experts 2"]),
        ({"mlp_only_layers": "0"}, ["mlp_only_layers '0'"]),
        ({"layer_types": ["full_attention"]}, ["layer_types", "24 layers"]),
        ({"num_hidden_layers": 1, "layer_types": [{}]}, ["layer_types entry {}", "full_attention"]),
        ({"hidden_size": 2**31}, ["hidden_size 2147483648", "at most 2147483647"]),
        ({"num_hidden_layers": 1, "layer_types": ["chunked_attention"]}, ["'chunked_attention'"]),
        ({"num_hidden_layers": 1, "layer_types": ["sliding_attention"]}, ["sliding_attention", "use_sliding_window"]),
        ({"use_sliding_window": True, "sliding_window": None}, ["sliding_window None"]),
        ({"problem_type": "ranking"}, ["problem_type 'ranking'", "regression"]),
        ({"dtype": "float64"}, ["dtype 'float64'", "bfloat16"]),
        ({"eos_token_id": "x"}, ["eos_token_id 'x'"]),
        ({"id2label": {"0": "a", "2": "b"}}, ["id2label", "[0, 2]"]),
        ({"id2label": {}}, ["id2label {}", "label numbers"]),
        ({"id2label": ["a"]}, ["id2label ['a']", "label numbers"]),
        ({"rope_scaling": {"type": "su"}}, ["rope_scaling.rope_type 'su'", "longrope"]),
        ({"rope_parameters": {"rope_type": "linear"}}, ["rope_parameters.factor None"]),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, ["rope_scaling.factor 0", "above 0"]),
        ({"rope_scaling": {"type": "linear", "factor": float("inf")}}, ["rope_scaling.factor inf", "above 0"]),
        ({"rope_scaling": {"type": "linear", "factor": 1e308}}, ["rope_scaling.factor 1e+308", "to 1e+30"]),
        ({"rope_scaling": {"type": "yarn", "factor": 1e308}}, ["rope_scaling.factor 1e+308", "to 1e+30"]),
        ({"rope_scaling": {"type": "yarn", "beta_fast": 1e308}}, ["rope_scaling.beta_fast 1e+308", "to 1e+30"]),
        ({"rope_scaling": {"type": "yarn", "beta_slow": 1e-320}}, ["rope_scaling.beta_slow 1e-320", "from 1e-30"]),
        ({"rope_theta": 1.0, "rope_scaling": {"type": "yarn", "factor": 2}}, ["rope_theta 1", "yarn"]),
        ({"rope_scaling": {"type": "linear", "factor": 10**400}}, ["rope_scaling.factor 1000", "above 0"]),
        (
            {"original_max_position_embeddings": 1, "rope_scaling": {"type": "longrope"}},
            ["original_max_position_embeddings 1 is", "longrope"],
        ),
        ({"rope_scaling": {"type": "linear", "factor": 2, "mrope_section": [1]}}, ["'mrope_section'"]),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, ["'full_attention'"]),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, ["partial_rotary_factor 0.5"]),
        ({"rope_theta": -1}, ["rope_theta -1"]),
        ({"rope_scaling": {"type": "longrope", "short_factor": [1], "long_factor": [1]}}, ["short_factor [1]", "64"]),
        ({"head_dim": 2, "rope_scaling": {"type": "dynamic", "factor": 2}}, ["head_dim 2", "dynamic"]),
        ({"quantization_config": {"quant_method": "awq"}}, ["quant_method 'awq'", "gptq"]),
        ({"quantization_config": {"quant_method": "gptq", "bits": 3}}, ["bits 3"]),
        (
            {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 0}},
            ["quantization_config.group_size 0", "an integer of at least 1"],
        ),
        ({"dual_chunk_attention_config": {"chunk_size": 4}}, ["dual_chunk_attention_config"]),
    ],
)
def test_what_is_not_implemented_is_refused_in_one_line_by_name(fields: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError) as failure:  # noqa: PT011 - the words are checked below
        resolve(**fields)
    message = str(failure.value)
    assert all(word in message for word in words), message
    assert "\n" not in message


@pytest.mark.parametrize(("written", "group_size"), [(32, 32), (-1, None), (None, 128)])
def test_gptqs_group_size_is_a_number_all_inputs_or_the_default_of_transformers(
    written: int | None, group_size: int | None
) -> None:
    config = resolve(quantization_config={"quant_method": "gptq", "bits": 4, "group_size": written})
    assert config.gptq == GptqConfig(zero_point_offset=1, group_size=group_size)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "does not exist"),
        ("{", "cannot be read as JSON"),
        ("[" * 200_000, "cannot be read as JSON"),
        ("1" * 5000, "cannot be read as JSON"),
        ("[]", "expected a JSON object"),
    ],
)
def test_a_broken_config_file_is_named(content: str | None, words: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=words) as failure:
        ModelConfig.from_directory(tmp_path)
    assert str(tmp_path / "config.json") in str(failure.value)
