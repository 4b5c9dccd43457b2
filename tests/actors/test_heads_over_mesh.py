"""The four heads over real routers and shards, against transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from actors.request import PoolRequest
from actors.router import Router
from cluster.placement import spread_evenly
from model.config import ModelConfig
from tests.actors.conftest import Outputs, ThreadMesh, ask
from tests.random_config import ARCHITECTURES, random_config
from tests.tiny import VALUES, prompt_of, write_tiny_model

PAD = 1


def write_random_model(path: Path, architecture: str, seed: int) -> Any:
    """A random configuration that has experts; -> transformers' model of it."""
    config_seed = next(s for s in range(100 * seed, 100 * seed + 99) if random_config(s, VALUES)["num_experts"] >= 3)
    values = {**random_config(config_seed, VALUES), "vocab_size": 320, "mlp_only_layers": [], "decoder_sparse_step": 1}
    values |= {"architectures": [architecture], "pad_token_id": PAD, "max_position_embeddings": 64}
    write_tiny_model(path, seed, **values)
    return getattr(transformers, architecture).from_pretrained(path, dtype=torch.float32).eval()


def pool(router: Router, outputs: Outputs, prompt: list[int], tokens: Any) -> Tensor:
    name = f"pool-{len(prompt)}"
    router.engine.submit("test", PoolRequest(request_id=name, prompt_ids=tuple(prompt), head="tiny", tokens=tokens))
    return outputs.rows(name)


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_scores_over_a_mesh_equal_those_of_transformers(
    architecture: str, num_shards: int, seed: int, start_router: Any, tmp_path: Path
) -> None:
    oracle = write_random_model(tmp_path, architecture, seed)
    config = ModelConfig.from_directory(tmp_path)
    mesh = ThreadMesh(tmp_path)
    nodes = {mesh.add_shard(f"shard-{i}").shard_id: f"node-{i}" for i in range(num_shards)}
    mesh.publish(spread_evenly(moe_layers=config.moe_layers, num_experts=config.num_experts, nodes=nodes))
    router, outputs = start_router(mesh, model=tmp_path)
    prompt = prompt_of(seed, 40)
    with torch.no_grad():
        expected = oracle(torch.tensor([prompt]))

    if architecture == "Qwen2MoeForCausalLM":
        ask(router.engine, "text", prompt, 1, prompt_logprobs=0)
        logprobs = next(chunk.prompt_logprobs for chunk in outputs.wait("text") if chunk.prompt_logprobs)
        scores = torch.tensor([entries[0][1] for entries in logprobs[1:]])
        wanted = expected.logits[0, :-1].log_softmax(-1).gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
    elif architecture == "Qwen2MoeForSequenceClassification":
        scores, wanted = pool(router, outputs, prompt, "last"), expected.logits
    elif architecture == "Qwen2MoeForTokenClassification":
        scores, wanted = pool(router, outputs, prompt, "all"), expected.logits[0]
    else:
        scores = pool(router, outputs, prompt, "all")
        wanted = torch.stack((expected.start_logits[0], expected.end_logits[0]), dim=-1)

    torch.testing.assert_close(scores, wanted, atol=1e-4, rtol=0)
    assert all(shard.info()["tokens"] > 0 for shard in mesh.shards.values())


@pytest.mark.parametrize("prompt", [[5, 9, 7, PAD, PAD], [PAD, 5, PAD, 7, PAD], [5, 9], [PAD, PAD, PAD]])
def test_a_text_is_classified_by_its_last_token_that_is_not_padding(
    prompt: list[int], start_router: Any, tmp_path: Path
) -> None:
    oracle = write_random_model(tmp_path, "Qwen2MoeForSequenceClassification", 1)
    router, outputs = start_router(model=tmp_path)
    with torch.no_grad():
        expected = oracle(torch.tensor([prompt])).logits
    torch.testing.assert_close(pool(router, outputs, prompt, "last"), expected, atol=1e-4, rtol=0)


def test_a_long_text_holds_no_more_sliding_blocks_than_its_window_needs(start_router: Any, tmp_path: Path) -> None:
    window, block_size = 24, 8
    write_tiny_model(tmp_path, sliding_window=window)
    router, outputs = start_router(model=tmp_path, block_size=block_size, prefix_caching=False)
    full, sliding = router.engine.scheduler.blocks.pools
    most = {"full": 0, "sliding": 0}
    commit = router.engine.scheduler.commit

    def watch(work: Any) -> None:
        commit(work)
        most["full"] = max(most["full"], full.num_used)
        most["sliding"] = max(most["sliding"], sliding.num_used)

    router.engine.scheduler.commit = watch
    ask(router.engine, "long", prompt_of(0, 300), 100)
    assert len(outputs.tokens("long")) == 100

    assert most["full"] == 50  # of 8 tokens: 300 of the prompt and 99 of the answer went through
    assert most["sliding"] == window // block_size + 1  # a window that starts inside a block ends in one more
    assert (full.num_used, sliding.num_used) == (0, 0)
