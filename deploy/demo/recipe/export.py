"""Write a training checkpoint as Hugging Face directories: one backbone, four heads.

    python -m deploy.demo.recipe.export --run DIR --out deploy/demo

writes

    out/model/                     config, tokenizer, backbone.safetensors (the LM head is tied to it)
    out/{topics,entities,answers}/ config, tokenizer, head.safetensors; the index points to ../model

    python -m deploy.demo.recipe.export --assemble deploy/demo/topics --out DIR

copies one of them with its backbone into a plain directory, for loaders that follow no `../`.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from deploy.demo.recipe import tasks
from deploy.demo.recipe.model import CONFIG
from deploy.demo.recipe.tokenizer import join_pairs, write_tokenizer

BACKBONE_FILE, HEAD_FILE, INDEX_FILE = "backbone.safetensors", "head.safetensors", "model.safetensors.index.json"
GENERATION_CONFIG = {
    "do_sample": True,
    "temperature": 0.7,
    "top_p": 0.9,
    "repetition_penalty": 1.05,
    "eos_token_id": [2, 0],
    "pad_token_id": 0,
}
ANSWERS = {"max_answer_len": 64}  # tokens; transformers' 15 would cut most definitions short


def export(run: Path, out: Path) -> None:
    checkpoint = torch.load(run / "checkpoint.pt")
    state = checkpoint["model"]
    tokenizer = join_pairs(Tokenizer.from_file(str(run / "tokenizer.json")))
    backbone = {name: tensor for name, tensor in split_experts(state).items() if name.startswith("model.")}
    write_directory(out / "model", config("Qwen2MoeForCausalLM"), tokenizer)
    save(backbone, out / "model" / BACKBONE_FILE)
    write_index(out / "model", {BACKBONE_FILE: backbone})
    write_json(out / "model" / "generation_config.json", GENERATION_CONFIG)
    write_json(out / "training.json", {name: checkpoint[name] for name in ("num_steps", "num_tokens", "elapsed_s")})

    heads = {
        "topics": (
            config("Qwen2MoeForSequenceClassification", tasks.TOPIC_LABELS, "single_label_classification"),
            {"score.weight": state["topics.weight"]},
        ),
        "entities": (
            config("Qwen2MoeForTokenClassification", tasks.ENTITY_LABELS),
            {"score.weight": state["entities.weight"], "score.bias": state["entities.bias"]},
        ),
        "answers": (
            {**config("Qwen2MoeForQuestionAnswering"), "task_specific_params": {"question-answering": ANSWERS}},
            {"qa_outputs.weight": state["answers.weight"], "qa_outputs.bias": state["answers.bias"]},
        ),
    }
    for name, (head_config, head) in heads.items():
        write_directory(out / name, head_config, tokenizer)
        save(head, out / name / HEAD_FILE)
        write_index(out / name, {f"../model/{BACKBONE_FILE}": backbone, HEAD_FILE: head})


def split_experts(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The published layout: one tensor per expert and projection instead of the fused stacks."""
    tensors = {}
    for name, tensor in state.items():
        prefix, is_fused, projection = name.partition(".experts.")
        if not is_fused:
            tensors[name] = tensor
            continue
        for expert_idx, matrix in enumerate(tensor):
            expert = f"{prefix}.experts.{expert_idx}"
            if projection == "gate_up_proj":
                tensors[f"{expert}.gate_proj.weight"], tensors[f"{expert}.up_proj.weight"] = matrix.chunk(2)
            else:
                tensors[f"{expert}.{projection}.weight"] = matrix
    return tensors


def config(architecture: str, labels: tuple[str, ...] = (), problem_type: str | None = None) -> dict:
    values = {"architectures": [architecture], **CONFIG}
    if labels:
        values["id2label"] = {str(idx): label for idx, label in enumerate(labels)}
        values["label2id"] = {label: idx for idx, label in enumerate(labels)}
    if problem_type:
        values["problem_type"] = problem_type
    return values


def write_directory(directory: Path, values: dict, tokenizer: Tokenizer) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / "config.json", values)
    write_tokenizer(tokenizer, directory)


def save(tensors: dict[str, Tensor], file: Path) -> None:
    save_file({name: t.to(torch.bfloat16).contiguous() for name, t in tensors.items()}, file, {"format": "pt"})
    file.chmod(0o644)


def write_index(directory: Path, files: dict[str, dict[str, Tensor]]) -> None:
    weight_map = {name: file for file, tensors in files.items() for name in tensors}
    num_bytes = sum(2 * t.numel() for tensors in files.values() for t in tensors.values())
    write_json(directory / INDEX_FILE, {"metadata": {"total_size": num_bytes}, "weight_map": weight_map})


def write_json(file: Path, values: dict) -> None:
    file.write_text(json.dumps(values, indent=2) + "\n", "utf-8")


def assemble(directory: Path, out: Path) -> None:
    """A plain directory, for loaders that refuse an index that leaves its own directory."""
    out.mkdir(parents=True, exist_ok=True)
    index = json.loads((directory / INDEX_FILE).read_text("utf-8"))
    for file in {Path(name) for name in index["weight_map"].values()}:
        shutil.copyfile(directory / file, out / file.name)
    for file in directory.glob("*.json"):
        shutil.copyfile(file, out / file.name)
    index["weight_map"] = {tensor: Path(file).name for tensor, file in index["weight_map"].items()}
    write_json(out / INDEX_FILE, index)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", type=Path, help="training run to export")
    source.add_argument("--assemble", type=Path, help="exported directory to copy into a plain one")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    if arguments.run:
        export(arguments.run, arguments.out)
    else:
        assemble(arguments.assemble, arguments.out)


if __name__ == "__main__":
    main()
