"""Tiny Qwen2-MoE checkpoints written by transformers (the oracle), and a minimal engine that runs ours on them."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from actors.model_source import load_config
from model.checkpoint import Checkpoint
from model.experts import ExpertWeights
from model.forward_batch import BlockTable, ForwardBatch
from model.kernels import REFERENCE_KERNELS, Kernels, select_kernels
from model.kv_cache import KVCache
from model.load import Loader
from model.moe import Exchange, LocalExchange
from model.native.build import build

TINY: dict[str, Any] = {
    "model_type": "qwen2_moe",
    "architectures": ["Qwen2MoeForCausalLM"],
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 40,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 128,
}


@pytest.fixture(autouse=True)
def _one_thread_and_no_gradients() -> Iterator[None]:
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with torch.inference_mode():
        yield


def build_oracle(values: dict[str, Any], seed: int = 0) -> nn.Module:
    """The transformers model of a raw config.json, all parameters random (also those that start as 0 or 1)."""
    config = transformers.Qwen2MoeConfig.from_dict(json.loads(json.dumps(values)))
    oracle = getattr(transformers, values["architectures"][0])(config).eval().float()
    oracle.set_experts_implementation("eager")  # the grouped one needs aligned sizes
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in oracle.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(1 + 0.1 * noise if "norm" in name else noise * (0.5 if "gate.weight" in name else 0.2))
    return oracle


def write_checkpoint(
    path: Path,
    values: dict[str, Any],
    oracle: nn.Module,
    *,
    fused: bool = False,
    sharded: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Save the oracle's weights, and `values` as config.json just as they are (transformers would modernise them).

    The oracle keeps the rounded weights, computing in float32.
    """
    cast_parameters(oracle, dtype)
    oracle.save_pretrained(path, save_original_format=not fused, **({"max_shard_size": "20KB"} if sharded else {}))
    cast_parameters(oracle, torch.float32)
    (path / "config.json").write_text(json.dumps(values))
    return path


def cast_parameters(oracle: nn.Module, dtype: torch.dtype) -> None:
    """Not the buffers: `Module.to` would round RoPE's frequencies too, which transformers never does when loading."""
    for parameter in oracle.parameters():
        parameter.data = parameter.data.to(dtype)


class SplitExchange:
    """Experts in turn over shards: each gets the rows and pairs that are its own, as over a mesh, and the partial sums
    are added in float64 and rounded once."""

    def __init__(self, experts: dict[tuple[int, int], ExpertWeights], num_shards: int, kernels: Kernels) -> None:
        self._shards = [
            {key: expert for key, expert in experts.items() if key[1] % num_shards == shard}
            for shard in range(num_shards)
        ]
        self._run_experts = kernels.run_experts

    def dispatch(self, layer_idx: int, x_TH: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor) -> Tensor:
        total_TH = torch.zeros(x_TH.shape, dtype=torch.float64)
        for shard, held in enumerate(self._shards):
            rows_P, picks_P = (topk_ids_TK % len(self._shards) == shard).nonzero(as_tuple=True)
            rows_N, pair_rows_P = rows_P.unique(return_inverse=True)
            partial_NH = self._run_experts(
                x_TH[rows_N],
                pair_rows_P,
                topk_ids_TK[rows_P, picks_P],
                topk_weights_TK[rows_P, picks_P],
                {expert_id: expert for (layer, expert_id), expert in held.items() if layer == layer_idx},
            )
            total_TH[rows_N] += partial_NH
        return total_TH

    def combine(self, receipt: Tensor) -> Tensor:
        return receipt.float()


