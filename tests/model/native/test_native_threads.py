"""The kernels called from several Python threads, and from many that end."""

from __future__ import annotations

import resource
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from model.linear import DenseWeight, linear
from model.native.kernels import NativeKernels


def test_calls_from_several_threads_at_once_do_not_mix(two_threads: NativeKernels) -> None:
    packed = two_threads.pack_weight(DenseWeight(torch.randn(600, 64)))
    inputs = [torch.randn(5, 64) for _ in range(4)]
    expected = [linear(x_TK, packed) for x_TK in inputs]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(50):
            results = list(pool.map(lambda x_TK: linear(x_TK, packed), inputs))
            assert all(torch.equal(result, right) for result, right in zip(results, expected, strict=True))


def test_a_thread_that_ends_gives_its_scratch_memory_back(native: NativeKernels) -> None:
    packed = native.pack_weight(DenseWeight(torch.randn(8, 2048)))
    x_TK = torch.randn(1024, 2048)  # packed: 8 MB of scratch

    def resident_bytes() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    linear(x_TK, packed)
    before = resident_bytes()
    for _ in range(40):  # 320 MB of scratch, were it kept
        thread = threading.Thread(target=linear, args=(x_TK, packed))
        thread.start()
        thread.join()
    assert resident_bytes() - before < 200e6
