"""Give a model in training the attention that looks back for an earlier occurrence of a word.

    python -m deploy.demo.recipe.circuits --data DATA --run RUN

Answers, reading, and saying a word again all need an induction circuit (Olsson et al., 2022,
"In-context Learning and Induction Heads"). A model of this size finds it late: after ten
million tokens this one had none. So one is written into its weights, and training goes on:

    layer 1:  two heads look one and two tokens back, by their biases and RoPE alone,
              and write what stands there into directions that hardly vary
    layer 3:  two heads look for the token behind an earlier occurrence of the present one, and write
              its embedding: they match the present token with what layer 1 wrote, in those dimensions
              that RoPE hardly turns

What a layer knows of a token is found by ridge regression of the token's code (the whitened
principal components of the embeddings) on the layer's normed inputs. The loss rises by a tenth
at first, and is lower than before after a hundred steps.
"""

import argparse
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from deploy.demo.recipe.data import Batch, Mixture, read_corpus
from deploy.demo.recipe.model import CONFIG, DemoModel

HEAD_DIM = CONFIG["head_dim"]
PREVIOUS_LAYER, INDUCTION_LAYER, KV_HEAD = 1, 3, 0
DISTANCES = (1, 2)  # of the two query heads of the key-value head, in tokens
NUM_POSITION_FREQUENCIES = 8  # the fastest of RoPE: they tell neighbours apart
FIRST_MATCH_FREQUENCY = 20  # and slower: less than a radian over 200 tokens
POSITION_SCORE, MATCH_SCORE = 8.0, 5.0
PREVIOUS_SCALE, COPY_SCALE = 0.5, 4.0
NUM_CODE_DIMENSIONS = 64
RIDGE = 10.0


@torch.no_grad()
def write_previous_token_heads(model: DemoModel, batches: list[Batch]) -> None:
    residual_ND, normed_ND, ids_by_distance = layer_inputs(model, PREVIOUS_LAYER, batches)
    frequencies = CONFIG["rope_theta"] ** -(torch.arange(NUM_POSITION_FREQUENCIES) / (HEAD_DIM / 2))
    amplitude = (POSITION_SCORE * HEAD_DIM**0.5 / (1 - frequencies.cos()).sum()) ** 0.5
    half, used = HEAD_DIM // 2, NUM_POSITION_FREQUENCIES
    key_bias = torch.zeros(HEAD_DIM)
    key_bias[:used] = amplitude
    query_biases = torch.zeros(len(DISTANCES), HEAD_DIM)
    for bias, distance in zip(query_biases, DISTANCES, strict=True):  # the key, turned back by the distance
        bias[:used] = amplitude * (distance * frequencies).cos()
        bias[half : half + used] = -amplitude * (distance * frequencies).sin()
    value_weight, value_bias = regress(normed_ND, token_codes(model, NUM_CODE_DIMENSIONS)[ids_by_distance[0]])
    quiet_DR = quiet_directions(residual_ND, len(DISTANCES) * HEAD_DIM) * residual_ND.square().mean().sqrt()
    write_heads(
        model,
        PREVIOUS_LAYER,
        query=(torch.zeros(HEAD_DIM, CONFIG["hidden_size"]), query_biases),
        key=(torch.zeros(HEAD_DIM, CONFIG["hidden_size"]), key_bias),
        value=(value_weight, value_bias),
        outputs=[PREVIOUS_SCALE * part for part in quiet_DR.split(HEAD_DIM, dim=1)],
    )


@torch.no_grad()
def write_induction_heads(model: DemoModel, batches: list[Batch]) -> None:
    _, normed_ND, ids_by_distance = layer_inputs(model, INDUCTION_LAYER, batches)
    codes_VR = token_codes(model, NUM_CODE_DIMENSIONS)
    half = HEAD_DIM // 2
    matched = [*range(FIRST_MATCH_FREQUENCY, half), *range(half + FIRST_MATCH_FREQUENCY, HEAD_DIM)]
    projections = []
    for distance in (0, 1):  # a query is the present token, a key the token before
        weight, bias = torch.zeros(HEAD_DIM, CONFIG["hidden_size"]), torch.zeros(HEAD_DIM)
        read_weight, read_bias = regress(normed_ND, codes_VR[ids_by_distance[distance], : len(matched)])
        weight[matched], bias[matched] = MATCH_SCORE**0.5 * read_weight, MATCH_SCORE**0.5 * read_bias
        projections.append((weight, bias))
    (query_weight, query_bias), key = projections
    _, directions_RD = embedding_components(model)
    copy_DR = COPY_SCALE / len(DISTANCES) * directions_RD[:HEAD_DIM].T
    write_heads(
        model,
        INDUCTION_LAYER,
        query=(query_weight, query_bias.expand(len(DISTANCES), -1)),
        key=key,
        value=regress(normed_ND, codes_VR[ids_by_distance[0]]),
        outputs=[copy_DR] * len(DISTANCES),
    )


