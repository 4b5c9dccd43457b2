"""What each weight format costs in memory and in accuracy, as a markdown table.

    python -m tests.bench.quantization --model deploy/demo/model --text deploy/demo/held_out_sample.txt \\
        --card deploy/demo/MODEL_CARD.md
    python -m tests.bench.quantization --random small

Bytes are those of the tensors that a router (everything but the routed experts) and all shards together (the routed
experts) hold after loading, in the layout of this machine's kernels: with AVX-512, bfloat16 takes 1.5 bytes a weight
but for the embedding. Distributions of the next token are compared with those of the checkpoint's own weights in plain
torch and float32: mean KL divergence in nats, perplexity, and how often the most probable token is the same.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from deploy.demo.recipe.card import write_table
from model.checkpoint import Checkpoint
from model.config import ModelConfig
from model.decoder import Decoder
from model.experts import ExpertWeights
from model.forward_batch import BlockTable, ForwardBatch
from model.heads import Head
from model.kernels import REFERENCE_KERNELS, Kernels, select_kernels
from model.kv_cache import KVCache
from model.load import Loader
from model.moe import LocalExchange
from model.tokenizer import Tokenizer
from tests.random_checkpoint import write_random_checkpoint

WINDOW_TOKENS, BLOCK_SIZE = 512, 16
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
        cls,
        path: Path,
        kernels: Kernels,
        quantization: str | None = None,
        dtype: str | None = None,
        bfloat16_activations: bool = False,
    ) -> Loaded:
        config = ModelConfig.from_directory(path)
        config = dataclasses.replace(config, dtype=dtype or config.dtype, bfloat16_activations=bfloat16_activations)
        loader = Loader(Checkpoint(path), config, quantization, kernels=kernels)
        decoder = loader.decoder()
        return cls(config, decoder, loader.head(decoder), loader.experts())

    @property
    def router_bytes(self) -> int:
        decoder = self.decoder
        return resident_bytes(decoder.embedding, decoder.layers, decoder.norm, self.head)

    @property
    def shard_bytes(self) -> int:
        return resident_bytes(self.experts)

    def log_probabilities(self, windows: list[list[int]]) -> Iterator[Tensor]:
        """Of the next token at each place of each window: float32 [T, V]."""
        exchange = LocalExchange(self.experts, self.decoder.kernels)
        num_blocks = -(-WINDOW_TOKENS // BLOCK_SIZE)
        num_groups = len(self.config.kv_groups)
        kv_dtype = torch.bfloat16 if self.config.bfloat16_activations else torch.float32  # as of `serve`
        cache = KVCache.allocate(
            self.config, num_blocks=[num_blocks] * num_groups, block_size=BLOCK_SIZE, dtype=kv_dtype
        )
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
            yield self.head.forward(self.decoder.forward([batch], cache, exchange)).log_softmax(dim=-1)


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


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Against the reference."""

    divergence: float
    perplexity: float
    rise: float
    """Of the perplexity, as a share."""
    same_argmax: float


@dataclass(frozen=True, kw_only=True)
class Format:
    """What one format of the weights costs; `accuracy` is None where there was no text."""

    name: str
    router_bytes: int
    shard_bytes: int
    accuracy: Accuracy | None

    @property
    def num_bytes(self) -> int:
        return self.router_bytes + self.shard_bytes


@torch.inference_mode()
def measure(path: Path, scratch: Path, windows: list[list[int]]) -> list[Format]:
    """Each format of the checkpoint's weights; `scratch` gets a float32 copy of it."""
    kernels = select_kernels()
    models: dict[str, Callable[[], Loaded]] = {
        "float32": lambda: Loaded.from_directory(_widened(path, scratch), kernels),
        "bfloat16": lambda: Loaded.from_directory(path, kernels, dtype="bfloat16"),
        "bfloat16 activations": lambda: Loaded.from_directory(
            path, kernels, dtype="bfloat16", bfloat16_activations=True
        ),
        "float16": lambda: Loaded.from_directory(path, kernels, dtype="float16"),
        "int8": lambda: Loaded.from_directory(path, kernels, "int8"),
        "int4": lambda: Loaded.from_directory(path, kernels, "int4"),
    }
    reference = list(Loaded.from_directory(path, REFERENCE_KERNELS).log_probabilities(windows))
    found = []
    for name, load in models.items():
        model = load()
        accuracy = _accuracy(model, reference, windows) if windows else None
        found.append(
            Format(name=name, router_bytes=model.router_bytes, shard_bytes=model.shard_bytes, accuracy=accuracy)
        )
    return found


