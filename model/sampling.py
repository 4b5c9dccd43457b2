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

from model.candidates import chunk_maxima, first_argmax, top_candidates
from model.logit_edits import edit_logits
from model.logprobs import TokenLogprob, row_mass, token_logprobs
from model.random_bits import gumbels, row_streams
from model.sampler_state import SamplingRow
from model.sampling_params import SamplingParams
from model.tail import TAIL_ID, HeadRow, draw_with_tail

_HEAD = 256  # a head holds at least so many tokens, if so many are allowed
_EVERY_TOKEN = 2**31
_BROKEN = "logits must be finite, got {}: the model's arithmetic failed for this request."


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
            if not entries:  # broken only where the edits put something else
                errors[idx] = _BROKEN.format("NaN or infinity")
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
        return _BROKEN.format(largest_logit)
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rules:
    """The truncation rules of the rows, as columns [R, 1]."""

    top_k: Tensor  # int64; without a rule, more than any vocabulary
    top_p: Tensor  # float64; without a rule, infinite
    min_p: Tensor  # float64

    @classmethod
    def of(cls, params: list[SamplingParams], device: torch.device) -> _Rules:
        return cls(
            top_k=torch.tensor([[p.top_k or _EVERY_TOKEN] for p in params], device=device),
            top_p=_column([p.top_p if p.top_p < 1 else math.inf for p in params], device),
            min_p=_column([p.min_p for p in params], device),
        )


def _draw(logits_RV: Tensor, maxima_RC: Tensor, rows: list[SamplingRow]) -> list[int]:
    """Tokens for rows that are not greedy and whose logits are sound."""
    device, params = logits_RV.device, [row.state.params for row in rows]
    rules = _Rules.of(params, device)
    head = top_candidates(logits_RV, maxima_RC, _HEAD)
    largest_R1 = head.logits_RW[:, :1]
    inverse_R1 = 1 / _column([p.temperature for p in params], device)
    z_RW = (head.logits_RW.double() - largest_R1.double()) * inverse_R1
    weights_RW = z_RW.exp()
    counts_R1 = head.counts_R[:, None]
    last_R1 = weights_RW.gather(1, counts_R1 - 1)
    has_tail_R1 = head.has_rest_R[:, None] & (rules.top_k > counts_R1) & (last_R1 >= rules.min_p)
    mass_R1 = weights_RW.new_zeros(len(rows), 1)
    with_tail: list[int] = has_tail_R1.flatten().nonzero().flatten().tolist()
    if with_tail:
        inverse = inverse_R1[with_tail, 0].float()
        mass_R1[with_tail, 0] = row_mass(_take(logits_RV, with_tail), largest_R1[with_tail, 0], inverse)
    kept_RW, tail_bound_R1 = _keep(weights_RW, last_R1, counts_R1, mass_R1, rules)
    streams = row_streams([p.seed for p in params], [row.state.position for row in rows], device)
    noise = gumbels(streams, torch.cat([head.ids_RW, torch.full_like(counts_R1, TAIL_ID)], dim=1))
    scores_RW = (z_RW + noise[:, :-1]).masked_fill_(~kept_RW, float("-inf"))
    best_R1, best_at_R1 = scores_RW.max(1, keepdim=True)
    tokens: list[int] = head.ids_RW.gather(1, best_at_R1).flatten().tolist()
    needs_tail_R1 = has_tail_R1 & (tail_bound_R1.log() + noise[:, -1:] >= best_R1)
    for idx in needs_tail_R1.flatten().nonzero().flatten().tolist():
        count = int(head.counts_R[idx])
        tokens[idx] = draw_with_tail(
            logits_RV[idx],
            HeadRow(ids_W=head.ids_RW[idx, :count], scores_W=(z_RW + noise[:, :-1])[idx, :count]),
            params[idx],
            (streams[0][idx : idx + 1], streams[1][idx : idx + 1]),
        )
    return tokens


def _keep(
    weights_RW: Tensor, last_R1: Tensor, counts_R1: Tensor, mass_R1: Tensor, rules: _Rules
) -> tuple[Tensor, Tensor]:
    """Which of the head's tokens are kept, and an upper bound of the kept mass beyond it.

    weights are exp((logit - largest) / temperature), last_R1 the head's last; mass_R1 is their sum over all tokens, or
    0 where min_p and top_k keep nothing beyond the head. An infinite bound says that the head can't tell: top_p is a
    share of what min_p or top_k leave, and they cut beyond the head.
    """
    ranks_W = torch.arange(weights_RW.shape[1], device=weights_RW.device)
    kept_RW = (ranks_W < torch.minimum(rules.top_k, counts_R1)) & (weights_RW >= rules.min_p)
    kept_weights_RW = torch.where(kept_RW, weights_RW, 0.0)
    cumulated_RW = kept_weights_RW.cumsum(1)
    head_mass_R1 = cumulated_RW[:, -1:]
    total_R1 = torch.maximum(mass_R1, head_mass_R1)
    nucleus_R1 = rules.top_p * total_R1
    kept_RW &= (cumulated_RW - kept_weights_RW) < nucleus_R1
    by_top_k_R1 = (rules.top_k - counts_R1) * last_R1
    by_top_p_R1 = nucleus_R1 - head_mass_R1 + last_R1  # the token that reaches top_p is kept as well
    bound_R1 = torch.minimum(torch.minimum(total_R1 - head_mass_R1, by_top_k_R1), by_top_p_R1)
    bound_R1 = torch.where(head_mass_R1 < nucleus_R1, bound_R1, 0.0)
    is_cut_R1 = (rules.min_p > 0) | (rules.top_k < _EVERY_TOKEN)
    return kept_RW, torch.where(is_cut_R1 & rules.top_p.isfinite(), math.inf, bound_R1)


def _column(values: list[float], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device=device)[:, None]
