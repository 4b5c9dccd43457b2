"""Log-probabilities of the unmodified distribution, for the drawn tokens, the likeliest ones and the prompt's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from model.candidates import chunk_maxima, top_candidates

TokenLogprob = tuple[int, float, int]  # token id, log-probability, rank (1 is the likeliest; ties by token id)
_BLOCK_ROWS = 8
_CHUNK = 128


def row_mass(logits_RV: Tensor, maxima_R: Tensor, inverse_temperatures_R: Tensor) -> Tensor:
    """Sum over the vocabulary of exp((logit - maximum) / temperature), float64 [R].

    The order of the additions is fixed for a row: chunks of 128 in float32, then one after the other in float64.
    """
    num_rows, vocab_size = logits_RV.shape
    padded = -(-vocab_size // _CHUNK) * _CHUNK
    buffer = logits_RV.new_empty((min(_BLOCK_ROWS, num_rows), padded))
    masses = []
    for start in range(0, num_rows, _BLOCK_ROWS):  # a block stays in the cache for its three passes
        block = logits_RV[start : start + _BLOCK_ROWS]
        weights = buffer[: len(block)]
        weights[:, vocab_size:] = float("-inf")
        torch.sub(block, maxima_R[start : start + _BLOCK_ROWS, None], out=weights[:, :vocab_size])
        weights.mul_(inverse_temperatures_R[start : start + _BLOCK_ROWS, None]).exp_()
        masses.append(weights.view(len(block), -1, _CHUNK).sum(-1).double().cumsum(1)[:, -1])
    return torch.cat(masses)


def token_logprobs(logits_RV: Tensor, token_ids: Sequence[int], num_top: Sequence[int]) -> list[list[TokenLogprob]]:
    """For each row the given token first, then the row's num_top[r] likeliest. Logits must be finite or -inf."""
    device = logits_RV.device
    maxima_RC = chunk_maxima(logits_RV)
    top_R = maxima_RC.amax(1)
    mass_R = row_mass(logits_RV, top_R, torch.ones_like(top_R))
    norm_R = top_R.double() + mass_R.log()
    tokens_R1 = torch.tensor(token_ids, dtype=torch.int64, device=device)[:, None]
    logits_R1 = logits_RV.gather(1, tokens_R1)
    ids_RV = torch.arange(logits_RV.shape[1], device=device)
    is_before = (logits_RV > logits_R1) | ((logits_RV == logits_R1) & (ids_RV < tokens_R1))
    ranks = (is_before.sum(1) + 1).tolist()
    chosen = (logits_R1.squeeze(1).double() - norm_R).tolist()
    result = [[entry] for entry in zip(token_ids, chosen, ranks, strict=True)]
    most = max(num_top)
    if most > 0:
        top = top_candidates(logits_RV, maxima_RC, most)
        ids, counts = top.ids_RW[:, :most].tolist(), top.counts_R.tolist()
        values = (top.logits_RW[:, :most].double() - norm_R[:, None]).tolist()
        for row, count, row_ids, row_values, wanted in zip(result, counts, ids, values, num_top, strict=True):
            shown = min(wanted, count)
            row.extend(zip(row_ids[:shown], row_values[:shown], range(1, shown + 1), strict=True))
    return result
