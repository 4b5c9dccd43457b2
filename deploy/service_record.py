"""Which services this user has started on this machine: one small file each, so that `down` finds them."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from actors.processes import Process, process


@dataclass(frozen=True, slots=True)
class Record:
    url: str
    process: Process


@contextlib.contextmanager
def recorded(url: str, port: int) -> Iterator[None]:
    """The file is there while the body runs."""
    me, path = process(os.getpid()), None
    with contextlib.suppress(OSError):
        path = _directory() / f"{port}.json"
        path.write_text(json.dumps({"url": url, "pid": me.pid, "started": me.started}), encoding="utf-8")
    try:
        yield
    finally:
        if path is not None:
            path.unlink(missing_ok=True)


def services() -> list[Record]:
    """Those that still run; the files of others are removed."""
    found = []
    for path in sorted(_directory().glob("*.json")):
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            record = Record(str(data["url"]), Process(int(data["pid"]), int(data["started"])))
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if record.process.is_alive:
            found.append(record)
        else:
            path.unlink(missing_ok=True)
    return found


def _directory() -> Path:
    """Ours alone: nobody else may put a pid there for us to signal. Raises ValueError where it isn't."""
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")  # gone after a logout, where the variable is still set
    path = Path(runtime if os.access(runtime, os.W_OK) else tempfile.gettempdir(), f"expertmesh-{os.getuid()}")
    path.mkdir(mode=0o700, exist_ok=True)
    if path.is_symlink() or path.stat().st_uid != os.getuid() or path.stat().st_mode & 0o077:
        raise ValueError(f"{path} belongs to somebody else or is open to others; remove it")
    return path
