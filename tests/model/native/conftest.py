from __future__ import annotations

import contextlib

import pytest
import torch

from model.native.build import build
from model.native.shared_object import LEVELS, SharedObject, load_shared_object
from tests.model.native.pieces import NativePieces


def _load(level: str | None, num_threads: int = 1) -> SharedObject:
    try:
        build()
    except RuntimeError as error:
        pytest.skip(str(error))
    shared_object = load_shared_object(level, num_threads)
    if shared_object is None:
        pytest.skip(f"this CPU can't run the {level or 'native'} kernels")
    return shared_object


def _tested_levels() -> list[str | None]:
    """The best level of this CPU, and beside AMX the best without it, which other CPUs run."""
    with contextlib.suppress(RuntimeError):
        build()
    best = load_shared_object()
    return [None] if best is None else [best.level, "avx512bf16"] if best.level == "amx" else [best.level]


@pytest.fixture(autouse=True)
def _same_numbers_every_time() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session", params=_tested_levels())
def native(request: pytest.FixtureRequest) -> NativePieces:
    return NativePieces(_load(request.param))


@pytest.fixture(scope="session")
def two_threads(native: NativePieces) -> NativePieces:
    return NativePieces(_load(native.shared_object.level, num_threads=2))


@pytest.fixture(scope="session")
def levels() -> list[NativePieces]:
    """Those without AMX, from AVX2 on, where the CPU has at least AVX-512."""
    more = [load_shared_object(level) for level in LEVELS[2:-1]]
    return [*(NativePieces(_load(level)) for level in LEVELS[:2]), *(NativePieces(one) for one in more if one)]
