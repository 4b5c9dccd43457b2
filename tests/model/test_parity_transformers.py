"""Our model against transformers' Qwen2-MoE on random configurations, layouts and heads, with 1 and 3 shards."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from model.kernels import REFERENCE_KERNELS, Kernels
from tests.random_config import ARCHITECTURES, random_config


def oracle_scores(oracle: Any, architecture: str, tokens: list[int]) -> Tensor:
    output = oracle(torch.tensor([tokens]))
    if architecture == "Qwen2MoeForQuestionAnswering":
        return torch.stack((output.start_logits[0], output.end_logits[0]), dim=-1)
    return output.logits[0]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("seed", range(66))
def test_scores_equal_those_of_transformers(
    seed: int, architecture: str, fast_kernels: Kernels, tiny: Any, tmp_path: Path
) -> None:
    values = {**random_config(seed, tiny.values), "architectures": [architecture]}
    layout = seed + ARCHITECTURES.index(architecture)
    oracle = tiny.build_oracle(values, seed)
    path = tiny.write_checkpoint(tmp_path, values, oracle, fused=layout % 2 == 1, sharded=layout % 4 >= 2)
    rng = random.Random(seed)
    tokens = [rng.randrange(1, values["vocab_size"]) for _ in range(rng.choice([1, 7, 23]))]

    kernels = rng.choice([REFERENCE_KERNELS, fast_kernels])
    engine = tiny.engine(path, block_size=rng.choice([4, 16]), kernels=kernels)

    chunk = rng.choice([None, 5])
    scores, from_three_shards = (engine.on_shards(num_shards).scores(tokens, chunk) for num_shards in (1, 3))

    assert torch.equal(scores, from_three_shards)
    if architecture == "Qwen2MoeForSequenceClassification":
        scores = scores[-1]
    torch.testing.assert_close(scores, oracle_scores(oracle, architecture, tokens), atol=1e-4, rtol=0)


@pytest.mark.parametrize("seed", range(6))
def test_greedy_tokens_equal_those_of_transformers_over_64_steps(seed: int, tiny: Any, tmp_path: Path) -> None:
    values = {**random_config(seed + 100, tiny.values), "max_position_embeddings": 96}
    if values.get("sliding_window") == 1:
        values["sliding_window"] = 2  # the cache of transformers keeps all keys when it should keep none (`[-0:]`)
    oracle = tiny.build_oracle(values, seed)
    engine = tiny.engine(tiny.write_checkpoint(tmp_path, values, oracle, fused=bool(seed % 2)))
    prompt = [3, 1, 4, 1, 5, 9, 2, 6]

    generated = oracle.generate(torch.tensor([prompt]), max_new_tokens=64, do_sample=False)

    assert engine.greedy(prompt, 64) == generated[0, len(prompt) :].tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("seed", range(8))
def test_16_bit_checkpoints_keep_the_argmax_of_transformers(
    seed: int, dtype: torch.dtype, fast_kernels: Kernels, tiny: Any, tmp_path: Path
) -> None:
    values = {**random_config(seed + 200, tiny.values), "dtype": str(dtype).removeprefix("torch.")}
    values.pop("torch_dtype", None)
    oracle = tiny.build_oracle(values, seed)
    path = tiny.write_checkpoint(tmp_path, values, oracle, fused=bool(seed % 2), dtype=dtype)
    tokens = list(range(1, 20))

    engine = tiny.engine(path, kernels=fast_kernels)
    scores, from_three_shards = (engine.on_shards(num_shards).scores(tokens) for num_shards in (1, 3))

    assert torch.equal(scores, from_three_shards)
    assert engine.decoder.embedding.tensor.dtype == dtype

    torch.testing.assert_close(scores, oracle_scores(oracle, "Qwen2MoeForCausalLM", tokens), atol=1e-4, rtol=0)
    tiny.cast_parameters(oracle, dtype)
    in_16_bits = oracle_scores(oracle, "Qwen2MoeForCausalLM", tokens).float()
    best, second = in_16_bits.topk(2, dim=-1).values.unbind(-1)
    clear = best - second > 0.05
    assert torch.equal(scores.argmax(-1)[clear], in_16_bits.argmax(-1)[clear])


@pytest.mark.parametrize("seed", range(4))
def test_bfloat16_activations_are_nearer_to_float32_than_those_of_transformers(
    seed: int, fast_kernels: Kernels, tiny: Any, tmp_path: Path
) -> None:
    values = {**random_config(seed + 300, tiny.values), "dtype": "bfloat16"}
    values.pop("torch_dtype", None)
    oracle = tiny.build_oracle(values, seed)
    path = tiny.write_checkpoint(tmp_path, values, oracle, dtype=torch.bfloat16)
    tokens = list(range(1, 20))
    in_float32 = oracle_scores(oracle, "Qwen2MoeForCausalLM", tokens)

    scores = tiny.engine(path, dtype="bfloat16", kernels=fast_kernels).scores(tokens)

    assert not torch.equal(scores, tiny.engine(path, kernels=fast_kernels).scores(tokens))
    tiny.cast_parameters(oracle, torch.bfloat16)
    in_bfloat16 = oracle_scores(oracle, "Qwen2MoeForCausalLM", tokens).float()
    assert (scores - in_float32).norm() < (in_bfloat16 - in_float32).norm()
