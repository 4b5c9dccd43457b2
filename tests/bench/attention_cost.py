"""What attention costs one decoded token, by the length of its context: the kernel and the gathering reference.

    python -m tests.bench.attention_cost [--heads 16 --kv-heads 16 --head-dim 128] [--sequences 8]

Per layer a token reads 2 * G * D * bytes of keys and values for each token of its context, and multiplies and adds
2 * A * D times for each: linear in the context, bound by memory. A sliding layer stops at its window.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import time
from collections.abc import Callable

import torch

from model.attention import paged_attention_reference
from model.kv_cache import lay_out_keys
from model.native.shared_object import load_shared_object
from tests.model.native.pieces import NativePieces

CONTEXTS = (128, 256, 512, 1024, 2048, 4096, 8192, 16384)
BLOCK = 16


def best_of(function: Callable[[], object], repeats: int = 7) -> float:
    """Seconds of the fastest call."""
    function()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--kv-heads", type=int, default=16)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--sequences", type=int, default=8)
    options = parser.parse_args()
    num_seqs, num_kv_heads, head_dim = options.sequences, options.kv_heads, options.head_dim
    torch.set_num_threads(1)
    shared_object = load_shared_object()
    if shared_object is None:
        raise SystemExit("no native kernels here")
    kernel = NativePieces(shared_object).paged_attention
    print(
        f"A={options.heads} G={num_kv_heads} D={head_dim}, {num_seqs} sequences, float32, one thread; per token, layer"
    )
    print("context   kernel us   GB/s read   gathered us   ratio   window 1024 us")
    for context in CONTEXTS:
        num_blocks = num_seqs * context // BLOCK + 1
        k_cache, v_cache = (torch.randn(num_blocks, num_kv_heads, BLOCK, head_dim) for _ in range(2))
        order = torch.randperm(num_blocks - 1, generator=torch.Generator().manual_seed(0)) + 1
        args = (
            torch.randn(num_seqs, options.heads, head_dim),
            lay_out_keys(k_cache),
            v_cache,
            order.view(num_seqs, -1).to(torch.int32),
            torch.arange(num_seqs + 1, dtype=torch.int32),
            torch.full((num_seqs,), context, dtype=torch.int32),
        )
        fast_s, slow_s, window_s = (
            best_of(lambda run=run, window=window, args=args: run(*args, window, head_dim**-0.5)) / num_seqs
            for run, window in ((kernel, None), (paged_attention_reference, None), (kernel, 1024))
        )
        num_bytes = 2 * num_kv_heads * head_dim * 4 * context
        print(
            f"{context:7d} {fast_s * 1e6:11.1f} {num_bytes / fast_s / 1e9:11.1f} {slow_s * 1e6:13.1f} "
            f"{slow_s / fast_s:7.1f} {window_s * 1e6:16.1f}"
        )


if __name__ == "__main__":
    main()
