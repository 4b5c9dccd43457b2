"""Draws a step's tokens, one per row. A row's token depends on its own logits, parameters, seed and position only.

1. Masks, bans, biases and penalties are applied to the logits (logit_edits).
2. Greedy rows take the largest logit. For the others the head, the few hundred likeliest tokens, is found (candidates).
3. temperature, min_p, top_k and top_p are worked out on the head. Where they may keep tokens beyond it (the tail), the
   tail's mass, or a bound on it, stands for all of these tokens together.
4. Gumbel-max: the token with the largest log-weight + noise wins, the tail taking part as one more outcome. This draws
   exactly from the kept distribution, since the maximum over the tail's tokens is itself Gumbel around the log of their
   mass.
5. Only rows whose head didn't beat the bound look at the tail's tokens (tail).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.candidates import Candidates, chunk_maxima, first_argmax, top_candidates
from model.logit_edits import edit_logits
from model.logprobs import TokenLogprob, row_mass, token_logprobs
from model.random_bits import gumbels, row_streams
from model.sampler_state import SamplingRow
from model.sampling_params import SamplingParams
from model.tail import TAIL_ID, HeadRow, draw_with_tail

_HEAD = 256  # a head holds at least so many tokens, if so many are allowed


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleOutput:
    """token_ids[r] means nothing where errors[r] is a message; logprobs[r] is None unless the row asked for them."""

    token_ids: list[int]
    logprobs: list[list[TokenLogprob] | None]
    errors: list[str | None]


def sample(logits_RV: Tensor, rows: Sequence[SamplingRow]) -> SampleOutput:
    """Draw one token for each row of float32 logits, which are edited in place."""
    if len(logits_RV) != len(rows):
        raise ValueError(f"logits have {len(logits_RV)} rows for {len(rows)} requests; there must be one each.")
    if not rows:
        return SampleOutput(token_ids=[], logprobs=[], errors=[])
    logits_RV = logits_RV.contiguous()
    params = [row.state.params for row in rows]
    wanted = [idx for idx, item in enumerate(params) if item.logprobs is not None]
    raw_RV = _before_edits(logits_RV, rows, wanted)
    edit_logits(logits_RV, rows)
    maxima_RC = chunk_maxima(logits_RV)
    errors = [_error(value) for value in maxima_RC.amax(1).tolist()]
    token_ids: list[int] = first_argmax(logits_RV, maxima_RC).tolist()
    drawn = [idx for idx, item in enumerate(params) if not item.is_greedy and errors[idx] is None]
    if drawn:
        drawn_rows = [rows[idx] for idx in drawn]
        for idx, token in zip(drawn, _draw(_take(logits_RV, drawn), _take(maxima_RC, drawn), drawn_rows), strict=True):
            token_ids[idx] = token
    logprobs: list[list[TokenLogprob] | None] = [None] * len(rows)
    scored = [(at, idx) for at, idx in enumerate(wanted) if errors[idx] is None]
    if scored and raw_RV is not None:
        raw_rows = _take(raw_RV, [at for at, _ in scored])
        tops = [params[idx].logprobs or 0 for _, idx in scored]
        lists = token_logprobs(raw_rows, [token_ids[idx] for _, idx in scored], tops)
        for (_, idx), entries in zip(scored, lists, strict=True):
            logprobs[idx] = entries
    return SampleOutput(token_ids=token_ids, logprobs=logprobs, errors=errors)


def _before_edits(logits_RV: Tensor, rows: Sequence[SamplingRow], wanted: list[int]) -> Tensor | None:
    """The rows that want logprobs, copied only if any of them is going to be edited."""
    if not wanted:
        return None
    if len(wanted) == len(rows) and any(rows[idx].edits_logits for idx in wanted):
        return logits_RV.clone()
    return _take(logits_RV, wanted)


def _take(values: Tensor, indices: list[int]) -> Tensor:
    return values if len(indices) == len(values) else values[indices]


def _error(largest_logit: float) -> str | None:
    if largest_logit == float("-inf"):
        return "no token is allowed: grammar, allowed_token_ids, bad_words and min_tokens together forbid all of them."
    if not math.isfinite(largest_logit):
        return f"logits must be finite, got {largest_logit}: the model's arithmetic failed for this request."
    return None


def _draw(logits_RV: Tensor, maxima_RC: Tensor, rows: list[SamplingRow]) -> list[int]:
    """Tokens for rows that are not greedy and whose logits are sound."""
    device, params = logits_RV.device, [row.state.params for row in rows]
    head = top_candidates(logits_RV, maxima_RC, _HEAD)
    top_R = head.logits_RW[:, 0]
    inverse_R = 1 / _column([p.temperature for p in params], device)
    stream = row_streams([p.seed for p in params], [row.state.position for row in rows], device)
    z_RW = (head.logits_RW.double() - top_R.double()[:, None]) * inverse_R[:, None]
    weights_RW = z_RW.exp()
    has_tail_R = _tail_allowed(head, weights_RW, params)
    with_tail = has_tail_R.nonzero().flatten().tolist()
    mass_R = weights_RW.new_zeros(len(rows))
    if with_tail:
        inverse = inverse_R.float()
        mass_R[with_tail] = row_mass(_take(logits_RV, with_tail), top_R[with_tail], inverse[with_tail])
    kept_RW, tail_bound_R = _keep(head, weights_RW, mass_R, has_tail_R, params)
    scores_RW = (z_RW + gumbels(stream, head.ids_RW)).masked_fill_(~kept_RW, float("-inf"))
    best_R, best_at_R = scores_RW.max(1)
    tail_ids = torch.full((len(rows), 1), TAIL_ID, dtype=torch.int64, device=device)
    tail_scores_R = tail_bound_R.log() + gumbels(stream, tail_ids).squeeze(1)
    tokens: list[int] = head.ids_RW.gather(1, best_at_R[:, None]).squeeze(1).tolist()
    for idx in (tail_scores_R >= best_R).nonzero().flatten().tolist():
        count = int(head.counts_R[idx])
        ids_W = head.ids_RW[idx, :count]
        row_stream = (stream[0][idx : idx + 1], stream[1][idx : idx + 1])
        tokens[idx] = draw_with_tail(
            logits_RV[idx], HeadRow(ids_W=ids_W, z_W=z_RW[idx, :count]), params[idx], row_stream
        )
    return tokens


def _tail_allowed(head: Candidates, weights_RW: Tensor, params: list[SamplingParams]) -> Tensor:
    """Whether min_p and top_k may keep anything beyond the head, bool [R]."""
    device = weights_RW.device
    last_R = weights_RW.gather(1, (head.counts_R - 1)[:, None]).squeeze(1)
    top_k_R = torch.tensor([p.top_k or 2**31 for p in params], device=device)
    min_p_R = _column([p.min_p for p in params], device)
    return head.has_rest_R & (top_k_R > head.counts_R) & (last_R >= min_p_R)


def _keep(
    head: Candidates, weights_RW: Tensor, mass_R: Tensor, has_tail_R: Tensor, params: list[SamplingParams]
) -> tuple[Tensor, Tensor]:
    """Which of the head's tokens are kept, and an upper bound on the kept mass beyond it (0 where none is).

    An infinite bound says that the head can't tell: top_p's share is of a total that min_p or top_k cut in the tail.
    """
    device = weights_RW.device
    ranks_W = torch.arange(weights_RW.shape[1], device=device)
    top_k_R = torch.tensor([p.top_k or 2**31 for p in params], device=device)
    min_p_R, top_p_R = _column([p.min_p for p in params], device), _column([p.top_p for p in params], device)
    in_head_RW = ranks_W < head.counts_R[:, None]
    kept_RW = in_head_RW & (ranks_W < top_k_R[:, None]) & (weights_RW >= min_p_R[:, None])
    kept_weights_RW = torch.where(kept_RW, weights_RW, 0.0)
    cumulated_RW = kept_weights_RW.cumsum(1)
    head_mass_R = cumulated_RW[:, -1]
    total_R = torch.where(has_tail_R, torch.maximum(mass_R, head_mass_R), head_mass_R)
    uses_top_p_R = top_p_R < 1
    nucleus_R = torch.where(uses_top_p_R, top_p_R * total_R, float("inf"))
    kept_RW &= (cumulated_RW - kept_weights_RW) < nucleus_R[:, None]
    last_R = weights_RW.gather(1, (head.counts_R - 1)[:, None]).squeeze(1)
    bound_R = torch.minimum(total_R - head_mass_R, (nucleus_R - head_mass_R).clamp(min=0) + last_R)
    bound_R = torch.where(head_mass_R >= nucleus_R, 0.0, bound_R)
    is_cut_R = (min_p_R > 0) | (top_k_R < 2**31)
    bound_R = torch.where(uses_top_p_R & is_cut_R, float("inf"), bound_R)
    return kept_RW, torch.where(has_tail_R, bound_R, 0.0)


def _column(values: list[float], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device=device)
