"""Train the backbone and all heads together, on the processors of one machine.

    python -m deploy.demo.recipe.train --data DIR --run DIR --minutes 110 --processes 2

Each process is one data-parallel rank with one thread, which keeps its speed beside other
work. The learning rate follows progress = max(tokens / budget, time / budget): it warms up,
stays, and falls to zero, so that a run is annealed at its deadline on a machine of any
speed. Started again with the same --run, it goes on from the last checkpoint; `touch RUN/save`
asks for one now.
"""

import argparse
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from deploy.demo.recipe.data import Batch, Mixture, read_corpus, tokenizer_texts
from deploy.demo.recipe.model import CONFIG, DemoModel
from deploy.demo.recipe.muon import Muon
from deploy.demo.recipe.sources import fetch
from deploy.demo.recipe.tokenizer import train_tokenizer

TASK_WEIGHTS = {"topics": 0.2, "entities": 0.2, "answers": 0.4}
WARMUP, DECAY = 0.02, 0.45  # parts of the run
# Muon lets queries and keys grow until attention is one-hot, as this model has no norm on them. AdamW does not.
ADAM_MATRICES = ("q_proj.weight", "k_proj.weight", "gate.weight")
# Without these, the allocator gives every large activation back to the kernel and pays the page faults again.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "4000000000", "MALLOC_TRIM_THRESHOLD_": "8000000000"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    data: Path
    run: Path
    minutes: float
    max_tokens: float
    processes: int
    tokens_per_step: int
    muon_lr: float
    adam_lr: float
    checkpoint_minutes: float
    seed: int


def main(settings: Settings) -> None:
    settings.run.mkdir(parents=True, exist_ok=True)
    fetch(settings.data)
    tokenizer_file = settings.run / "tokenizer.json"
    if not tokenizer_file.exists():
        train_tokenizer(tokenizer_texts(read_corpus(settings.data)), CONFIG["vocab_size"]).save(str(tokenizer_file))
    os.environ.update(ALLOCATOR, OMP_NUM_THREADS="1")
    mp.spawn(train_rank, args=(settings,), nprocs=settings.processes)


