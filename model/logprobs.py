"""Log-probabilities of the unmodified distribution, for the drawn tokens, the likeliest ones and the prompt's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from model.candidates import Candidates, chunk_maxima, top_candidates

TokenLogprob = tuple[int, float, int]  # token id, log-probability, rank (1 is the likeliest; ties by token id)
_BLOCK_ROWS = 8
_CHUNK = 128
_HEAD = 256  # drawn tokens are nearly always among so many, and then their rank is known


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
    """For each row the given token first, then the row's num_top[r] likeliest. A row with NaN or +inf gives []."""
    if not token_ids:
        return []
    maxima_RC = chunk_maxima(logits_RV)
    largest_R = maxima_RC.amax(1)
    is_sound = largest_R.isfinite().tolist()
    if not all(is_sound):
        sound = [idx for idx, holds in enumerate(is_sound) if holds]
        some = iter(token_logprobs(logits_RV[sound], [token_ids[i] for i in sound], [num_top[i] for i in sound]))
        return [next(some) if holds else [] for holds in is_sound]
    norm_R1 = (largest_R.double() + row_mass(logits_RV, largest_R, torch.ones_like(largest_R)).log())[:, None]
    tokens_R1 = torch.tensor(token_ids, dtype=torch.int64, device=logits_RV.device)[:, None]
    top = top_candidates(logits_RV, maxima_RC, max(_HEAD, *num_top))
    chosen = (logits_RV.gather(1, tokens_R1).double() - norm_R1).flatten().tolist()
    ranks = _ranks(logits_RV, token_ids, top)
    shown = [min(wanted, count) for wanted, count in zip(num_top, top.counts_R.tolist(), strict=True)]
    ids = top.ids_RW[:, : max(shown)].tolist()
    logprobs = (top.logits_RW[:, : max(shown)].double() - norm_R1).tolist()
    return [
        [
            (token_ids[r], chosen[r], ranks[r]),
            *zip(ids[r][: shown[r]], logprobs[r][: shown[r]], range(1, shown[r] + 1), strict=True),
        ]
        for r in range(len(token_ids))
    ]


def _ranks(logits_RV: Tensor, token_ids: Sequence[int], top: Candidates) -> list[int]:
    """1 + the number of tokens ordered before each row's token; a pass over the row only where it isn't a candidate."""
    in_head_RW = torch.arange(top.ids_RW.shape[1], device=logits_RV.device) < top.counts_R[:, None]
    tokens_R1 = torch.tensor(token_ids, dtype=torch.int64, device=logits_RV.device)[:, None]
    found_RW = (top.ids_RW == tokens_R1) & in_head_RW
    ranks: list[int] = (found_RW.int().argmax(1) + 1).tolist()
    for idx in (~found_RW.any(1)).nonzero().flatten().tolist():
        row_V, token = logits_RV[idx], token_ids[idx]
        num_before = (row_V[:token] >= row_V[token]).count_nonzero() + (row_V[token:] > row_V[token]).count_nonzero()
        ranks[idx] = int(num_before) + 1
    return ranks
