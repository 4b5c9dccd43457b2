"""What is done to a step's logits before the draw: masks, bans, biases and penalties, batched over the rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.sampler_state import SamplingRow

_NEG_INF = float("-inf")
# One row of eight addends for each byte of a bitmask: 0 where the bit is set, -inf where it isn't.
_ADDENDS = torch.where((torch.arange(256)[:, None] >> torch.arange(8)) & 1 == 1, 0.0, _NEG_INF)


def edit_logits(logits_RV: Tensor, rows: Sequence[SamplingRow]) -> None:
    """Apply, in place, every row's masks, bad words, min_tokens, logit_bias and penalties, in this order."""
    edited = [idx for idx, row in enumerate(rows) if row.edits_logits]
    if not edited:
        return
    vocab_size = logits_RV.shape[1]
    masks = {idx: mask for idx in edited if (mask := _mask_words(rows[idx], vocab_size)) is not None}
    if masks:
        _apply_masks(logits_RV, masks)
    _ban(logits_RV, {idx: _banned_ids(rows[idx], masks.get(idx), vocab_size) for idx in edited})
    _add_biases(logits_RV, {idx: rows[idx] for idx in edited if rows[idx].state.params.logit_bias})
    _penalize(logits_RV, {idx: rows[idx] for idx in edited if rows[idx].state.params.has_penalties})


def _mask_words(row: SamplingRow, vocab_size: int) -> NDArray[np.int32] | None:
    num_words = (vocab_size + 31) // 32
    words = row.state.allowed_words(num_words)
    if row.bitmask is None:
        return words
    grammar: NDArray[np.int32] = row.bitmask.numpy()
    if len(grammar) != num_words:
        raise ValueError(f"bitmask must have {num_words} words for a vocabulary of {vocab_size}, got {len(grammar)}.")
    return grammar if words is None else grammar & words


def _banned_ids(row: SamplingRow, mask: NDArray[np.int32] | None, vocab_size: int) -> NDArray[np.int64]:
    early = row.state.early_stop_ids()
    early = early[early < vocab_size]  # a tokenizer may know end tokens that the model has no logit for
    if len(early) and mask is not None:
        left = np.unpackbits(mask.view(np.uint8), bitorder="little")
        left[early] = 0
        if not left.any():  # a grammar that can only end now wins over min_tokens
            early = early[:0]
    return np.append(early, np.array(row.state.bad_token_ids(), dtype=np.int64))


def _apply_masks(logits_RV: Tensor, masks: dict[int, NDArray[np.int32]]) -> None:
    device = logits_RV.device
    words = torch.from_numpy(np.stack(list(masks.values())))
    addends = _ADDENDS.index_select(0, words.view(torch.uint8).flatten().int()).view(len(masks), -1)
    addends_MV = addends[:, : logits_RV.shape[1]].to(device)
    if len(masks) == len(logits_RV):
        logits_RV.add_(addends_MV)
    else:
        logits_RV.index_add_(0, torch.tensor(list(masks), device=device), addends_MV)


def _ban(logits_RV: Tensor, banned: dict[int, NDArray[np.int64]]) -> None:
    if any(map(len, banned.values())):
        logits_RV[_positions(logits_RV, banned)] = _NEG_INF


def _add_biases(logits_RV: Tensor, rows: dict[int, SamplingRow]) -> None:
    if rows:
        at = _positions(logits_RV, {idx: row.state.bias_ids for idx, row in rows.items()})
        logits_RV[at] += _joined([row.state.bias_values for row in rows.values()], logits_RV)


def _penalize(logits_RV: Tensor, rows: dict[int, SamplingRow]) -> None:
    """Touch only the tokens of each row's history: [N] over all rows, no tensor of the vocabulary's size."""
    if not rows:
        return
    histories = {idx: row.state.history() for idx, row in rows.items()}
    at = _positions(logits_RV, {idx: ids for idx, (ids, _) in histories.items()})
    counts = _joined([counts for _, counts in histories.values()], logits_RV)
    params = [row.state.params for row in rows.values()]
    columns = np.array([(p.repetition_penalty, p.frequency_penalty, p.presence_penalty) for p in params], np.float32)
    lengths = [len(ids) for ids, _ in histories.values()]
    repetition, frequency, presence = _joined([np.repeat(columns, lengths, axis=0)], logits_RV).unbind(1)
    old = logits_RV[at]
    new = torch.where(old > 0, old / repetition, old * repetition)
    logits_RV[at] = new - frequency * counts - presence * (counts > 0)


def _positions(logits_RV: Tensor, ids_by_row: dict[int, NDArray[np.int64]]) -> tuple[Tensor, Tensor]:
    """Row and token indices [N]; as a pair, so that an id outside the vocabulary can't reach another row."""
    rows_N = np.repeat(np.array(list(ids_by_row), np.int64), [len(ids) for ids in ids_by_row.values()])
    return _joined([rows_N], logits_RV), _joined(list(ids_by_row.values()), logits_RV)


def _joined(arrays: Sequence[NDArray[Any]], like: Tensor) -> Tensor:
    return torch.from_numpy(np.concatenate(arrays)).to(like.device)
