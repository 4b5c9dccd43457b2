"""The compiled kernels as Python functions over tensors. ctypes frees the GIL while they run."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from model.native.build import shared_object_path

LEVELS = ("avx2", "avx512", "amx")
"""From slow to fast. All give the same bits, but that products with bfloat16 weights round otherwise in AMX's tiles."""


class WeightStruct(ctypes.Structure):
    """`struct weight` of native.h."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("zeros", ctypes.c_void_p),
        ("input_order", ctypes.c_void_p),
        ("format", ctypes.c_int32),
        ("num_outputs", ctypes.c_int32),
        ("num_inputs", ctypes.c_int32),
        ("block_size", ctypes.c_int32),
    ]


class AttentionStruct(ctypes.Structure):
    """`struct attention_call` of attention.c."""

    _fields_ = [
        ("out", ctypes.c_void_p),
        ("q", ctypes.c_void_p),
        ("k", ctypes.c_void_p),
        ("v", ctypes.c_void_p),
        ("block_ids", ctypes.c_void_p),
        ("query_starts", ctypes.c_void_p),
        ("context_lens", ctypes.c_void_p),
        ("num_sequences", ctypes.c_int32),
        ("num_heads", ctypes.c_int32),
        ("num_kv_heads", ctypes.c_int32),
        ("head_dim", ctypes.c_int32),
        ("block_size", ctypes.c_int32),
        ("max_blocks", ctypes.c_int32),
        ("window", ctypes.c_int32),
        ("kv_is_bfloat16", ctypes.c_int32),
        ("scale", ctypes.c_float),
    ]


class RotateStruct(ctypes.Structure):
    """`struct rotate_call` of layer.c."""

    _fields_ = [
        ("q", ctypes.c_void_p),
        ("qkv", ctypes.c_void_p),
        ("cos", ctypes.c_void_p),
        ("sin", ctypes.c_void_p),
        ("cache_rows", ctypes.c_void_p),
        ("k", ctypes.c_void_p),
        ("v", ctypes.c_void_p),
        ("num_heads", ctypes.c_int32),
        ("num_kv_heads", ctypes.c_int32),
        ("head_dim", ctypes.c_int32),
        ("kv_is_bfloat16", ctypes.c_int32),
    ]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SharedObject:
    """The kernels at one vector width, with the number of threads that a call may use.

    The functions take what their C sources say, tensors as `pointer(tensor)`.
    """

    level: str
    num_threads: int
    linear: Any
    run_experts: Any
    paged_attention: Any
    add_norm: Any
    rotate_into_cache: Any
    swiglu: Any
    add_gated: Any
    draw_tokens: Any
    pack: Any


def pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


@functools.cache
def _open(path: Path) -> tuple[ctypes.CDLL, int] | None:
    try:
        opened = ctypes.CDLL(str(path))
    except OSError:
        return None
    return opened, opened.cpu_level()


def load_shared_object(level: str | None = None, num_threads: int = 1, path: Path | None = None) -> SharedObject | None:
    """The kernels at the best level of this CPU (or at `level`), None where they aren't built or can't run here."""
    opened = _open(path or shared_object_path())
    if opened is None:
        return None
    functions, num_levels = opened
    runnable = LEVELS[:num_levels]
    if not runnable or level not in (None, *runnable):
        return None
    level = level or runnable[-1]
    address, integer = ctypes.c_void_p, ctypes.c_int

    def function(name: str, result: Any, *arguments: Any) -> Any:
        found = functions[name]  # a new object each time, unlike an attribute
        found.restype, found.argtypes = result, arguments
        return found

    return SharedObject(
        level=level,
        num_threads=num_threads,
        linear=function(f"linear_{level}", None, address, address, integer, address, address, integer),
        run_experts=function(
            f"run_experts_{level}",
            None,
            *(address, integer, address, integer, integer, address, address, address, integer, address, integer),
        ),
        paged_attention=function(f"paged_attention_{level}", None, address, integer),
        add_norm=function(
            f"add_norm_{level}", None, address, address, address, ctypes.c_float, integer, integer, address, integer
        ),
        rotate_into_cache=function(f"rotate_into_cache_{level}", None, address, integer, integer),
        swiglu=function(f"swiglu_{level}", None, address, integer, integer, address, integer),
        add_gated=function(f"add_gated_{level}", None, address, address, address, integer, integer, integer),
        draw_tokens=function(
            f"draw_tokens_{level}", None, address, integer, integer, address, address, address, integer
        ),
        pack=function("pack", None, address, integer, integer, integer, address),
    )