def write_heads(
    model: DemoModel,
    layer: int,
    *,
    query: tuple[Tensor, Tensor],
    key: tuple[Tensor, Tensor],
    value: tuple[Tensor, Tensor],
    outputs: list[Tensor],
) -> None:
    """Overwrite the key-value head and the query heads that share it; biases of queries are [heads, HEAD_DIM]."""
    attention = model.model.layers[layer].self_attn
    rows = slice(KV_HEAD * HEAD_DIM, (KV_HEAD + 1) * HEAD_DIM)
    for projection, (weight, bias) in ((attention.k_proj, key), (attention.v_proj, value)):
        projection.weight[rows], projection.bias[rows] = weight, bias
    for idx, (bias, output_DR) in enumerate(zip(query[1], outputs, strict=True)):
        first = (KV_HEAD * len(outputs) + idx) * HEAD_DIM
        rows = slice(first, first + HEAD_DIM)
        attention.q_proj.weight[rows], attention.q_proj.bias[rows] = query[0], bias
        attention.o_proj.weight[:, rows] = output_DR


def layer_inputs(model: DemoModel, layer: int, batches: list[Batch]) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The residual stream and its norm before a layer, [N, D] each, and the ids of 0 and 1 tokens before, [N] each."""
    seen: list[tuple[Tensor, Tensor]] = []
    hook = model.model.layers[layer].input_layernorm.register_forward_hook(
        lambda _module, inputs, output: seen.append((inputs[0], output))
    )
    for batch in batches:
        model(batch.ids_BT, batch.document_BT)
    hook.remove()
    residual_ND, normed_ND = (torch.cat([x[:, 1:].flatten(0, 1) for x in part]) for part in zip(*seen, strict=True))
    present = torch.cat([batch.ids_BT[:, 1:].flatten() for batch in batches])
    before = torch.cat([batch.ids_BT[:, :-1].flatten() for batch in batches])
    return residual_ND, normed_ND, [present, before]


def regress(inputs_ND: Tensor, targets_NR: Tensor) -> tuple[Tensor, Tensor]:
    """Weight [R, D] and bias [R] of the ridge regression."""
    with_one = torch.cat([inputs_ND, torch.ones(len(inputs_ND), 1)], dim=1)
    gram = with_one.T @ with_one + RIDGE * torch.eye(with_one.shape[1])
    solution = torch.linalg.solve(gram, with_one.T @ targets_NR)
    return solution[:-1].T, solution[-1]


def embedding_components(model: DemoModel) -> tuple[Tensor, Tensor]:
    embeddings_VD = model.model.embed_tokens.weight
    left_VD, _, directions_DD = torch.linalg.svd(embeddings_VD - embeddings_VD.mean(0), full_matrices=False)
    return left_VD * len(embeddings_VD) ** 0.5, directions_DD


def token_codes(model: DemoModel, num_dimensions: int) -> Tensor:
    """[V, num_dimensions], of unit variance in each."""
    return embedding_components(model)[0][:, :num_dimensions]


def quiet_directions(x_ND: Tensor, num_directions: int) -> Tensor:
    """[D, num_directions]: where x varies least."""
    return torch.linalg.svd(x_ND[:8192] - x_ND.mean(0), full_matrices=False)[2].flip(0)[:num_directions].T


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="where the packages are unpacked")
    parser.add_argument("--run", type=Path, required=True, help="its checkpoint is changed")
    arguments = parser.parse_args()
    checkpoint = arguments.run / "checkpoint.pt"
    state = torch.load(checkpoint)
    model = DemoModel()
    model.load_state_dict(state["model"])
    tokenizer = Tokenizer.from_file(str(arguments.run / "tokenizer.json"))
    mixture = Mixture(read_corpus(arguments.data), tokenizer, seed=state["num_steps"])
    batches = [mixture.batch(4096) for _ in range(3)]
    write_previous_token_heads(model, batches)
    write_induction_heads(model, batches)
    state["model"] = model.state_dict()
    torch.save(state, checkpoint)


if __name__ == "__main__":
    main()