@dataclass
class TinySequence:
    """A sequence in the tiny engine: `num_computed` of its tokens have their keys in the cache."""

    tokens: list[int]
    num_computed: int = 0
    prompt_len: int = 0
    blocks: list[list[int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.prompt_len = len(self.tokens)


class TinyEngine:
    """Runs chunks of sequences through our model, giving sliding blocks back as soon as the window has passed them.

    Block 0 belongs to nobody and holds NaN, as do blocks that were given back: reading one shows at once.
    """

    def __init__(
        self,
        path: Path,
        *,
        block_size: int = 4,
        dtype: str | None = None,
        quantization: str | None = None,
        kernels: Kernels = REFERENCE_KERNELS,
    ) -> None:
        self.config = load_config(path, dtype)
        self.checkpoint = Checkpoint(path)
        loader = Loader(self.checkpoint, self.config, quantization, kernels=kernels)
        self.decoder = loader.decoder()
        self.head = None if self.config.head_kind == "base" else loader.head(self.decoder)
        self.experts = loader.experts()
        self.exchange: Exchange = LocalExchange(self.experts, kernels)
        num_blocks = 512
        self.cache = KVCache.allocate(
            self.config, num_blocks=[num_blocks] * len(self.config.kv_groups), block_size=block_size
        )
        for tensor in (*self.cache.keys, *self.cache.values):
            tensor.fill_(float("nan"))
        self._free = [list(range(num_blocks - 1, 0, -1)) for _ in self.config.kv_groups]

    def on_shards(self, num_shards: int) -> TinyEngine:
        """From now on, the experts are spread over so many shards."""
        self.exchange = SplitExchange(self.experts, num_shards, self.decoder.kernels)
        return self

    def hidden(self, chunks: Sequence[tuple[TinySequence, int]]) -> list[Tensor]:
        """One step: the next n tokens of each sequence. -> each sequence's hidden states [n, H]."""
        out_TH = self.decoder.forward([self.batch(chunks)], self.cache, self.exchange)
        for sequence, count in chunks:
            sequence.num_computed += count
            self._give_back(sequence)
        return list(out_TH.split([count for _, count in chunks]))

    def scores(self, tokens: Sequence[int], chunk: int | None = None) -> Tensor:
        """The head's outputs for every token of one prompt, computed in chunks of `chunk` tokens."""
        sequence = TinySequence(list(tokens))
        parts = []
        while left := len(sequence.tokens) - sequence.num_computed:
            parts += self.hidden([(sequence, min(left, chunk or left))])
        assert self.head is not None
        return self.head.forward(torch.cat(parts))

    def greedy(self, prompt: Sequence[int], num_tokens: int, chunk: int = 5) -> list[int]:
        """Prefill in chunks, then one token a step."""
        sequence = TinySequence(list(prompt))
        assert self.head is not None
        while len(sequence.tokens) < len(prompt) + num_tokens:
            left = len(sequence.tokens) - sequence.num_computed
            (hidden_TH,) = self.hidden([(sequence, min(left, chunk))])
            if left <= chunk:
                sequence.tokens.append(int(self.head.forward(hidden_TH[-1:]).argmax()))
        return sequence.tokens[len(prompt) :]

    def batch(self, chunks: Sequence[tuple[TinySequence, int]]) -> ForwardBatch:
        tokens, positions, rope_lens, starts = [], [], [], [0]
        for sequence, count in chunks:
            begin, end = sequence.num_computed, sequence.num_computed + count
            tokens += sequence.tokens[begin:end]
            positions += range(begin, end)
            rope_lens += [max(sequence.prompt_len, position + 1) for position in range(begin, end)]
            starts.append(starts[-1] + count)
            self._extend(sequence, end)
        return ForwardBatch(
            token_ids_T=torch.tensor(tokens),
            positions_T=torch.tensor(positions),
            rope_lens_T=torch.tensor(rope_lens),
            query_starts=torch.tensor(starts, dtype=torch.int32),
            context_lens_S=torch.tensor([s.num_computed + n for s, n in chunks], dtype=torch.int32),
            tables=tuple(self._table(group, chunks) for group in range(len(self.config.kv_groups))),
        )

    def _table(self, group: int, chunks: Sequence[tuple[TinySequence, int]]) -> BlockTable:
        size = self.cache.block_size
        width = max(len(sequence.blocks[group]) for sequence, _ in chunks)
        rows = [s.blocks[group] + [0] * (width - len(s.blocks[group])) for s, _ in chunks]
        slots = [
            sequence.blocks[group][position // size] * size + position % size
            for sequence, count in chunks
            for position in range(sequence.num_computed, sequence.num_computed + count)
        ]
        return BlockTable(block_ids_SB=torch.tensor(rows, dtype=torch.int32), slots_T=torch.tensor(slots))

    def _extend(self, sequence: TinySequence, length: int) -> None:
        sequence.blocks = sequence.blocks or [[] for _ in self.config.kv_groups]
        for group, blocks in enumerate(sequence.blocks):
            while len(blocks) * self.cache.block_size < length:
                blocks.append(self._free[group].pop())

    def _give_back(self, sequence: TinySequence) -> None:
        if self.config.sliding_window is None:
            return
        group = self.config.kv_groups.index("sliding")
        first_key = max(0, sequence.num_computed - self.config.sliding_window + 1)
        for index in range(first_key // self.cache.block_size):
            if block := sequence.blocks[group][index]:
                sequence.blocks[group][index] = 0
                self._free[group].append(block)
                for layer_idx in range(self.config.num_hidden_layers):
                    if self.config.layer_kv_group(layer_idx) == group:
                        self.cache.keys[layer_idx][block] = float("nan")
                        self.cache.values[layer_idx][block] = float("nan")


@dataclass(frozen=True)
class Tiny:
    """The pieces above, for tests to take as one fixture."""

    values: dict[str, Any]
    build_oracle: Callable[..., nn.Module]
    write_checkpoint: Callable[..., Path]
    cast_parameters: Callable[[nn.Module, torch.dtype], None]
    engine: type[TinyEngine]
    sequence: type[TinySequence]

    def make(self, path: Path, seed: int = 0, **overrides: Any) -> tuple[nn.Module, TinyEngine]:
        """The oracle and our engine for the tiny config with these overrides."""
        values = {**self.values, **overrides}
        oracle = self.build_oracle(values, seed)
        return oracle, TinyEngine(self.write_checkpoint(path, values, oracle))


@pytest.fixture
def tiny() -> Tiny:
    return Tiny(TINY, build_oracle, write_checkpoint, cast_parameters, TinyEngine, TinySequence)


@pytest.fixture(scope="session")
def fast_kernels() -> Kernels:
    """The native kernels, built when they aren't; the reference on a machine that can't have them."""
    with contextlib.suppress(RuntimeError):
        build()
    return select_kernels()
