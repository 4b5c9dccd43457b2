"""A checkpoint directory: which file holds which tensor, and reading only what is asked for."""

from __future__ import annotations

import hashlib
import json
import math
import threading
from collections.abc import Collection
from pathlib import Path

import torch
from torch import Tensor

from model.safetensors_file import TORCH_DTYPES, SafetensorsFile

_INDEX = "model.safetensors.index.json"
_SINGLE_FILE = "model.safetensors"
_BASE_PREFIXES = ("model.", "transformer.", "")
_HEAD_NAMES = ("lm_head.", "score.", "qa_outputs.")
FLOATS = ("F32", "BF16", "F16")


class Checkpoint:
    """Tensors of a directory with `model.safetensors`, or with shards and an index. Reads lazily, never twice as much.

    The index may point into sibling directories ("../backbone/model-00001.safetensors"), so that several heads share
    one backbone. Every problem is a ValueError of one line that names the file or tensor, the expected and the found.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.bytes_read = 0
        """Bytes of tensor data read so far; headers and the index don't count."""
        self._lock = threading.Lock()
        self._files: dict[Path, SafetensorsFile] = {}
        self._paths = self._locate_tensors()
        self.prefix = self._find_prefix()
        """What stands before `layers.0`: "model." in nearly all checkpoints."""

    @property
    def names(self) -> Collection[str]:
        return self._paths.keys()

    def __contains__(self, name: str) -> bool:
        return name in self._paths

    def shape(self, name: str) -> tuple[int, ...]:
        return self._file(name).entries[name].shape

    def tensor(self, name: str, first: int = 0, shape: tuple[int, ...] | None = None) -> Tensor:
        """A tensor in its stored dtype on the CPU; with `shape`, only that part from its element `first` on."""
        file = self._file(name)
        dtype = file.entries[name].dtype
        if dtype not in TORCH_DTYPES:
            known = ", ".join(TORCH_DTYPES)
            raise ValueError(f"{file.path}: tensor {name!r} has dtype {dtype}, expected one of {known}")
        tensor = file.read(name, first, shape)
        with self._lock:
            self.bytes_read += tensor.nbytes
        return tensor

    def float_tensor(
        self, name: str, shape: tuple[int, ...], dtype: str | None, index: int | None = None, rows: slice | None = None
    ) -> Tensor:
        """A weight of this (whole) shape; kept as stored, or rounded to `dtype` where that isn't wider.

        With `index`, of its slice `[index]`, and with `rows`, of these rows of the matrix: only they are read.

        Never widens: a bfloat16 tensor stays so for dtype "float32", which would only take twice the memory.
        """
        wanted = self.float_dtype(name, shape, dtype)
        first, part = 0, shape
        if index is not None:
            part = part[1:]
            first = index * math.prod(part)
        if rows is not None:
            first += rows.start * math.prod(part[1:])
            part = (rows.stop - rows.start, *part[1:])
        return self.tensor(name, first, part).to(wanted)

    def float_dtype(self, name: str, shape: tuple[int, ...], dtype: str | None) -> torch.dtype:
        """The dtype that `float_tensor` returns."""
        self.check(name, shape, FLOATS)
        stored = TORCH_DTYPES[self._file(name).entries[name].dtype]
        wanted = stored if dtype is None else getattr(torch, dtype)
        return wanted if wanted.itemsize <= stored.itemsize else stored

    def check(self, name: str, shape: tuple[int, ...], dtypes: Collection[str]) -> None:
        """Raises ValueError unless the tensor is there, of this shape and one of these dtypes of safetensors."""
        file = self._file(name)
        entry = file.entries[name]
        if entry.shape != shape:
            raise ValueError(
                f"{file.path}: tensor {name!r} has shape {list(entry.shape)}, expected {list(shape)} by config.json; "
                "the weights and config.json belong to different models"
            )
        if entry.dtype not in dtypes:
            raise ValueError(
                f"{file.path}: tensor {name!r} has dtype {entry.dtype}, expected one of {', '.join(dtypes)}; "
                "convert the checkpoint"
            )

    def backbone_id(self) -> str:
        """A stable id of the files that hold the decoder and experts: equal for heads that share one backbone."""
        paths = {path for name, path in self._paths.items() if not name.startswith(_HEAD_NAMES)}
        return hashlib.sha256("\n".join(sorted(map(str, paths))).encode()).hexdigest()[:16]

    def _file(self, name: str) -> SafetensorsFile:
        path = self._paths.get(name)
        if path is None:
            raise ValueError(
                f"{self.directory}: tensor {name!r} is missing; the checkpoint is incomplete or not the model that "
                "config.json describes"
            )
        file = self._open(path)
        if name not in file.entries:
            raise ValueError(
                f"{path}: tensor {name!r} is missing, though {_INDEX} places it there; fetch the file again"
            )
        return file

    def _open(self, path: Path) -> SafetensorsFile:
        if path not in self._files:
            self._files[path] = SafetensorsFile(path)
        return self._files[path]

    def _locate_tensors(self) -> dict[str, Path]:
        index_path = self.directory / _INDEX
        if not index_path.is_file():
            path = (self.directory / _SINGLE_FILE).resolve()
            if not path.is_file():
                raise ValueError(
                    f"{self.directory} has neither {_SINGLE_FILE} nor {_INDEX}: expected a safetensors checkpoint; "
                    "check the path, or convert the weights with save_pretrained of transformers"
                )
            return dict.fromkeys(self._open(path).entries, path)
        try:
            weight_map = json.loads(index_path.read_text(encoding="utf-8"))["weight_map"]
            relative_paths = {str(name): str(file) for name, file in weight_map.items()}
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"{index_path} cannot be read as JSON: {error}; fetch it again") from None
        except (AttributeError, KeyError, TypeError):
            raise ValueError(f"{index_path} has no 'weight_map' of tensor names to files; fetch it again") from None
        paths = {file: self._resolve(index_path, file) for file in set(relative_paths.values())}
        return {name: paths[file] for name, file in relative_paths.items()}

    def _resolve(self, index_path: Path, file: str) -> Path:
        # Lexical: a symlink out of the directory (the Hugging Face cache has them) is fine, "../../x" is not.
        parts = Path(file).parts
        if Path(file).is_absolute() or ".." in parts[1:] or not parts:
            raise ValueError(
                f"{index_path} points to {file!r}: expected a file in its directory or in a sibling ('../other/...')"
            )
        try:
            path = (self.directory / file).resolve()
            is_there = path.is_file()
        except (OSError, ValueError, RuntimeError):  # too long, a null byte, half a character, a ring of links
            raise ValueError(f"{index_path} points to {file[:100]!r}, which can't be opened; fetch it again") from None
        if not is_there:
            raise ValueError(f"{path} is missing, and {index_path} needs it; fetch the checkpoint again")
        return path

    def _find_prefix(self) -> str:
        for prefix in _BASE_PREFIXES:
            if f"{prefix}embed_tokens.weight" in self._paths:
                return prefix
        raise ValueError(
            f"{self.directory}: tensor 'model.embed_tokens.weight' is missing; expected the tensors of a qwen2_moe "
            f"model, found {', '.join(sorted(self._paths)[:3]) or 'none'}"
        )
