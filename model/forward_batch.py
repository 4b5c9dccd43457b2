"""What one step's forward needs: the tokens of all its sequences, flat, and where their keys and values live."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockTable:
    """The blocks of each sequence in one KV group.

    A sequence's token at position p is in block `block_ids_SB[s, p // block_size]`, offset `p % block_size`. In the
    sliding group, blocks wholly outside the window may have been given back; their entries are 0 and never read.
    """

    block_ids_SB: Tensor
    """int32 [S, max_blocks], padded with 0."""
    slots_T: Tensor
    """int64 [T], `block_id * block_size + offset` where each new key and value is written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardBatch:
    """S sequences with T new tokens in all: prefill chunks and decodes alike, one after the other.

    sequence 0: 3 tokens of a chunk   sequence 1: a decode   sequence 2: 2 tokens
    token_ids_T    a b c              d                      e f
    query_starts   0                  3                      4       6
    """

    token_ids_T: Tensor
    """int64 [T]."""
    positions_T: Tensor
    """int64 [T], position in the sequence."""
    rope_lens_T: Tensor
    """int64 [T], max(prompt length, position + 1): the length that dynamic and longrope RoPE see."""
    query_starts: Tensor
    """int32 [S + 1], offsets into the tokens."""
    context_lens_S: Tensor
    """int32 [S], keys of each sequence, this step's included."""
    tables: tuple[BlockTable, ...]
    """One for each of `ModelConfig.kv_groups`, in that order."""
