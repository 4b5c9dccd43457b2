"""Bring a checkpoint whose layers have outgrown its embeddings back into proportion.

    python -m deploy.demo.recipe.rescale --run RUN

Muon with a high learning rate and no norm on queries and keys makes their logits so large that
attention is one-hot, and the layers' outputs so large that the embedding is lost in their sum.
The RMS norms hide the latter: dividing every output in the residual stream by the same factor
changes almost nothing but the embedding's share. The optimizers start again from nothing.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

from deploy.demo.recipe.model import CONFIG

QUERY_KEY_SINGULAR_VALUE = 1.2  # root mean square
OUTPUT_FACTOR = 1 / 60
INNER_FACTOR = 1 / 3  # from values and up projections into the outputs: changes nothing but proportions


@torch.no_grad()
def rescale(state: dict[str, Tensor]) -> None:
    """In place, for a training state dict."""
    for layer in range(CONFIG["num_hidden_layers"]):
        attention, mlp = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
        for projection in ("q_proj", "k_proj"):
            weight, bias = state[f"{attention}.{projection}.weight"], state[f"{attention}.{projection}.bias"]
            factor = QUERY_KEY_SINGULAR_VALUE * min(weight.shape) ** 0.5 / weight.norm()
            weight.mul_(factor)
            bias.mul_(factor)
        width = CONFIG["moe_intermediate_size"]
        for inner in (
            state[f"{attention}.v_proj.weight"],
            state[f"{attention}.v_proj.bias"],
            state[f"{mlp}.shared_expert.up_proj.weight"],
            state[f"{mlp}.experts.gate_up_proj"][:, width:],
        ):
            inner.mul_(INNER_FACTOR)
        for name in (f"{attention}.o_proj.weight", f"{mlp}.shared_expert.down_proj.weight", f"{mlp}.experts.down_proj"):
            state[name].mul_(OUTPUT_FACTOR / INNER_FACTOR)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="training run, stopped")
    file = parser.parse_args().run / "checkpoint.pt"
    checkpoint = torch.load(file)
    rescale(checkpoint["model"])
    del checkpoint["muon"], checkpoint["adam"]
    torch.save(checkpoint, file)


if __name__ == "__main__":
    main()
