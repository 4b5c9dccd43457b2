"""Draws a step's tokens, one per row. A row's token depends on its own logits, parameters, seed and position only.

1. Masks, bans, biases and penalties are applied to the logits (logit_edits).
2. Greedy rows take the largest logit.
3. For the others the tokens are in order, likeliest first and equals by rising id. temperature, min_p, top_k and top_p
   say how far into this order tokens are kept, and one uniform number times the kept mass falls on one of them.

`draw_tokens_reference` does 2 and 3 in torch. The head, the few hundred likeliest tokens, is found (candidates). Where
tokens beyond it may be kept, the kept mass is known to lie between two bounds; only where these disagree about the
token, or it lies beyond the head, are all tokens of the row looked at. The native kernel does it in another way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.candidates import chunk_maxima, first_argmax, ids_of_keys, order_keys, top_candidates
from model.logit_edits import edit_logits
from model.logprobs import TokenLogprob, row_mass, token_logprobs
from model.random_bits import uniforms
from model.sampler_state import SamplingRow
from model.sampling_params import SamplingParams

DrawTokens = Callable[[Tensor, Sequence[SamplingRow]], tuple[list[int], list[float]]]
"""`draw_tokens_reference` or its equal."""

_HEAD = 256  # a head holds at least so many tokens, if so many are allowed
_EVERY_TOKEN = 2**31
_BROKEN = "logits must be finite, got {}: the model's arithmetic failed for this request."


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleOutput:
    """token_ids[r] means nothing where errors[r] is a message; logprobs[r] is None unless the row asked for them."""

    token_ids: list[int]
    logprobs: list[list[TokenLogprob] | None]
    errors: list[str | None]


def sample(logits_RV: Tensor, rows: Sequence[SamplingRow], draw_tokens: DrawTokens | None = None) -> SampleOutput:
    """Draw one token for each row of float32 logits, which are edited in place. draw_tokens: the reference, or its
    equal."""
    if len(logits_RV) != len(rows):
        raise ValueError(f"logits have {len(logits_RV)} rows for {len(rows)} requests; there must be one each.")
    if not rows:
        return SampleOutput(token_ids=[], logprobs=[], errors=[])
    params = [row.state.params for row in rows]
    wanted = [idx for idx, item in enumerate(params) if item.logprobs is not None]
    raw_RV = _before_edits(logits_RV, rows, wanted)
    edit_logits(logits_RV, rows)
    token_ids, largest = (draw_tokens or draw_tokens_reference)(logits_RV, rows)
    errors = [_error(value) for value in largest]
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


def draw_tokens_reference(logits_RV: Tensor, rows: Sequence[SamplingRow]) -> tuple[list[int], list[float]]:
    """A token for each row, and its largest logit (NaN if it holds one). A token means nothing if that isn't finite."""
    logits_RV = logits_RV.contiguous()
    maxima_RC = chunk_maxima(logits_RV)
    largest: list[float] = maxima_RC.amax(1).tolist()
    token_ids: list[int] = first_argmax(logits_RV, maxima_RC).tolist()
    drawn = [idx for idx, row in enumerate(rows) if not row.state.params.is_greedy and math.isfinite(largest[idx])]
    if drawn:
        drawn_rows = [rows[idx] for idx in drawn]
        for idx, token in zip(drawn, _draw(_take(logits_RV, drawn), _take(maxima_RC, drawn), drawn_rows), strict=True):
            token_ids[idx] = token
    return token_ids, largest


