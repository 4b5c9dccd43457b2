"""The compiled kernels as Python functions over tensors. ctypes frees the GIL while they run."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from model.native.build import shared_object_path

LEVELS = ("avx2", "avx512", "avx512bf16", "amx")
"""From slow to fast. All give the same bits, but products with bfloat16 weights round otherwise in AMX's tiles, and
`avx512bf16` takes what is below 1.2e-38 for 0 in those with bfloat16 inputs too."""


def struct_fields(pointers: str, integers: str, floats: str = "") -> list[tuple[str, Any]]:
    """Of a struct that has its pointers first, then its int32s, then its floats: names with spaces between them."""
    kinds = ((pointers, ctypes.c_void_p), (integers, ctypes.c_int32), (floats, ctypes.c_float))
    return [(name, kind) for names, kind in kinds for name in names.split()]


class WeightStruct(ctypes.Structure):
    """`struct weight` of native.h."""

    _fields_ = struct_fields(
        "data scales zeros input_order codebooks exception_starts exceptions",
        "format num_outputs num_inputs block_size bfloat16_inputs most_exceptions",
    )


class AttentionLayerStruct(ctypes.Structure):
    """`struct attention_layer` of decoder.c."""

    _fields_ = struct_fields(
        "x delta norm qkv qkv_bias o cos sin cache_rows k v block_ids query_starts context_lens y",
        "num_tokens num_sequences num_heads num_kv_heads head_dim block_size max_blocks window kv_is_bfloat16",
        "eps scale",
    )


class RouteStruct(ctypes.Structure):
    """`struct route_call` of decoder.c."""

    _fields_ = struct_fields("x delta norm gate normed ids weights shared_gate", "num_tokens top_k normalize", "eps")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SharedObject:
    """The kernels at one vector width, with the number of threads that a call may use.

    The functions take what their C sources say, tensors as `pointer(tensor)`.
    """

    level: str
    num_threads: int
    linear: Any
    run_experts: Any
    attention_layer: Any
    route: Any
    mlp: Any
    add_norm: Any
    add_gated: Any
    draw_tokens: Any
    quantize_int8: Any
    quantize_int4: Any
    pack: Any
    compact: Any
    """None at levels that don't read compact panels."""


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
            integer,
            *(address, integer, address, integer, integer),
            *(address, address, address, integer, address, integer, integer),
        ),
        attention_layer=function(f"attention_layer_{level}", None, address, integer),
        route=function(f"route_{level}", None, address, integer),
        mlp=function(f"mlp_{level}", None, address, address, address, integer, address, integer),
        add_norm=function(
            f"add_norm_{level}", None, address, address, address, ctypes.c_float, integer, integer, address, integer
        ),
        add_gated=function(f"add_gated_{level}", None, address, address, address, integer, integer, integer),
        draw_tokens=function(
            f"draw_tokens_{level}", None, address, integer, integer, address, address, address, integer
        ),
        quantize_int8=function(f"quantize_int8_{level}", None, address, integer, integer, integer, address, address),
        quantize_int4=function(
            f"quantize_int4_{level}", None, *(address, integer, integer, integer, integer, address, address, address)
        ),
        pack=function("pack", None, address, integer, integer, integer, address),
        compact=function(
            f"compact_{level}", integer, *(address, integer, integer, address, address, address, address, integer)
        )
        if level != "avx2"
        else None,
    )
