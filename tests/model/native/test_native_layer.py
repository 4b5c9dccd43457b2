"""Norm, rotary embedding, SwiGLU and the shared expert's gate against their torch references."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from model.attention import rotate_into_cache_reference
from model.kernels import REFERENCE_KERNELS, Kernels
from model.kv_cache import lay_out_keys
from model.layers import add_gated, add_norm, swiglu
from tests.model.native.pieces import NativePieces

WIDTHS = [4, 16, 52, 72, 512]  # with and without a rest beyond 8 and 16 lanes
NUM_ROWS = [1, 3, 200]  # the last is shared among threads


def _rotated(
    kernels: NativePieces | None,
    head_dim: int,
    num_tokens: int,
    dtype: torch.dtype,
    order: Tensor | None = None,
    block_size: int = 16,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and both caches after one step of 3 query heads and 2 key-value heads, tokens in the order given."""
    generator = torch.Generator().manual_seed(1)
    qkv_THD = torch.randn(num_tokens, 7, head_dim, generator=generator)
    cos, sin = torch.randn(2, num_tokens, 1, head_dim, generator=generator)
    shape = (-(-2 * num_tokens // block_size), 2, block_size, head_dim)
    rows_TG = torch.randperm(2 * shape[0] * block_size, generator=generator)[: 2 * num_tokens].view(num_tokens, 2)
    caches = [torch.full(shape, float("nan"), dtype=dtype) for _ in range(2)]
    caches[0] = lay_out_keys(caches[0])
    if order is not None:
        qkv_THD, cos, sin, rows_TG = qkv_THD[order], cos[order], sin[order], rows_TG[order]
    rotate = rotate_into_cache_reference if kernels is None else kernels.rotate_into_cache
    return rotate(qkv_THD, cos, sin, rows_TG, *caches), caches[0], caches[1]


def _same(found: Tensor, expected: Tensor, tolerance: float = 2e-6) -> bool:
    return torch.allclose(found.float(), expected.float(), rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("num_rows", NUM_ROWS)
@pytest.mark.parametrize("with_delta", [False, True])
def test_norm(two_threads: NativePieces, width: int, num_rows: int, with_delta: bool) -> None:
    x, delta, weight = torch.randn(num_rows, width), torch.randn(num_rows, width), torch.randn(width)
    expected_x = x.clone()
    expected = add_norm(expected_x, delta if with_delta else None, weight, 1e-6)
    found = two_threads.add_norm(x, delta if with_delta else None, weight, 1e-6)
    assert torch.equal(x, expected_x)
    assert _same(found, expected)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("num_rows", NUM_ROWS)
def test_swiglu_and_the_shared_gate(two_threads: NativePieces, width: int, num_rows: int) -> None:
    gate_up = torch.randn(num_rows, 2 * width) * 20
    assert _same(two_threads.swiglu(gate_up), swiglu(gate_up))
    y, x, gate = torch.randn(num_rows, width), torch.randn(num_rows, width), torch.randn(num_rows, 1) * 10
    expected = add_gated(y.clone(), x, gate)
    assert _same(two_threads.add_gated(y, x, gate), expected)
    assert _same(y, expected)


@pytest.mark.parametrize("head_dim", [2, 6, 16, 48, 64, 128])
@pytest.mark.parametrize("num_tokens", NUM_ROWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block_size", [2, 16, 48])
def test_rotation_into_the_cache(
    two_threads: NativePieces, head_dim: int, num_tokens: int, dtype: torch.dtype, block_size: int
) -> None:
    tolerance = 2e-6 if dtype == torch.float32 else 8e-3  # a key between two bf16 numbers may go either way
    mine, theirs = (_rotated(k, head_dim, num_tokens, dtype, block_size=block_size) for k in (two_threads, None))
    for found, expected in zip(mine, theirs, strict=True):
        assert found.dtype == expected.dtype
        assert _same(found, expected, tolerance)


def test_bfloat16_caches_round_as_torch_does(native: NativePieces) -> None:
    values = torch.tensor([1.0, 1 + 2**-8, 1 + 3 * 2**-8, 1e-40, -0.0, 3.4e38, float("inf"), -2.5])
    qkv = values.expand(1, 3, 8).contiguous()
    caches = [torch.zeros(1, 1, 1, 8, dtype=torch.bfloat16) for _ in range(2)]
    native.rotate_into_cache(qkv, torch.ones(1, 1, 8), torch.zeros(1, 1, 8), torch.tensor([[0]]), *caches)
    assert torch.equal(caches[1].flatten().view(torch.int16), values.bfloat16().view(torch.int16))


@pytest.mark.parametrize("width", [16, 72])
def test_a_row_has_the_same_bits_alone_at_any_place_and_at_every_width(levels: list[NativePieces], width: int) -> None:
    x, delta, weight = torch.randn(90, width), torch.randn(90, width), torch.randn(width)
    gate, gate_up = torch.randn(90, 1), torch.randn(90, 2 * width)

    def results(kernels: NativePieces, rows: Tensor) -> list[Tensor]:
        return [
            kernels.add_norm(x[rows], delta[rows], weight, 1e-6),
            kernels.swiglu(gate_up[rows]),
            kernels.add_gated(x[rows], delta[rows], gate[rows]),
        ]

    whole = results(levels[0], torch.arange(90))
    for kernels in levels:
        for rows in (torch.arange(90), torch.tensor([5]), torch.tensor([89, 3, 44])):
            for found, right in zip(results(kernels, rows), whole, strict=True):
                assert torch.equal(found, right[rows])
        q, k_cache, v_cache = _rotated(kernels, width, 90, torch.float32)
        right_q, right_k, right_v = _rotated(levels[0], width, 90, torch.float32)
        assert torch.equal(q, right_q) and _same_bits(k_cache, right_k) and _same_bits(v_cache, right_v)
        order = torch.randperm(90)
        mixed_q, mixed_k, _ = _rotated(kernels, width, 90, torch.float32, order)
        assert torch.equal(mixed_q, q[order]) and _same_bits(mixed_k, k_cache)


def _same_bits(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.view(torch.int32), other.view(torch.int32))


def test_native_kernels_have_every_operator_of_the_seam(native: NativePieces) -> None:
    for name in Kernels.__dataclass_fields__:
        of_reference: Callable[..., object] = getattr(REFERENCE_KERNELS, name)
        assert callable(of_reference) and callable(getattr(native, name))
