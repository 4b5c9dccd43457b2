"""What each weight format costs in memory and in accuracy, as a markdown table.

    python -m tests.bench.quantization --model deploy/demo/model --text held-out.txt
    python -m tests.bench.quantization --random small

Bytes are those of the tensors that a router (everything but the routed experts) and all shards together (the routed
experts) hold after loading, in the layout of this machine's kernels. Distributions of the next token are compared with
those of the float32 reference in plain torch: mean KL divergence in nats, perplexity, and how often the most probable
token is the same. GPTQ stands for weights rounded to the nearest without calibration, which only shows the format.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.checkpoint import Checkpoint
from model.config import ModelConfig
from model.decoder import Decoder
from model.experts import ExpertWeights
from model.forward_batch import BlockTable, ForwardBatch
from model.heads import Head
from model.kernels import REFERENCE_KERNELS, Kernels, select_kernels
from model.kv_cache import KVCache
from model.load import load_decoder, load_expert, load_head
from model.moe import LocalExchange
from model.tokenizer import Tokenizer
from tests.gptq import write_gptq
from tests.random_checkpoint import write_random_checkpoint

WINDOW_TOKENS, BLOCK_SIZE = 512, 16
GPTQ_GROUP = 32  # divides the demo's 96 inputs; published checkpoints have 128
RANDOM: Mapping[str, dict[str, Any]] = {
    "small": {
        "vocab_size": 16384,
        "hidden_size": 1024,
        "moe_intermediate_size": 704,
        "shared_expert_intermediate_size": 2816,
        "num_hidden_layers": 4,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "dtype": "bfloat16",
    }
}


@dataclass(frozen=True)
class Loaded:
    """A whole model in one process."""

    config: ModelConfig
    decoder: Decoder
    head: Head
    experts: dict[tuple[int, int], ExpertWeights]

    @classmethod
    def from_directory(
        cls, path: Path, kernels: Kernels, quantization: str | None = None, dtype: str | None = None
    ) -> Loaded:
        config = ModelConfig.from_directory(path)
        config = config if dtype is None else dataclasses.replace(config, dtype=dtype)
        checkpoint = Checkpoint(path)
        decoder = load_decoder(checkpoint, config, quantization, kernels=kernels)
        head = load_head(checkpoint, config, quantization, decoder=decoder, kernels=kernels)
        experts = {
            (layer_idx, expert_id): load_expert(checkpoint, config, layer_idx, expert_id, quantization, kernels=kernels)
            for layer_idx in config.moe_layers
            for expert_id in range(config.num_experts)
        }
        return cls(config, decoder, head, experts)

    @property
    def router_bytes(self) -> int:
        decoder = self.decoder
        return resident_bytes(decoder.embedding, decoder.layers, decoder.norm_H, self.head)

    @property
    def shard_bytes(self) -> int:
        return resident_bytes(self.experts)

    def log_probabilities(self, windows: list[list[int]]) -> Iterator[Tensor]:
        """Of the next token at each place of each window: float32 [T, V]."""
        exchange = LocalExchange(self.experts, self.decoder.kernels)
        num_blocks = -(-WINDOW_TOKENS // BLOCK_SIZE)
        num_groups = len(self.config.kv_groups)
        cache = KVCache.allocate(self.config, num_blocks=[num_blocks] * num_groups, block_size=BLOCK_SIZE)
        for tokens in windows:
            places_T = torch.arange(len(tokens))
            table = BlockTable(block_ids_SB=torch.arange(num_blocks, dtype=torch.int32)[None], slots_T=places_T)
            batch = ForwardBatch(
                token_ids_T=torch.tensor(tokens),
                positions_T=places_T,
                rope_lens_T=torch.full_like(places_T, len(tokens)),
                query_starts=torch.tensor([0, len(tokens)], dtype=torch.int32),
                context_lens_S=torch.tensor([len(tokens)], dtype=torch.int32),
                tables=(table,) * num_groups,
            )
            yield self.head.forward(self.decoder.forward(batch, cache, exchange)).log_softmax(dim=-1)


def resident_bytes(*parts: Any) -> int:
    """Bytes of all different tensors in these values."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in _tensors(parts)}
    return sum(storages.values())


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _tensors(part)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _tensors(getattr(value, field.name))


