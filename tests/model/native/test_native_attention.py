"""Paged attention in C against the reference that gathers each sequence."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from model.attention import paged_attention_reference
from model.kv_cache import lay_out_keys
from tests.model.native.pieces import NativePieces

HEADS = [(4, 4, 16), (6, 2, 32), (2, 1, 48), (14, 2, 64), (4, 4, 128), (1, 1, 256)]


@dataclass(frozen=True)
class Case:
    """Sequences with `query_lens` new tokens at the end of `context_lens`, in shuffled blocks. Slots beyond a context,
    and block 0, hold NaN: nobody may read them into a result."""

    q_TAD: Tensor
    k_cache: Tensor
    v_cache: Tensor
    block_ids_SB: Tensor
    query_starts: Tensor
    context_lens_S: Tensor
    window: int | None = None

    def args(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, int | None, float]:
        return (
            self.q_TAD,
            self.k_cache,
            self.v_cache,
            self.block_ids_SB,
            self.query_starts,
            self.context_lens_S,
            self.window,
            self.q_TAD.shape[2] ** -0.5,
        )

    def chunk(self, seq: int, first: int, stop: int) -> Case:
        """New tokens [first, stop) of one sequence, as a batch of their own."""
        start = int(self.query_starts[seq])
        num_queries = int(self.query_starts[seq + 1]) - start
        context_len = int(self.context_lens_S[seq]) - num_queries + stop
        return Case(
            self.q_TAD[start + first : start + stop],
            self.k_cache,
            self.v_cache,
            self.block_ids_SB[seq : seq + 1],
            torch.tensor([0, stop - first], dtype=torch.int32),
            torch.tensor([context_len], dtype=torch.int32),
            self.window,
        )


def _case(
    heads: tuple[int, int, int],
    query_lens: list[int],
    context_lens: list[int],
    *,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    window: int | None = None,
) -> Case:
    num_heads, num_kv_heads, head_dim = heads
    counts = [-(-context_len // block_size) for context_len in context_lens]
    block_ids = iter((torch.randperm(sum(counts)) + 1).tolist())
    shape = (sum(counts) + 1, num_kv_heads, block_size, head_dim)
    k_cache, v_cache = (torch.full(shape, float("nan"), dtype=dtype) for _ in range(2))
    block_ids_SB = torch.zeros(len(counts), max(counts), dtype=torch.int32)
    for seq, (context_len, query_len, count) in enumerate(zip(context_lens, query_lens, counts, strict=True)):
        for i in range(count):
            first_window_key = 0 if window is None else max(0, context_len - query_len + 1 - window)
            block = next(block_ids)
            if (i + 1) * block_size <= first_window_key:
                continue  # given back: stays block 0
            block_ids_SB[seq, i] = block
            filled = min(block_size, context_len - i * block_size)
            k_cache[block, :, :filled] = torch.randn(num_kv_heads, filled, head_dim).to(dtype)
            v_cache[block, :, :filled] = torch.randn(num_kv_heads, filled, head_dim).to(dtype)
    query_starts = torch.tensor([0, *query_lens]).cumsum(0).int()
    q_TAD = torch.randn(sum(query_lens), num_heads, head_dim)
    return Case(
        q_TAD, lay_out_keys(k_cache), v_cache, block_ids_SB, query_starts, torch.tensor(context_lens).int(), window
    )


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block_size", [16, 48])
@pytest.mark.parametrize("window", [None, 100, 7])
def test_attention_agrees_with_the_reference(
    native: NativePieces, heads: tuple[int, int, int], dtype: torch.dtype, block_size: int, window: int | None
) -> None:
    query_lens, context_lens = [1, 1, 3, 50, 1, 130], [1, 77, 200, 130, 301, 200]
    case = _case(heads, query_lens, context_lens, block_size=block_size, dtype=dtype, window=window)
    expected = paged_attention_reference(*case.args())
    tolerance = 5e-6 if dtype == torch.float32 else 2e-5  # AMX takes 16 of a query's 24 bits
    torch.testing.assert_close(native.paged_attention(*case.args()), expected, rtol=1e-5, atol=tolerance)


@pytest.mark.parametrize("heads", [(4, 4, 32), (14, 2, 64), (4, 4, 128)])
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_has_the_same_bits_in_a_batch_in_chunks_and_decoded_alone(
    native: NativePieces, heads: tuple[int, int, int], window: int | None, dtype: torch.dtype
) -> None:
    case = _case(heads, [1, 150, 3], [500, 230, 90], window=window, dtype=dtype)
    together = native.paged_attention(*case.args())[1:151]
    for size in (16, 64, 150):
        parts = [native.paged_attention(*case.chunk(1, i, min(i + size, 150)).args()) for i in range(0, 150, size)]
        assert torch.equal(torch.cat(parts), together)
    for token in (0, 1, 63, 64, 149):
        alone = native.paged_attention(*case.chunk(1, token, token + 1).args())
        assert torch.equal(alone[0], together[token])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_vector_widths_give_the_same_bits(levels: list[NativePieces], dtype: torch.dtype) -> None:
    for heads in HEADS:
        case = _case(heads, [1, 70], [130, 100], dtype=dtype, window=60)
        first, *others = (kernels.paged_attention(*case.args()) for kernels in levels)
        assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_threads_give_the_same_bits(native: NativePieces, two_threads: NativePieces, dtype: torch.dtype) -> None:
    case = _case((14, 2, 64), [1, 90, 1], [300, 200, 64], dtype=dtype)
    assert torch.equal(native.paged_attention(*case.args()), two_threads.paged_attention(*case.args()))


def test_one_dominating_score_of_any_size_is_followed(native: NativePieces) -> None:
    case = _case((1, 1, 64), [1], [200])
    case.q_TAD.mul_(1000.0)
    expected = paged_attention_reference(*case.args())
    torch.testing.assert_close(native.paged_attention(*case.args()), expected, rtol=1e-4, atol=1e-4)
