"""A tiny backbone with heads of every kind in directories of their own, as transformers makes them, and its oracles."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from actors.specs import SchedulerLimits
from deploy.served_model import ServedModel
from tests.deploy.real_routers import RealRouters
from tests.tiny import VALUES, write_tiny_model

TAGS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC", "MISC")
TOPICS = ("animal", "plant", "food", "place")
_CLASSIFIER = (transformers.Qwen2MoeForSequenceClassification, "Qwen2MoeForSequenceClassification", "score.weight")
_HEADS: dict[str, tuple[Any, str, str, dict[str, Any]]] = {
    "topics": (*_CLASSIFIER, {"id2label": dict(enumerate(TOPICS)), "problem_type": "single_label_classification"}),
    "flags": (*_CLASSIFIER, {"id2label": {0: "a", 1: "b", 2: "c"}, "problem_type": "multi_label_classification"}),
    "rating": (*_CLASSIFIER, {"id2label": {0: "stars", 1: "price"}, "problem_type": "regression"}),
    "judge": (*_CLASSIFIER, {"id2label": {0: "fits"}}),
    "entities": (
        transformers.Qwen2MoeForTokenClassification,
        "Qwen2MoeForTokenClassification",
        "score.weight score.bias",
        {"id2label": dict(enumerate(TAGS))},
    ),
    "answers": (
        transformers.Qwen2MoeForQuestionAnswering,
        "Qwen2MoeForQuestionAnswering",
        "qa_outputs.weight qa_outputs.bias",
        {"task_specific_params": {"question-answering": {"max_answer_len": 4}}},
    ),
}


@dataclass(frozen=True)
class TinyHeads:
    directory: Path
    oracles: dict[str, Any]
    tokenizer: Any  # transformers' view of the tokenizer, which all share

    @property
    def served(self) -> list[ServedModel]:
        model = ServedModel.from_directory(self.directory / "model", names=("tiny",))
        return [
            model,
            *(
                ServedModel.from_directory(
                    self.directory / name, names=(name,), tokenizer_directory=self.directory / "model"
                )
                for name in _HEADS
            ),
        ]

    def router(self) -> RealRouters:
        """One router with the backbone and all heads."""
        limits = SchedulerLimits(max_num_seqs=16, max_num_batched_tokens=64, max_queue=256)
        folders = {name: str(self.directory / name) for name in _HEADS}
        return RealRouters(self.directory / "model", "a", heads=folders, limits=limits)

    def outputs(self, name: str, ids: list[int]) -> torch.Tensor:
        """The oracle's logits for one text: [L], [T, L] or, for spans, [T, 2]."""
        with torch.no_grad():
            found = self.oracles[name](torch.tensor([ids]))
        if name == "answers":
            return torch.stack([found.start_logits[0], found.end_logits[0]], dim=-1)
        logits: torch.Tensor = found.logits[0]
        return logits

    def hidden(self, ids: list[int]) -> torch.Tensor:
        """[T, H], after the final norm."""
        with torch.no_grad():
            hidden: torch.Tensor = self.oracles["tiny"].model(torch.tensor([ids])).last_hidden_state[0]
        return hidden


def write_tiny_heads(directory: Path) -> TinyHeads:
    """`model` holds the backbone; each head is one small file, and an index that points to ../model."""
    backbone = write_tiny_model(directory / "model", max_position_embeddings=256)
    write_nfc_tokenizer(backbone)
    oracles: dict[str, Any] = {
        "tiny": transformers.Qwen2MoeForCausalLM.from_pretrained(backbone, dtype=torch.float32).eval()
    }
    names = [name for name in oracles["tiny"].state_dict() if name.startswith("model.")]
    generator = torch.Generator().manual_seed(5)
    for head, (kind, architecture, tensors, extra) in _HEADS.items():
        path = directory / head
        path.mkdir()
        values = {**VALUES, **extra, "architectures": [architecture], "max_position_embeddings": 256}
        values["pad_token_id"] = 0
        oracle = kind(transformers.Qwen2MoeConfig.from_dict(json.loads(json.dumps(values)))).eval().float()
        with torch.no_grad():
            base = oracle.model if hasattr(oracle, "model") else oracle.transformer
            base.load_state_dict(oracles["tiny"].model.state_dict())
            state = oracle.state_dict()
            for name in tensors.split():
                state[name].copy_(torch.randn(state[name].shape, generator=generator) * 0.4)
        save_file({name: state[name].clone() for name in tensors.split()}, path / "head.safetensors")
        weight_map = dict.fromkeys(names, "../model/model.safetensors") | dict.fromkeys(
            tensors.split(), "head.safetensors"
        )
        (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        (path / "config.json").write_text(json.dumps(values))
        oracles[head] = oracle
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(backbone)
    return TinyHeads(directory, oracles, tokenizer)


def write_nfc_tokenizer(path: Path) -> None:
    """As Qwen's: NFC, byte-level BPE, spaces with the word they precede; and a line break between two texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(split, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VALUES["vocab_size"],
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(["the whale and the sea, the ship and the storm " * 20], trainer)
    line_break = tokenizer.encode("\n").tokens[0]
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single="$A",
                pair=f"$A {line_break} $B:1",
                special_tokens=[(line_break, tokenizer.token_to_id(line_break))],
            ),
        ]
    )
    tokenizer.save(str(path / "tokenizer.json"))
    config = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps({**config, "model_max_length": 96}))


def likelihood(heads: TinyHeads, ids: list[int], ending: str) -> float:
    """log P(ending | ids)."""
    tail = heads.tokenizer(ending)["input_ids"]
    with torch.no_grad():
        logits = heads.oracles["tiny"](torch.tensor([ids + tail])).logits[0].log_softmax(-1)
    return math.fsum(float(logits[len(ids) - 1 + i, token]) for i, token in enumerate(tail))
