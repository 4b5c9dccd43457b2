"""One safetensors file: its header, and reads of exactly the bytes asked for.

Format: 8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, then the tensors.
https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_MAX_READ_BYTES = 1 << 30  # one read call moves less than 2 GiB on Linux


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies; `offset` counts from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


class SafetensorsFile:
    """Reads the header at once, tensors on request. Keeps no file handle open and maps no memory."""

    def __init__(self, path: Path) -> None:
        """Raises ValueError when the file is missing, truncated or malformed."""
        self.path = path
        self.entries = _read_entries(path)

    def read(self, name: str, first: int = 0, shape: tuple[int, ...] | None = None) -> Tensor:
        """A tensor in its stored dtype, or of `shape` from its element `first` on, reading only that part.

        A fresh copy on the CPU. Raises ValueError when the file is gone, or not what it was.
        """
        entry = self.entries[name]
        dtype = TORCH_DTYPES[entry.dtype]
        shape = entry.shape if shape is None else shape
        offset, num_bytes = entry.offset + first * dtype.itemsize, math.prod(shape) * dtype.itemsize
        buffer = torch.empty(num_bytes, dtype=torch.uint8)
        target = buffer.numpy().data
        try:
            with self.path.open("rb", buffering=0) as file:
                done = 0
                while done < num_bytes:
                    count = os.preadv(file.fileno(), [target[done : done + _MAX_READ_BYTES]], offset + done)
                    if count == 0:
                        raise ValueError(
                            f"{self.path} ended inside tensor {name!r}: it changed while in use; fetch it again"
                        )
                    done += count
        except OSError as error:
            raise ValueError(f"{self.path} cannot be read: {error.strerror}; fetch the checkpoint again") from None
        return buffer.view(dtype).view(shape)


def _read_entries(path: Path) -> dict[str, TensorEntry]:
    try:
        with path.open("rb") as file:
            file_bytes = os.fstat(file.fileno()).st_size
            header_bytes = int.from_bytes(file.read(8), "little")
            if file_bytes < 8 + header_bytes:
                raise ValueError(
                    f"{path} is truncated or not safetensors: its header should have {header_bytes} bytes, the whole "
                    f"file has {file_bytes}; fetch it again"
                )
            header_json = file.read(header_bytes)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}; fetch the checkpoint again") from None
    try:
        header = json.loads(header_json)
    except (ValueError, RecursionError):
        raise ValueError(f"{path} is not safetensors: its header is no JSON; fetch it again") from None
    entries = {}
    try:
        for name, info in header.items():
            if name != "__metadata__":
                (start, end), shape = info["data_offsets"], tuple(info["shape"])
                are_counts = all(type(number) is int and 0 <= number < 2**63 for number in (start, end, *shape))
                if not are_counts or start > end:
                    raise ValueError
                entries[name] = TensorEntry(str(info["dtype"]), shape, 8 + header_bytes + start, end - start)
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ValueError(
            f"{path} is not safetensors: its header has no dtype, shape and offsets; fetch it again"
        ) from None
    needed_bytes = max((entry.offset + entry.num_bytes for entry in entries.values()), default=0)
    if file_bytes < needed_bytes:
        raise ValueError(
            f"{path} is truncated: its tensors need {needed_bytes} bytes, the file has {file_bytes}; fetch it again"
        )
    for name, entry in entries.items():
        dtype = TORCH_DTYPES.get(entry.dtype)
        if dtype is not None and entry.num_bytes != (expected := math.prod(entry.shape) * dtype.itemsize):
            raise ValueError(
                f"{path}: tensor {name!r} has {entry.num_bytes} bytes, expected {expected} for {entry.dtype} "
                f"{list(entry.shape)}; fetch it again"
            )
    return entries
