"""The most likely tokens of each row without sorting the vocabulary: exact, ordered, and the same in any batch.

Tokens are ordered by falling logit and, among equals, by rising token id. Two levels: the maxima of small chunks give
a threshold that at least `num` tokens reach; one comparison finds them all, and only those are sorted.

    row     [ 3 1 | 7 2 | 0 5 | 6 4 ]      chunks of 2, num = 2
    maxima  [  3     7     5     6  ]      the 2nd largest maximum is 6: every token >= 6 is a candidate
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_MASK32 = 0xFFFFFFFF
_LOWEST = torch.finfo(torch.float32).min
_NO_KEY = torch.iinfo(torch.int64).min
_LANES = 64  # widths are multiples of this, so that each row's elements always sit in the same vector lanes


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidates:
    """The first tokens of each row in order; rows shorter than W are padded (logit -inf, id 0).

    has_rest_R: whether tokens with a finite logit may come after a row's last candidate.
    """

    ids_RW: Tensor  # int64
    logits_RW: Tensor  # float32
    counts_R: Tensor  # int64
    has_rest_R: Tensor  # bool


def chunk_maxima(logits_RV: Tensor) -> Tensor:
    """The maximum of each chunk of consecutive tokens, [R, C]; NaN where the chunk holds one. Reads the logits once."""
    vocab_size = logits_RV.shape[1]
    size = _chunk_size(vocab_size)
    whole = vocab_size // size * size
    maxima = logits_RV[:, :whole].view(len(logits_RV), -1, size).amax(-1)
    if whole == vocab_size:
        return maxima
    return torch.cat([maxima, logits_RV[:, whole:].amax(-1, keepdim=True)], dim=1)


def first_argmax(logits_RV: Tensor, maxima_RC: Tensor) -> Tensor:
    """The lowest token id among each row's largest logits, int64 [R]. Rows with NaN give any id."""
    size, vocab_size = _chunk_size(logits_RV.shape[1]), logits_RV.shape[1]
    offsets = torch.arange(size, device=logits_RV.device)
    ids_RS = (maxima_RC.argmax(-1, keepdim=True) * size + offsets).clamp_(max=vocab_size - 1)
    return ids_RS.gather(1, logits_RV.gather(1, ids_RS).argmax(-1, keepdim=True)).squeeze(1)


def top_candidates(logits_RV: Tensor, maxima_RC: Tensor, num: int) -> Candidates:
    """At least the first `num` tokens of each row (fewer only if fewer have a finite logit). Logits must hold no NaN.

    How many a row gets depends on that row and `num` alone.
    """
    num_rows, vocab_size = logits_RV.shape
    threshold_R1 = maxima_RC.topk(min(num, maxima_RC.shape[1])).values[:, -1:]
    if num > maxima_RC.shape[1]:
        threshold_R1 = torch.full_like(threshold_R1, float("-inf"))
    chosen_RV = logits_RV >= threshold_R1.clamp(min=_LOWEST)
    flat_N = _true_positions(chosen_RV)
    rows_N = flat_N // vocab_size
    counts_R = torch.bincount(rows_N, minlength=num_rows)
    wide = (counts_R > 4 * num).nonzero().flatten()  # many ties, or few chunks alive: not worth padding all rows
    if len(wide):
        is_narrow_N = (counts_R <= 4 * num)[rows_N]
        flat_N, rows_N = flat_N[is_narrow_N], rows_N[is_narrow_N]
        num_finite_R = counts_R[wide]
        counts_R = counts_R.index_fill(0, wide, num)
    width = -(-max(1, int(counts_R.max())) // _LANES) * _LANES
    keys_RW = torch.full((num_rows, width), _NO_KEY, dtype=torch.int64, device=logits_RV.device)
    starts_R = torch.bincount(rows_N, minlength=num_rows).cumsum(0)
    starts_R = torch.cat([starts_R.new_zeros(1), starts_R[:-1]])
    columns_N = torch.arange(len(rows_N), device=rows_N.device) - starts_R[rows_N]
    keys_RW[rows_N, columns_N] = order_keys(logits_RV.view(-1)[flat_N], flat_N % vocab_size)
    has_rest_R = (threshold_R1.squeeze(1) > float("-inf")) & (counts_R < vocab_size)
    if len(wide):
        all_ids = torch.arange(vocab_size, device=logits_RV.device)
        keys_RW[wide, :num] = order_keys(logits_RV[wide], all_ids).topk(num).values
        has_rest_R[wide] |= num_finite_R > num
    keys_RW = keys_RW.sort(dim=1, descending=True).values
    is_pad_RW = keys_RW == _NO_KEY
    ids_RW = ids_of_keys(keys_RW).masked_fill_(is_pad_RW, 0)
    values_RW = logits_RV.gather(1, ids_RW).masked_fill_(is_pad_RW, float("-inf"))
    return Candidates(ids_RW=ids_RW, logits_RW=values_RW, counts_R=counts_R, has_rest_R=has_rest_R)


def order_keys(logits: Tensor, ids: Tensor) -> Tensor:
    """One int64 each: a larger key is a larger logit or, at the same logit, a lower id."""
    bits = (logits + 0.0).view(torch.int32)  # + 0.0 makes -0.0 equal to 0.0
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # negative floats order backwards
    return (ordered.long() << 32) | (_MASK32 - ids)


def ids_of_keys(keys: Tensor) -> Tensor:
    return _MASK32 - (keys & _MASK32)


def _chunk_size(vocab_size: int) -> int:
    """The largest power of two up to 128 that leaves 512 chunks."""
    size = 128
    while size > 1 and vocab_size // size < 512:
        size //= 2
    return size


def _true_positions(mask: Tensor) -> Tensor:
    """Flat indices where the mask is true, in order. NumPy's is several times as fast as torch's on a CPU."""
    if mask.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return mask.flatten().nonzero().flatten()
