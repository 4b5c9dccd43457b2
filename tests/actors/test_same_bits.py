"""Logits are the same bits alone and in any batch, for any chunking, local or on 1 to 4 shards over each transport, and
before and after a recovery: for float32, bfloat16 with activations of either kind, and int8."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from actors.membership import RouterMembership
from actors.remote_exchange import RemoteExchange
from model.kernels import REFERENCE_KERNELS, select_kernels
from tests.actors.conftest import CPU, PATIENT, ThreadMesh, placed
from tests.model.conftest import TinyEngine, TinySequence
from tests.tiny import prompt_of, write_tiny_model
from tests.waiting import wait_until

STORAGES: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "float32": ({}, {}),
    "bfloat16": ({"torch_dtype": "bfloat16"}, {}),
    "bfloat16_activations": ({}, {"dtype": "bfloat16"}),
    "int8": ({}, {"quantization": "int8"}),
}
PROMPTS = [prompt_of(seed, length) for seed, length in enumerate((1, 9, 33, 61, 90))]


@pytest.fixture(scope="module", params=STORAGES)
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TinyEngine]:
    """All experts in this process, and the directory, dtype and quantization that it was made of."""
    kernels = select_kernels()
    if kernels == REFERENCE_KERNELS:
        pytest.skip("no native kernels here: they need a C compiler and AVX2")
    values, options = STORAGES[request.param]
    path = write_tiny_model(tmp_path_factory.mktemp(request.param), **values)
    made = TinyEngine(path, block_size=16, kernels=kernels, **options)
    made.options = options
    gc.freeze()  # each group's end collects garbage: not among all of torch and transformers
    yield made
    gc.unfreeze()


@pytest.fixture(scope="module")
def alone(engine: TinyEngine) -> list[Tensor]:
    """Logits of each prompt by itself, in one chunk."""
    with torch.inference_mode():
        return [engine.scores(prompt) for prompt in PROMPTS]


def in_random_batches(engine: TinyEngine, seed: int, after_step: Any = lambda step: None) -> list[Tensor]:
    """The same logits from prompts that go on in chunks of random lengths, together with whoever is there."""
    rng = random.Random(seed)
    sequences = [TinySequence(list(prompt)) for prompt in PROMPTS]
    parts: list[list[Tensor]] = [[] for _ in sequences]
    step = 0
    while unfinished := [i for i, s in enumerate(sequences) if s.num_computed < len(s.tokens)]:
        chosen = rng.sample(unfinished, rng.randint(1, len(unfinished)))
        chunks = []
        for i in chosen:
            left = len(sequences[i].tokens) - sequences[i].num_computed
            chunks.append((sequences[i], min(rng.choice([1, 1, 2, 7, 30]), left)))
        for i, hidden in zip(chosen, engine.hidden(chunks), strict=True):
            parts[i].append(hidden)
        step += 1
        after_step(step)
    assert engine.head is not None
    return [engine.head.forward(torch.cat(part)) for part in parts]


def assert_same_bits(found: list[Tensor], expected: list[Tensor]) -> None:
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@torch.inference_mode()
def test_batchmates_and_chunks_do_not_show(engine, alone):
    for seed in range(3):
        assert_same_bits(in_random_batches(engine, seed), alone)


@torch.inference_mode()
@pytest.mark.parametrize("transport", ["host", "star", "all_to_all"])
def test_shards_transports_epochs_and_a_recovery_do_not_show(engine, alone, transport):
    """One run for each number of shards; the next number comes in the middle of it, and in the last one a loss."""
    mesh = ThreadMesh(engine.checkpoint.directory, timeouts=PATIENT, **engine.options)
    local = engine.exchange
    exchange: RemoteExchange
    membership = RouterMembership(
        mesh,
        router_id="router",
        host="127.0.0.1",
        transport=transport,
        device=CPU,
        timeouts=PATIENT,
        live_epoch=lambda: exchange.epoch,
    )
    exchange = RemoteExchange(
        membership, num_experts=8, hidden_size=64, timeouts=PATIENT, device=CPU, clock=time.monotonic
    )
    placement = placed(mesh, 1)
    mesh.publish(placement)
    membership.start()
    try:
        exchange.begin_step()
        engine.exchange = exchange
        for num_shards in range(1, 5):

            def change(step: int, num_shards: int = num_shards) -> None:
                nonlocal placement
                if step == 4 and num_shards < 4:
                    placement = placed(mesh, num_shards + 1)
                    epoch = mesh.publish(placement).epoch
                    wait_until(lambda: (c := membership.newest()) is not None and c.view.epoch == epoch)
                elif step == 4:
                    mesh.shards["shard-1"].keep_only([])
                exchange.begin_step()

            mesh.on_report = lambda epoch, suspects: mesh.heal(placement, suspects)
            assert_same_bits(in_random_batches(engine, num_shards, change), alone)
        assert exchange.num_recoveries == 1 and exchange.epoch == 5
    finally:
        engine.exchange = local
        exchange.close()
        membership.close()
