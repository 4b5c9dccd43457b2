"""The parts of a layer that run in one call, against their references made of plain torch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from model.attention import Attention, AttentionInputs, attention_reference
from model.forward_batch import BlockTable, ForwardBatch
from model.kv_cache import KVCache, lay_out_keys
from model.layers import MLP, RMSNorm
from model.linear import DenseWeight, Weight
from model.moe import Gate, MoeBlock, route_reference
from model.quantize import quantize_int8
from tests.model.native.pieces import NativePieces

STORAGES = {"float32": 1e-5, "bfloat16": 2e-5, "bfloat16_inputs": 0.02, "int8": 0.05}
"""And how far from its reference a result may be, as a share of the largest."""
HIDDEN = 64


def _weight(num_outputs: int, num_inputs: int, storage: str) -> Weight:
    matrix = torch.randn(num_outputs, num_inputs) * num_inputs**-0.5
    if storage == "int8":
        return quantize_int8(matrix)
    if storage == "float32":
        return DenseWeight(matrix)
    return DenseWeight(matrix.bfloat16(), bfloat16_inputs=storage == "bfloat16_inputs")


def _norm() -> RMSNorm:
    return RMSNorm(1 + 0.1 * torch.randn(HIDDEN), 1e-6)


def _share(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


# ---- attention ------------------------------------------------------------------------------------------


def _attention(
    heads: tuple[int, int, int], storage: str = "float32", window: int | None = None, with_bias: bool = True
) -> Attention:
    num_heads, num_kv_heads, head_dim = heads
    width = (num_heads + 2 * num_kv_heads) * head_dim
    return Attention(
        layer_idx=0,
        norm=_norm(),
        qkv=_weight(width, HIDDEN, storage),
        qkv_bias=torch.randn(width) if with_bias else None,
        o=_weight(HIDDEN, num_heads * head_dim, storage),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        window=window,
    )


def _packed(native: NativePieces, layer: Attention) -> Attention:
    return replace(layer, qkv=native.pack_weight(layer.qkv), o=native.pack_weight(layer.o))


def _step(
    heads: tuple[int, int, int], new_tokens: list[int], contexts: list[int], block_size: int, dtype: torch.dtype
) -> tuple[AttentionInputs, KVCache]:
    """Sequences of `contexts` tokens, the last `new_tokens` of them new, over a cache filled at random."""
    _, num_kv_heads, head_dim = heads
    width = max(-(-context // block_size) for context in contexts)
    block_ids_SB = (torch.randperm(len(contexts) * width) + 1).int().view(len(contexts), width)
    shape = (len(contexts) * width + 1, num_kv_heads, block_size, head_dim)
    keys, values = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    cache = KVCache((lay_out_keys(keys),), (values,), block_size)
    places = [torch.arange(context - new, context) for context, new in zip(contexts, new_tokens, strict=True)]
    slots = [
        ids[p // block_size].long() * block_size + p % block_size for ids, p in zip(block_ids_SB, places, strict=True)
    ]
    table = BlockTable(block_ids_SB=block_ids_SB, slots_T=torch.cat(slots))
    num_tokens = sum(new_tokens)
    batch = ForwardBatch(
        token_ids_T=torch.zeros(num_tokens, dtype=torch.int64),
        positions_T=torch.cat(places),
        rope_lens_T=torch.cat(places) + 1,
        query_starts=torch.tensor([0, *new_tokens]).cumsum(0).int(),
        context_lens_S=torch.tensor(contexts).int(),
        tables=(table,),
    )
    cos_sin = torch.randn(num_tokens, 1, head_dim), torch.randn(num_tokens, 1, head_dim)
    return AttentionInputs(batch, cos_sin, block_ids_SB, cache.rows(table.slots_T)), cache


def _both(
    native: NativePieces, layer: Attention, inputs: AttentionInputs, cache: KVCache, delta_TH: Tensor | None
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """What native and reference return, and what they leave in x and in the cache."""
    results = []
    x_TH = torch.randn(len(inputs.write_rows_TG), HIDDEN)
    for attend, one in ((native.attention, _packed(native, layer)), (attention_reference, layer)):
        x, keys, values = x_TH.clone(), cache.keys[0].clone(), cache.values[0].clone()
        y_TH = attend(one, x, delta_TH, inputs, KVCache((keys,), (values,), cache.block_size))
        results.append((y_TH, x, keys.float(), values.float()))
    return results[0], results[1]


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [(4, 4, 16), (6, 2, 32), (4, 1, 64)])
@pytest.mark.parametrize("window", [None, 20])
def test_attention_of_a_layer(
    two_threads: NativePieces, storage: str, dtype: torch.dtype, heads: tuple[int, int, int], window: int | None
) -> None:
    layer = _attention(heads, storage, window, with_bias=window is None)
    inputs, cache = _step(heads, [1, 70, 3], [40, 100, 3], 16, dtype)
    delta_TH = torch.randn(74, HIDDEN) if window is None else None
    found, expected = _both(two_threads, layer, inputs, cache, delta_TH)
    tolerance = max(STORAGES[storage], 0.01 if dtype == torch.bfloat16 else 0.0)
    assert torch.equal(found[1], expected[1])
    assert max(_share(one, other) for one, other in zip(found, expected, strict=True)) < tolerance


@pytest.mark.parametrize(("head_dim", "block_size"), [(24, 16), (32, 8), (272, 16)])
def test_sizes_that_attention_does_not_know_take_the_reference(
    native: NativePieces, head_dim: int, block_size: int
) -> None:
    heads = (2, 1, head_dim)
    inputs, cache = _step(heads, [4], [40], block_size, torch.float32)
    found, expected = _both(native, _attention(heads), inputs, cache, None)
    assert max(_share(one, other) for one, other in zip(found, expected, strict=True)) < 1e-5


def test_attention_in_groups_of_rows(native: NativePieces) -> None:
    """QKV is so wide that some 95 rows make a group."""
    heads = (510, 1, 128)
    layer = _attention(heads)
    inputs, cache = _step(heads, [120], [130], 16, torch.float32)
    found, expected = _both(native, layer, inputs, cache, torch.randn(120, HIDDEN))
    assert max(_share(one, other) for one, other in zip(found, expected, strict=True)) < 1e-4


# ---- the way to the experts -----------------------------------------------------------------------------


@pytest.mark.parametrize("storage", ["float32", "bfloat16"])
@pytest.mark.parametrize("num_tokens", [1, 200])
@pytest.mark.parametrize(
    ("num_experts", "top_k", "normalize"), [(5, 1, True), (8, 8, False), (60, 4, False), (64, 8, True)]
)
def test_route(
    two_threads: NativePieces, storage: str, num_tokens: int, num_experts: int, top_k: int, normalize: bool
) -> None:
    gate = Gate(_weight(num_experts + 1, HIDDEN, storage), top_k, normalize)
    block = MoeBlock(layer_idx=0, norm=_norm(), gate=gate, shared_expert=_mlp(32, "float32"))
    x_TH, delta_TH = torch.randn(num_tokens, HIDDEN), torch.randn(num_tokens, HIDDEN)
    packed = replace(block, gate=replace(gate, weight=two_threads.pack_weight(gate.weight)))
    expected_x, found_x = x_TH.clone(), x_TH.clone()
    expected, found = route_reference(block, expected_x, delta_TH), two_threads.route(packed, found_x, delta_TH)
    assert torch.equal(found_x, expected_x)
    torch.testing.assert_close(found.x_TH, expected.x_TH)
    torch.testing.assert_close(found.topk_weights_TK, expected.topk_weights_TK, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.shared_gate_T1, expected.shared_gate_T1, rtol=1e-4, atol=1e-4)
    differs = found.topk_ids_TK != expected.topk_ids_TK
    assert differs.float().mean() < 0.01  # two that are all but equal may change places


def test_equal_probabilities_go_to_the_lower_expert_and_none_twice(native: NativePieces) -> None:
    logits_TE = torch.zeros(3, 21)
    logits_TE[1, [3, 17]] = 1.0
    logits_TE[2, 4] = float("nan")
    ids_TK, weights_TK, _ = native.topk_softmax(logits_TE, 4, False)
    assert ids_TK.tolist() == [[0, 1, 2, 3], [3, 17, 0, 1], [0, 1, 2, 3]]
    assert torch.allclose(weights_TK[0], torch.full((4,), 0.05))
    assert weights_TK[2].isnan().all()


@pytest.mark.parametrize("num_experts", [3, 16, 60])
def test_a_choice_has_the_same_bits_in_any_batch_and_at_every_width(
    levels: list[NativePieces], num_experts: int
) -> None:
    logits_TE = torch.randn(90, num_experts + 1) * 5
    right = levels[0].topk_softmax(logits_TE, 3, True)
    for kernels in levels:
        for rows in (torch.arange(90), torch.tensor([5]), torch.tensor([89, 3, 44])):
            for found, whole in zip(kernels.topk_softmax(logits_TE[rows], 3, True), right, strict=True):
                assert torch.equal(found, whole[rows])


# ---- MLP ------------------------------------------------------------------------------------------------


def _mlp(inner: int, storage: str) -> MLP:
    return MLP(_weight(2 * inner, HIDDEN, storage), _weight(HIDDEN, inner, storage))


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("inner", [32, 44, 352])  # 44: no whole panels; 352: several blocks of them
@pytest.mark.parametrize("num_tokens", [1, 7, 40, 150, 600])
def test_mlp(two_threads: NativePieces, storage: str, inner: int, num_tokens: int) -> None:
    mlp = _mlp(inner, storage)
    packed = MLP(two_threads.pack_weight(mlp.gate_up), two_threads.pack_weight(mlp.down))
    x_TH = torch.randn(num_tokens, HIDDEN)
    found = two_threads.mlp(packed, x_TH)
    assert _share(found, mlp.forward(x_TH)) < STORAGES[storage]
    for row in (0, num_tokens - 1):
        assert torch.equal(two_threads.mlp(packed, x_TH[row : row + 1].contiguous())[0], found[row])


def test_mlp_in_groups_of_rows(two_threads: NativePieces) -> None:
    """It is so wide that some 64 rows make a group."""
    for storage in ("float32", "bfloat16"):
        mlp = _mlp(49152, storage)
        packed = MLP(two_threads.pack_weight(mlp.gate_up), two_threads.pack_weight(mlp.down))
        x_TH = torch.randn(100, HIDDEN)
        found = two_threads.mlp(packed, x_TH)
        assert _share(found, mlp.forward(x_TH)) < STORAGES[storage]
        assert torch.equal(two_threads.mlp(packed, x_TH[99:].contiguous())[0], found[99])


# ---- every width ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", STORAGES)
def test_both_vector_widths_give_the_same_bits(levels: list[NativePieces], storage: str) -> None:
    heads = (6, 2, 32)
    layer, mlp, gate = _attention(heads, storage, 20), _mlp(352, storage), Gate(_weight(21, HIDDEN, storage), 4, True)
    inputs, cache = _step(heads, [1, 70, 3], [40, 100, 3], 16, torch.float32)
    x_TH, delta_TH = torch.randn(2, 74, HIDDEN)
    results = []
    for kernels in levels:
        packed = MLP(kernels.pack_weight(mlp.gate_up), kernels.pack_weight(mlp.down))
        packed_gate = replace(gate, weight=kernels.pack_weight(gate.weight))
        block = MoeBlock(layer_idx=0, norm=layer.norm, gate=packed_gate, shared_expert=packed)
        caches = KVCache((cache.keys[0].clone(),), (cache.values[0].clone(),), cache.block_size)
        attended = kernels.attention(_packed(kernels, layer), x_TH.clone(), delta_TH, inputs, caches)
        routed = kernels.route(block, x_TH.clone(), delta_TH)
        results.append([attended, *routed, kernels.mlp(packed, x_TH), caches.keys[0], caches.values[0]])
    for one, other in zip(results[0], results[-1], strict=True):
        assert torch.equal(one, other)
