"""Building, finding and doing without the shared object."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from model.kernels import REFERENCE_KERNELS, select_kernels
from model.linear import DenseWeight
from model.native.build import build, shared_object_path
from model.native.kernels import NativeKernels
from model.native.packed_weight import PackedWeight
from model.native.shared_object import load_shared_object


def test_a_missing_file_is_no_shared_object(tmp_path: Path) -> None:
    assert load_shared_object(path=tmp_path / "none.so") is None


def test_a_file_that_is_none_is_no_shared_object(tmp_path: Path) -> None:
    (tmp_path / "broken.so").write_text("not ELF")
    assert load_shared_object(path=tmp_path / "broken.so") is None


def test_plain_torch_can_be_chosen_and_is_what_other_devices_get() -> None:
    assert select_kernels(native=False) is REFERENCE_KERNELS
    assert select_kernels("cuda") is REFERENCE_KERNELS


def test_native_kernels_are_chosen_where_they_were_built(native: NativeKernels) -> None:
    packed = select_kernels(num_threads=2).pack_weight(DenseWeight(torch.zeros(8, 8)))
    assert isinstance(packed, PackedWeight)
    best = load_shared_object()
    assert best is not None
    assert (packed.shared_object.level, packed.shared_object.num_threads) == (best.level, 2)


def test_building_again_changes_nothing(native: NativeKernels) -> None:
    before = shared_object_path().stat().st_mtime_ns
    assert build() == shared_object_path()
    assert shared_object_path().stat().st_mtime_ns == before


def test_a_shared_object_that_does_not_load_is_built_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / shared_object_path().name).write_text("for another machine")
    monkeypatch.setenv("CC", "/nowhere/cc")
    with pytest.raises(RuntimeError, match="/nowhere/cc"):
        build(tmp_path)


def test_another_choice_of_sources_is_another_shared_object(monkeypatch: pytest.MonkeyPatch) -> None:
    before = shared_object_path()
    monkeypatch.setattr("model.native.build._SOURCES_OF_LEVEL", {})
    assert shared_object_path() != before


def test_a_machine_without_a_compiler_is_told_which_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="install gcc 11 or later"):
        build(tmp_path)


def test_a_missing_compiler_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "/nowhere/cc")
    with pytest.raises(RuntimeError, match="/nowhere/cc"):
        build(tmp_path)
    assert not list(tmp_path.iterdir())