def train_rank(rank: int, settings: Settings) -> None:
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    store = f"file://{settings.run.resolve()}/rendezvous-{os.getppid()}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=settings.processes)
    torch.manual_seed(settings.seed)
    run = Run(settings)
    tokenizer = Tokenizer.from_file(str(settings.run / "tokenizer.json"))
    mixture = Mixture(read_corpus(settings.data), tokenizer, seed=settings.seed + run.num_steps, rank=rank)
    began_s = saved_s = time.monotonic() - run.elapsed_s
    if run.elapsed_s:
        saved_s = time.monotonic()
    while run.progress < 1.0:
        metrics = run.step(mixture.batch(settings.tokens_per_step // settings.processes))
        elapsed = torch.tensor([time.monotonic() - began_s])
        dist.broadcast(elapsed, src=0)  # all ranks stop at the same step
        run.elapsed_s = elapsed.item()
        if rank == 0 and run.num_steps % 25 == 0:
            run.log(metrics)
        is_asked = rank == 0 and (settings.run / "save").exists()
        if is_asked or (rank == 0 and time.monotonic() - saved_s > 60 * settings.checkpoint_minutes):
            saved_s = time.monotonic()
            run.save()
            (settings.run / "save").unlink(missing_ok=True)
    if rank == 0:
        run.save()
    dist.barrier()
    dist.destroy_process_group()


class Run:
    """The model, its optimizers, and how far they have come."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.model = DemoModel()
        self.num_steps, self.num_tokens, self.elapsed_s = 0, 0, 0.0
        matrices, matrix_sizes, others = [], [], []
        for name, parameter in self.model.named_parameters():
            if parameter.ndim < 2 or "layers" not in name or name.endswith(ADAM_MATRICES):
                others.append(parameter)
                continue
            m, n = parameter.shape[-2:]
            matrices.append(parameter)
            matrix_sizes.append((m // 2, n) if name.endswith("gate_up_proj") else (m, n))
        self.muon = Muon(matrices, matrix_sizes, momentum=0.95, weight_decay=0.05)
        self.adam = torch.optim.AdamW(others, lr=settings.adam_lr, betas=(0.9, 0.95), weight_decay=0.0)
        self.checkpoint = settings.run / "checkpoint.pt"
        if self.checkpoint.exists():
            self.load()

    @property
    def progress(self) -> float:
        return max(self.num_tokens / self.settings.max_tokens, self.elapsed_s / (60 * self.settings.minutes))

    def step(self, batch: Batch) -> dict[str, float]:
        scale = min(1.0, self.progress / WARMUP, (1.0 - self.progress) / DECAY)
        scale = max(scale, 0.01)
        with torch.autocast("cpu", torch.bfloat16):
            losses = compute_losses(self.model, batch)
        task_loss = sum(weight * losses[task] for task, weight in TASK_WEIGHTS.items())
        (losses["lm"] + task_loss + CONFIG["router_aux_loss_coef"] * losses["balance"]).backward()
        average_gradients(self.model)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for group in self.adam.param_groups:
            group["lr"] = self.settings.adam_lr * scale
        self.adam.step()
        self.muon.step(self.settings.muon_lr * scale)
        self.model.zero_grad()
        self.num_steps += 1
        self.num_tokens += self.settings.tokens_per_step
        return {name: loss.item() for name, loss in losses.items()} | {"scale": scale}

    def log(self, metrics: dict[str, float]) -> None:
        line = {"step": self.num_steps, "tokens": self.num_tokens, "elapsed_s": round(self.elapsed_s, 1)}
        line |= {name: round(value, 4) for name, value in metrics.items()}
        print(json.dumps(line), flush=True)
        with (self.settings.run / "log.jsonl").open("a") as log:
            log.write(json.dumps(line) + "\n")

    def save(self) -> None:
        state = {
            "model": self.model.state_dict(),
            "muon": self.muon.state_dict(),
            "adam": self.adam.state_dict(),
            "num_steps": self.num_steps,
            "num_tokens": self.num_tokens,
            "elapsed_s": self.elapsed_s,
        }
        torch.save(state, self.checkpoint.with_suffix(".tmp"))
        self.checkpoint.with_suffix(".tmp").rename(self.checkpoint)

    def load(self) -> None:
        state = torch.load(self.checkpoint)
        self.model.load_state_dict(state["model"])
        self.muon.load_state_dict(state["muon"])
        self.adam.load_state_dict(state["adam"])
        self.num_steps, self.num_tokens = state["num_steps"], state["num_tokens"]
        self.elapsed_s = state["elapsed_s"]


def compute_losses(model: DemoModel, batch: Batch) -> dict[str, Tensor]:
    """Mean losses of the language model, of each head, and of the balance of the experts."""
    hidden_BTD, balance = model(batch.ids_BT, batch.document_BT)
    weights_N = batch.lm_weights_BT[:, :-1].flatten()
    predicted = model.lm_logits(hidden_BTD[:, :-1].flatten(0, 1))
    nll = F.cross_entropy(predicted.float(), batch.ids_BT[:, 1:].flatten(), reduction="none")
    hidden_ND = hidden_BTD.flatten(0, 1)
    return {
        "lm": (nll * weights_N).sum() / weights_N.sum(),
        "topics": label_loss(model.topics, hidden_ND, batch.topics),
        "entities": label_loss(model.entities, hidden_ND, batch.entities),
        "answers": answer_loss(model.answers, hidden_ND, batch.answers),
        "balance": balance,
    }


def label_loss(head: torch.nn.Linear, hidden_ND: Tensor, labels: list[tuple[int, int]]) -> Tensor:
    if not labels:
        return head.weight.sum() * 0.0  # every rank needs a gradient
    positions, targets = (torch.tensor(column) for column in zip(*labels, strict=True))
    return F.cross_entropy(head(hidden_ND[positions]).float(), targets)


def answer_loss(head: torch.nn.Linear, hidden_ND: Tensor, answers: list[tuple[int, int, int, int]]) -> Tensor:
    if not answers:
        return head.weight.sum() * 0.0 + head.bias.sum() * 0.0
    logits = head(hidden_ND).float()
    losses = []
    for begin, end, first, last in answers:
        start_nll = -logits[begin:end, 0].log_softmax(0)[first - begin]
        end_nll = -logits[begin:end, 1].log_softmax(0)[last - begin]
        losses.append((start_nll + end_nll) / 2)
    return torch.stack(losses).mean()


def average_gradients(model: DemoModel) -> None:
    parameters = list(model.parameters())
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    flat = torch.cat([parameter.grad.flatten() for parameter in parameters])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for parameter, gradient in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad.copy_(gradient.view_as(parameter))


def parse_settings() -> Settings:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="where the packages are unpacked")
    parser.add_argument("--run", type=Path, required=True, help="tokenizer, checkpoint and log")
    parser.add_argument("--minutes", type=float, default=110.0)
    parser.add_argument("--max-tokens", type=float, default=60e6)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--tokens-per-step", type=int, default=4096)
    parser.add_argument("--muon-lr", type=float, default=0.006)
    parser.add_argument("--adam-lr", type=float, default=3e-3)
    parser.add_argument("--checkpoint-minutes", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=0)
    return Settings(**vars(parser.parse_args()))


if __name__ == "__main__":
    main(parse_settings())
