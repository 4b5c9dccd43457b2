"""Build the kernels beside their sources: `python -m model.native.build`.

Needs a C compiler that knows AMX (gcc 11 or later), but neither torch nor Python headers. Does nothing when the shared
object of these sources is there and loads.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCE_DIRECTORY = Path(__file__).parent
_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni")
_AVX512_BF16 = (*_AVX512, "-mavx512bf16")
_AMX = (*_AVX512_BF16, "-mamx-tile", "-mamx-int8", "-mamx-bf16")
_LEVEL_FLAGS = {"avx2": _AVX2, "avx512": _AVX512, "avx512bf16": _AVX512_BF16, "amx": _AMX}
_SOURCES_OF_EACH_LEVEL = (
    *("linear.c", "experts.c", "attention.c", "layer.c", "decoder.c"),
    *("quantize.c", "sampling.c"),
)
_SOURCES_OF_LEVEL = {
    "avx512": ("compact.c",),
    "avx512bf16": ("compact.c",),
    "amx": ("compact.c", "amx.c", "amx_bfloat16.c"),
}
_PLAIN_SOURCES = ("cpu.c", "pack.c", "threads.c")
# No contraction: a multiply-add is fused where the source says so, or the two levels would round differently.
_FLAGS = ["-O2", "-std=gnu11", "-fPIC", "-Wall", "-Wextra", "-ffp-contract=off", "-fno-math-errno", "-pthread"]


def source_hash(directory: Path = SOURCE_DIRECTORY) -> str:
    """Identifies the sources and flags that a shared object was built from."""
    recipe = _FLAGS, _LEVEL_FLAGS, _SOURCES_OF_EACH_LEVEL, _SOURCES_OF_LEVEL, _PLAIN_SOURCES
    digest = hashlib.sha256(repr(recipe).encode())
    for path in sorted([*directory.glob("*.c"), *directory.glob("*.h")]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def shared_object_path(directory: Path = SOURCE_DIRECTORY) -> Path:
    """Where the shared object of these sources is, or belongs: a stale one has another name and is never loaded."""
    return directory / f"_kernels_{source_hash(directory)}.so"


def build(target_directory: Path = SOURCE_DIRECTORY) -> Path:
    """Compile into `target_directory` and return the path. Raises RuntimeError with the compiler's words."""
    target = target_directory / shared_object_path().name
    if _loads(target):
        return target
    if platform.machine() not in ("x86_64", "AMD64"):
        raise RuntimeError(f"no native kernels for {platform.machine()}: they are written for x86-64")
    compiler = shlex.split(os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or "")
    if not compiler:
        raise RuntimeError("no C compiler found: install gcc 11 or later, or set CC to one")
    target_directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target_directory, prefix=".build-") as scratch:
        objects: list[tuple[str, tuple[str, ...], str]] = [(source, (), f"{source}.o") for source in _PLAIN_SOURCES]
        for level, flags in _LEVEL_FLAGS.items():
            sources = _SOURCES_OF_EACH_LEVEL + _SOURCES_OF_LEVEL.get(level, ())
            objects += [(source, flags, f"{source}.{level}.o") for source in sources]
        commands = [
            [*compiler, *_FLAGS, *flags, "-c", str(SOURCE_DIRECTORY / source), "-o", f"{scratch}/{name}"]
            for source, flags, name in objects
        ]
        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            list(pool.map(_run, commands))
        built = f"{scratch}/{target.name}"
        _run([*compiler, "-shared", "-pthread", *(f"{scratch}/{name}" for _, _, name in objects), "-lm", "-o", built])
        os.replace(built, target)  # atomic: another process may be building too
    for stale in target_directory.glob("_kernels_*.so"):
        if stale != target:
            stale.unlink(missing_ok=True)
    return target


def _loads(path: Path) -> bool:
    """False also where it was built for another machine or a newer libc."""
    try:
        ctypes.CDLL(str(path))
    except OSError:
        return False
    return True


def _run(command: list[str]) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise RuntimeError(f"{' '.join(command)} failed: {getattr(error, 'stderr', '') or error}") from None


if __name__ == "__main__":
    try:
        print(build())
    except RuntimeError as error:
        sys.exit(f"native kernels not built, torch will do the work: {error}")