def accuracy(model: Loaded, reference: list[Tensor], windows: list[list[int]]) -> tuple[float, float, float]:
    """Mean KL divergence from the reference, perplexity, and the share of equal most probable tokens."""
    divergence = nll = equal = 0.0
    num_places = num_predicted = 0
    for tokens, expected, found in zip(windows, reference, model.log_probabilities(windows), strict=True):
        divergence += float((expected.exp() * (expected - found)).double().sum())
        equal += int((expected.argmax(-1) == found.argmax(-1)).sum())
        num_places += len(tokens)
        nll -= float(found[:-1].gather(1, torch.tensor(tokens[1:])[:, None]).double().sum())
        num_predicted += len(tokens) - 1
    return divergence / num_places, math.exp(nll / num_predicted), equal / num_places


@torch.inference_mode()
def table(path: Path, scratch: Path, windows: list[list[int]]) -> Iterator[str]:
    """The rows of the table; without windows only those of memory."""
    kernels = select_kernels()
    write_gptq(path, scratch / "gptq", GPTQ_GROUP)
    variants: list[tuple[str, dict[str, Any]]] = [
        ("bfloat16", {"dtype": "bfloat16"}),
        ("float16", {"dtype": "float16"}),
        ("int8", {"quantization": "int8"}),
        ("int4", {"quantization": "int4"}),
        (f"GPTQ int4, groups of {GPTQ_GROUP}", {"path": scratch / "gptq"}),
        (f"GPTQ int4, groups of {GPTQ_GROUP}, with int8", {"path": scratch / "gptq", "quantization": "int8"}),
    ]
    yield "| weights | router MB | shards MB | of bfloat16 |" + accuracy_titles(bool(windows))
    yield "|---|---:|---:|---:|" + "---:|" * (4 * bool(windows))
    reference: list[Tensor] = []
    reference_perplexity = 0.0
    if windows:
        exact = Loaded.from_directory(path, REFERENCE_KERNELS)
        reference = list(exact.log_probabilities(windows))
        _, reference_perplexity, _ = accuracy(exact, reference, windows)
        yield f"| float32 reference | | | | 0 | {reference_perplexity:.3f} | | |"
    baseline = None
    for name, options in variants:
        model = Loaded.from_directory(**{"path": path, "kernels": kernels, **options})
        total = model.router_bytes + model.shard_bytes
        baseline = baseline or total
        row = f"| {name} | {model.router_bytes / 1e6:.2f} | {model.shard_bytes / 1e6:.2f} | {total / baseline:.3f} |"
        if windows:
            divergence, perplexity, equal = accuracy(model, reference, windows)
            change = perplexity / reference_perplexity - 1
            row += f" {divergence:.2g} | {perplexity:.3f} | {change:+.2%} | {equal:.1%} |"
        yield row


def accuracy_titles(wanted: bool) -> str:
    return " KL, nats | perplexity | change | same argmax |" if wanted else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="directory of a causal language model with tokenizer.json")
    parser.add_argument("--text", type=Path, help="held-out text; without it only memory is measured")
    parser.add_argument("--random", choices=sorted(RANDOM), help="instead of a model: random weights of this size")
    parser.add_argument("--windows", type=int, default=24, help=f"how much text, in windows of {WINDOW_TOKENS} tokens")
    arguments = parser.parse_args()
    if (arguments.model is None) == (arguments.random is None):
        parser.error("give either --model or --random")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        scratch = Path(directory)
        windows = []
        if arguments.random:
            model = write_random_checkpoint(scratch / "random", RANDOM[arguments.random])
        else:
            model = arguments.model
        if arguments.text and arguments.model:
            ids = Tokenizer.from_directory(model).encode(arguments.text.read_text("utf-8"))
            windows = [ids[i : i + WINDOW_TOKENS] for i in range(0, len(ids) - 1, WINDOW_TOKENS)][: arguments.windows]
        for row in table(model, scratch, windows):
            print(row, flush=True)


if __name__ == "__main__":
    main()
