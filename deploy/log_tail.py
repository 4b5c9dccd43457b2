"""What the parts of a service on this machine log, on one stream: the lines of JSON in Ray's files of their stderr."""

from __future__ import annotations

import contextlib
import threading
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

EVERY_S = 0.25


@contextlib.contextmanager
def followed(directory: Path, stream: TextIO) -> Iterator[None]:
    """Copies whole lines to the stream while the body runs. directory: the session's logs."""
    stop = threading.Event()
    seen: dict[Path, int] = defaultdict(int)

    def follow() -> None:
        while not stop.wait(EVERY_S):
            copy()

    def copy() -> None:
        for path in directory.glob("worker-*.err"):
            with path.open("rb") as file:
                file.seek(seen[path])
                text = file.read()
            whole = text[: text.rfind(b"\n") + 1]
            seen[path] += len(whole)
            for line in whole.splitlines():
                if line.startswith(b'{"time"'):
                    stream.write(line.decode(errors="replace") + "\n")
        stream.flush()

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        copy()
