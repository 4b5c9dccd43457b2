"""The rare draw that needs tokens beyond the head, for one row."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from model.candidates import ids_of_keys, order_keys
from model.random_bits import gumbel, uniforms
from model.sampling_params import SamplingParams

# Counters that stand in the place of a token id, above any real one.
TAIL_ID = 0xFFFFFFFF
_PICK_ID = 0xFFFFFFFE


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadRow:
    """The first tokens in order, and each one's (logit - largest logit) / temperature + noise."""

    ids_W: Tensor  # int64
    scores_W: Tensor  # float64


def draw_with_tail(logits_V: Tensor, head: HeadRow, params: SamplingParams, stream: tuple[Tensor, Tensor]) -> int:
    """The exact draw: Gumbel-max over the head's kept tokens and the tail as one, then one uniform inside the tail."""
    weights_V = ((logits_V.double() - logits_V[head.ids_W[0]].double()) / params.temperature).exp_()
    weights_V[weights_V < params.min_p] = 0
    ids_V = torch.arange(len(logits_V), device=logits_V.device)
    if params.top_k is not None or params.top_p < 1:
        ids_V = _in_order(logits_V, ids_V, params.top_k)  # from here on V is top_k, if there is one
        weights_V = _within_top_p(weights_V[ids_V], params.top_p)
        head_at_W = torch.arange(len(head.ids_W), device=logits_V.device)
    else:
        head_at_W = head.ids_W  # no rule needs the order: the tail is walked by token id
    is_kept_W = weights_V[head_at_W] > 0
    weights_V[head_at_W] = 0
    cumulated_V = weights_V.cumsum(0)
    tail_mass = cumulated_V[-1:]
    best, best_at = head.scores_W.masked_fill(~is_kept_W, float("-inf")).max(0)
    tail_noise, share = uniforms(stream, torch.tensor([[TAIL_ID, _PICK_ID]], device=logits_V.device))[0]
    if best >= tail_mass.log() + gumbel(tail_noise):
        return int(head.ids_W[best_at])
    last = torch.searchsorted(cumulated_V, tail_mass)  # share * mass may round up to the mass itself
    at = torch.minimum(torch.searchsorted(cumulated_V, share * tail_mass, right=True), last)
    return int(ids_V[at])


def _in_order(logits_V: Tensor, ids_V: Tensor, top_k: int | None) -> Tensor:
    """Token ids in order, all or the first top_k."""
    keys_V = order_keys(logits_V, ids_V)
    if top_k is not None and top_k < len(keys_V):
        return ids_of_keys(keys_V.topk(top_k).values)
    return ids_of_keys(~(~keys_V).sort().values)  # rising integers are what torch sorts fastest, five times here


def _within_top_p(weights_V: Tensor, top_p: float) -> Tensor:
    """Weights in falling order, those beyond the nucleus set to 0."""
    if top_p == 1:
        return weights_V
    cumulated_V = weights_V.cumsum(0)
    return weights_V.masked_fill_(cumulated_V - weights_V >= top_p * cumulated_V[-1], 0)