def _draw(logits_RV: Tensor, maxima_RC: Tensor, rows: list[SamplingRow]) -> list[int]:
    """Tokens for rows that are not greedy and whose logits are sound."""
    device, params = logits_RV.device, [row.state.params for row in rows]
    top_k_R1 = torch.tensor([[p.top_k or _EVERY_TOKEN] for p in params], device=device)
    columns = torch.tensor([(p.top_p, p.min_p, 1 / p.temperature) for p in params], dtype=torch.float64, device=device)
    top_p_R1, min_p_R1, inverse_R1 = columns[:, :, None].unbind(1)

    head = top_candidates(logits_RV, maxima_RC, _HEAD)
    counts_R1, largest_R1 = head.counts_R[:, None], head.logits_RW[:, :1]
    weights_RW = ((head.logits_RW.double() - largest_R1.double()) * inverse_R1).exp()
    last_R1 = weights_RW.gather(1, counts_R1 - 1)
    ranks_W = torch.arange(weights_RW.shape[1], device=device)
    weights_RW = torch.where((ranks_W < top_k_R1) & (weights_RW >= min_p_R1), weights_RW, 0.0)
    cumulated_RW = weights_RW.cumsum(1)

    # The mass that top_k and min_p leave is that of the head, of all tokens, or something between.
    least_R1 = most_R1 = cumulated_RW[:, -1:]
    has_tail_R = (head.has_rest_R[:, None] & (top_k_R1 > counts_R1) & (last_R1 >= min_p_R1)).flatten()
    with_tail: list[int] = has_tail_R.nonzero().flatten().tolist()
    if with_tail:
        total_R1 = most_R1.clone()
        all_of_them = row_mass(_take(logits_RV, with_tail), largest_R1[with_tail, 0], inverse_R1[with_tail, 0].float())
        total_R1[with_tail, 0] = torch.maximum(all_of_them, total_R1[with_tail, 0])
        most_R1 = torch.minimum(total_R1, least_R1 + (top_k_R1 - counts_R1).clamp(min=0) * last_R1)
        is_cut_R1 = (min_p_R1 > 0) | (top_k_R1 < _EVERY_TOKEN)
        least_R1 = torch.where(is_cut_R1, least_R1, most_R1)

    uniforms_R1 = uniforms([p.seed for p in params], [row.state.position for row in rows], device)[:, None]
    low_R1, high_R1 = (
        _place(cumulated_RW, uniforms_R1, top_p_R1, mass_R1, step_R1)
        for mass_R1, step_R1 in ((least_R1, torch.zeros_like(last_R1)), (most_R1, last_R1))
    )
    is_known_R = ((low_R1 == high_R1) & (high_R1 < weights_RW.shape[1])).flatten()
    tokens: list[int] = head.ids_RW.gather(1, low_R1.clamp(max=weights_RW.shape[1] - 1)).flatten().tolist()
    for idx in (~is_known_R).nonzero().flatten().tolist():
        tokens[idx] = draw_from_all(logits_RV[idx], params[idx], uniforms_R1[idx])
    return tokens


def _place(cumulated_RW: Tensor, uniforms_R1: Tensor, top_p_R1: Tensor, mass_R1: Tensor, step_R1: Tensor) -> Tensor:
    """Where each row's uniform number falls, if top_k and min_p left this mass: an index into the head, W beyond it.

    The kept mass ends with the token that reaches top_p of it. Beyond the head that token isn't known: its weight is
    taken for `step`, and the mass can't exceed what there is."""
    goal_R1 = top_p_R1 * mass_R1
    reached_R1 = torch.searchsorted(cumulated_RW, goal_R1)
    in_head_R1 = reached_R1 < cumulated_RW.shape[1]
    by_head_R1 = cumulated_RW.gather(1, reached_R1.clamp(max=cumulated_RW.shape[1] - 1))
    kept_R1 = torch.where(in_head_R1, by_head_R1, torch.minimum(goal_R1 + step_R1, mass_R1))
    # The number times the mass may round up to the mass itself, hence the minimum.
    return torch.minimum(torch.searchsorted(cumulated_RW, uniforms_R1 * kept_R1, right=True), reached_R1)


def draw_from_all(logits_V: Tensor, params: SamplingParams, uniform_1: Tensor) -> int:
    """One row's token by the same rules over all tokens."""
    weights_V = ((logits_V.double() - logits_V.max().double()) / params.temperature).exp_()
    weights_V[weights_V < params.min_p] = 0
    keys_V = order_keys(logits_V, torch.arange(len(logits_V), device=logits_V.device))
    num = min(params.top_k or len(keys_V), len(keys_V))
    # Rising integers are what torch sorts fastest, five times here.
    ids_V = ids_of_keys(keys_V.topk(num).values if num < len(keys_V) else ~(~keys_V).sort().values)
    cumulated_V = weights_V[ids_V].cumsum(0)
    reached = torch.searchsorted(cumulated_V, params.top_p * cumulated_V[-1:])
    at = torch.searchsorted(cumulated_V, uniform_1 * cumulated_V[reached], right=True)
    return int(ids_V[torch.minimum(at, reached)])
