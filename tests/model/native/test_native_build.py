"""Building, finding and doing without the library."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from model.kernels import REFERENCE_KERNELS, select_kernels
from model.linear import DenseWeight
from model.native.build import build, library_path
from model.native.kernels import NativeKernels
from model.native.library import load_library
from model.native.packed_weight import PackedWeight


def test_a_missing_library_is_no_library(tmp_path: Path) -> None:
    assert load_library(path=tmp_path / "none.so") is None


def test_a_file_that_is_no_library_is_no_library(tmp_path: Path) -> None:
    (tmp_path / "broken.so").write_text("not ELF")
    assert load_library(path=tmp_path / "broken.so") is None


def test_plain_torch_can_be_chosen_and_is_what_other_devices_get() -> None:
    assert select_kernels(native=False) is REFERENCE_KERNELS
    assert select_kernels("cuda") is REFERENCE_KERNELS


def test_native_kernels_are_chosen_where_they_were_built(native: NativeKernels) -> None:
    packed = select_kernels(num_threads=2).pack_weight(DenseWeight(torch.zeros(8, 8)))
    assert isinstance(packed, PackedWeight)
    assert (packed.library.level, packed.library.num_threads) == (native.library.level, 2)


def test_building_again_changes_nothing(native: NativeKernels) -> None:
    before = library_path().stat().st_mtime_ns
    assert build() == library_path()
    assert library_path().stat().st_mtime_ns == before


def test_a_missing_compiler_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "/nowhere/cc")
    with pytest.raises(RuntimeError, match="/nowhere/cc"):
        build(tmp_path)
    assert not list(tmp_path.iterdir())
