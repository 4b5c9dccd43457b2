from __future__ import annotations

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


@pytest.fixture(autouse=True)
def _same_numbers_every_time() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def native() -> NativePieces:
    """The kernels at the best level of this CPU."""
    return NativePieces(_load(None))


@pytest.fixture(scope="session")
def two_threads() -> NativePieces:
    return NativePieces(_load(None, num_threads=2))


@pytest.fixture(scope="session")
def levels() -> list[NativePieces]:
    """AVX2 and AVX-512, where the CPU has both."""
    return [NativePieces(_load(level)) for level in LEVELS[:2]]