def _widened(path: Path, scratch: Path) -> Path:
    checkpoint = Checkpoint(path)
    target = scratch / "float32"
    target.mkdir()
    save_file({name: checkpoint.tensor(name).float() for name in checkpoint.names}, target / "model.safetensors")
    config = json.loads((path / "config.json").read_text("utf-8"))
    (target / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))
    return target


def _accuracy(model: Loaded, reference: list[Tensor], windows: list[list[int]]) -> Accuracy:
    divergence = equal = exact_nll = nll = 0.0
    for tokens, expected, found in zip(windows, reference, model.log_probabilities(windows), strict=True):
        divergence += float((expected.exp() * (expected - found)).double().sum())
        equal += int((expected.argmax(-1) == found.argmax(-1)).sum())
        targets = torch.tensor(tokens[1:])[:, None]
        exact_nll -= float(expected[:-1].gather(1, targets).double().sum())
        nll -= float(found[:-1].gather(1, targets).double().sum())
    num_places = sum(map(len, windows))
    num_predicted = num_places - len(windows)
    return Accuracy(
        divergence=divergence / num_places,
        perplexity=math.exp(nll / num_predicted),
        rise=math.expm1((nll - exact_nll) / num_predicted),
        same_argmax=equal / num_places,
    )


def read_windows(model: Path, text: Path, most: int) -> list[list[int]]:
    """The text's tokens in windows of WINDOW_TOKENS, no more than `most` of them."""
    ids = Tokenizer.from_directory(model).encode(text.read_text("utf-8"))
    return [ids[i : i + WINDOW_TOKENS] for i in range(0, len(ids) - 1, WINDOW_TOKENS)][:most]


def table(formats: list[Format]) -> list[str]:
    """The lines of a markdown table."""
    (float32,) = (one for one in formats if one.name == "float32")
    titles = ["weights", "router MB", "shards MB", "of 2 bytes each"]
    if float32.accuracy is not None:
        titles += ["KL, nats", "perplexity", "change", "same argmax"]
    lines = [" | ".join(titles), " | ".join(["---", *["---:"] * (len(titles) - 1)])]
    for one in formats:
        cells = [one.name, *(f"{value / 1e6:.2f}" for value in (one.router_bytes, one.shard_bytes))]
        cells.append(f"{2 * one.num_bytes / float32.num_bytes:.3f}")
        if (found := one.accuracy) is not None:
            change = round(100 * found.rise, 2) + 0.0  # never "-0.00"
            shown = f"{found.divergence:.1e}" if found.divergence > 1e-6 else "0"  # float32's rounding has either sign
            cells += [shown, f"{found.perplexity:.3f}", f"{change:+.2f} %"]
            cells.append(f"{found.same_argmax:.1%}")
        lines.append(" | ".join(cells))
    return [f"| {line} |" for line in lines]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="directory of a causal language model with tokenizer.json")
    parser.add_argument("--text", type=Path, help="held-out text; without it only memory is measured")
    parser.add_argument("--random", choices=sorted(RANDOM), help="instead of a model: random weights of this size")
    parser.add_argument("--windows", type=int, default=24, help=f"how much text, in windows of {WINDOW_TOKENS} tokens")
    parser.add_argument("--card", type=Path, help="also write the table into this file, between its marks")
    arguments = parser.parse_args()
    if (arguments.model is None) == (arguments.random is None):
        parser.error("give either --model or --random")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        scratch, windows = Path(directory), []
        if arguments.random:
            model = write_random_checkpoint(scratch / "random", RANDOM[arguments.random])
        else:
            model = arguments.model
            windows = read_windows(model, arguments.text, arguments.windows) if arguments.text else []
        lines = table(measure(model, scratch, windows))
    print("\n".join(lines))
    if arguments.card:
        write_table(arguments.card, "weight formats", lines)


if __name__ == "__main__":
    main()
