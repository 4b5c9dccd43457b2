from __future__ import annotations

import pytest
import torch

from model.native.build import build
from model.native.kernels import NativeKernels
from model.native.library import LEVELS, Library, load_library


def _load(level: str | None, num_threads: int = 1) -> Library:
    try:
        build()
    except RuntimeError as error:
        pytest.skip(str(error))
    library = load_library(level, num_threads)
    if library is None:
        pytest.skip(f"this CPU can't run the {level or 'native'} kernels")
    return library


@pytest.fixture(autouse=True)
def _same_numbers_every_time() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def native() -> NativeKernels:
    """The kernels at the best level of this CPU."""
    return NativeKernels(_load(None))


@pytest.fixture(scope="session")
def two_threads() -> NativeKernels:
    return NativeKernels(_load(None, num_threads=2))


@pytest.fixture(scope="session")
def levels() -> list[NativeKernels]:
    """Both levels, where the CPU has both."""
    return [NativeKernels(_load(level)) for level in LEVELS]
