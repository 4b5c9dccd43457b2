"""The rare draw that needs tokens beyond the head, for one row."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from model.candidates import ids_of_keys, order_keys
from model.random_bits import gumbels, uniforms
from model.sampling_params import SamplingParams

# Counters that stand in the place of a token id, above any real one.
TAIL_ID = 0xFFFFFFFF
_PICK_ID = 0xFFFFFFFE


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadRow:
    """The first tokens in order, and (logit - largest logit) / temperature of each."""

    ids_W: Tensor  # int64
    z_W: Tensor  # float64


def draw_with_tail(logits_V: Tensor, head: HeadRow, params: SamplingParams, stream: tuple[Tensor, Tensor]) -> int:
    """The exact draw: Gumbel-max over the head's kept tokens and the tail as one, then one uniform inside the tail."""
    ordered = params.top_k is not None or params.top_p < 1
    if ordered:
        keys_V = order_keys(logits_V, torch.arange(len(logits_V), device=logits_V.device))
        ids_V = ids_of_keys(keys_V.sort(descending=True).values)
        logits_V = logits_V[ids_V]
    top = logits_V[head.ids_W[0]] if not ordered else logits_V[0]
    weights_V = ((logits_V.double() - top.double()) / params.temperature).exp_()
    weights_V[weights_V < params.min_p] = 0
    num_head = len(head.ids_W)
    if ordered:
        weights_V[params.top_k or len(logits_V) :] = 0
        if params.top_p < 1:
            cumulated_V = weights_V.cumsum(0)
            weights_V[(cumulated_V - weights_V) >= params.top_p * cumulated_V[-1]] = 0
        is_kept_W = weights_V[:num_head] > 0
        weights_V[:num_head] = 0
    else:
        is_kept_W = weights_V[head.ids_W] > 0
        weights_V[head.ids_W] = 0
    cumulated_V = weights_V.cumsum(0)
    tail_mass = cumulated_V[-1]
    scores_W = (head.z_W + gumbels(stream, head.ids_W[None]).squeeze(0)).masked_fill_(~is_kept_W, float("-inf"))
    tail_id = torch.tensor([[TAIL_ID]], device=logits_V.device)
    best, best_at = scores_W.max(0)
    if best >= tail_mass.log() + gumbels(stream, tail_id)[0, 0]:
        return int(head.ids_W[best_at])
    share = uniforms(stream, torch.tensor([[_PICK_ID]], device=logits_V.device))[0, 0]
    at = torch.searchsorted(cumulated_V, share * tail_mass, right=True)
    return int(ids_V[at] if ordered else at)
