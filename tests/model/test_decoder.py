"""The decoder over a paged cache: chunking, batchmates and repetition must not show."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from model.kernels import REFERENCE_KERNELS, Kernels

SLIDING = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}
DYNAMIC = {"max_position_embeddings": 16, "rope_scaling": {"type": "dynamic", "factor": 2.0}}
LONGROPE = {
    "max_position_embeddings": 64,
    "rope_scaling": {
        "type": "longrope",
        "original_max_position_embeddings": 8,
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [2.0, 3.0, 4.0, 5.0],
    },
}
PROMPT = [int(x) for x in "314159265358979323846264338"]


@pytest.mark.parametrize("overrides", [{}, SLIDING, DYNAMIC, LONGROPE], ids=["full", "sliding", "dynamic", "longrope"])
@pytest.mark.parametrize("chunk", [1, 3, 8, 26])
def test_chunked_prefill_equals_one_shot(chunk: int, overrides: dict[str, Any], tiny: Any, tmp_path: Path) -> None:
    _, engine = tiny.make(tmp_path, **overrides)
    torch.testing.assert_close(engine.scores(PROMPT, chunk), engine.scores(PROMPT), atol=2e-5, rtol=0)


def test_a_batch_of_prefills_and_decodes_equals_each_alone(tiny: Any, tmp_path: Path) -> None:
    _, engine = tiny.make(tmp_path, **SLIDING)
    rng = random.Random(1)
    prompts = [[rng.randrange(61) for _ in range(length)] for length in (1, 5, 12, 23)]
    sequences = [tiny.sequence(list(prompt)) for prompt in prompts]
    outputs: list[list[torch.Tensor]] = [[] for _ in prompts]
    while True:
        chunks = [
            (sequence, min(rng.randint(1, 4), len(sequence.tokens) - sequence.num_computed))
            for sequence in sequences
            if sequence.num_computed < len(sequence.tokens)
        ]
        if not chunks:
            break
        for (sequence, _), hidden in zip(chunks, engine.hidden(chunks), strict=True):
            outputs[sequences.index(sequence)].append(hidden)

    for prompt, parts in zip(prompts, outputs, strict=True):
        alone = engine.scores(prompt)
        torch.testing.assert_close(engine.head.forward(torch.cat(parts)), alone, atol=2e-5, rtol=0)


def test_a_repeated_step_changes_nothing(tiny: Any, tmp_path: Path) -> None:
    _, engine = tiny.make(tmp_path)
    batch = engine.batch([(tiny.sequence(PROMPT), len(PROMPT))])
    first = engine.decoder.forward([batch], engine.cache, engine.exchange)
    again = engine.decoder.forward([batch], engine.cache, engine.exchange)
    assert torch.equal(first, again)


def test_a_replay_with_its_output_as_prompt_goes_on_with_the_same_tokens(tiny: Any, tmp_path: Path) -> None:
    _, engine = tiny.make(tmp_path, **SLIDING)
    tokens = engine.greedy(PROMPT[:8], 30)
    assert engine.greedy(PROMPT[:8] + tokens[:11], 19) == tokens[11:]


ALIGNED = {"hidden_size": 64, "head_dim": 16, "moe_intermediate_size": 32, "max_window_layers": 1}


@pytest.mark.parametrize("overrides", [{}, {**SLIDING, "sliding_window": 20}, DYNAMIC], ids=["full", "sliding", "dyn"])
@pytest.mark.parametrize("quantization", [None, "int8"])
def test_with_native_kernels_neither_chunks_nor_batchmates_change_a_bit(
    quantization: str | None, overrides: dict[str, Any], fast_kernels: Kernels, tiny: Any, tmp_path: Path
) -> None:
    if fast_kernels == REFERENCE_KERNELS:
        pytest.skip("no native kernels here: they need a C compiler and AVX2")
    values = {**tiny.values, **ALIGNED, **overrides}
    tiny.write_checkpoint(tmp_path, values, tiny.build_oracle(values))
    engine = tiny.engine(tmp_path, block_size=16, quantization=quantization, kernels=fast_kernels)
    rng = random.Random(2)
    prompts = [[rng.randrange(61) for _ in range(length)] for length in (1, 7, 40, 61, 18)]
    sequences = [tiny.sequence(list(prompt)) for prompt in prompts]
    parts: list[list[torch.Tensor]] = [[] for _ in prompts]
    while unfinished := [s for s in sequences if s.num_computed < len(s.tokens)]:
        chosen = rng.sample(unfinished, rng.randint(1, len(unfinished)))
        chunks = [(s, min(rng.choice([1, 2, 5, 19]), len(s.tokens) - s.num_computed)) for s in chosen]
        for (sequence, _), hidden in zip(chunks, engine.hidden(chunks), strict=True):
            parts[sequences.index(sequence)].append(hidden)

    for prompt, hidden_parts in zip(prompts, parts, strict=True):
        assert torch.equal(engine.head.forward(torch.cat(hidden_parts)), engine.scores(prompt))
