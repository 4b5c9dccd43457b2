"""What `expertmesh serve` shows: its own lines, with `json` those of all parts, and nothing that Ray prints."""

from __future__ import annotations

import contextlib
import io
import logging
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

EVERY_S = 0.25
log = logging.getLogger("expertmesh.ray")


class WithoutRay(io.TextIOBase):
    """A stream without what Ray's threads print: that goes to the log. (Ray has a paragraph for each process that ends,
    also for those that we end.)"""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        if not threading.current_thread().name.startswith("ray_"):
            return self._stream.write(text)
        if text.strip():
            log.info("Ray: %s", text.strip())
        return len(text)

    def flush(self) -> None:
        self._stream.flush()

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()


@contextlib.contextmanager
def repeating(work: Callable[[], None], every_s: float) -> Iterator[None]:
    """Does the work again and again on a thread while the body runs, and a last time at its end."""
    stop = threading.Event()

    def repeat() -> None:
        while not stop.wait(every_s):
            work()
        work()

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(timeout=3)


@contextlib.contextmanager
def followed(directory: Path, stream: TextIO) -> Iterator[None]:
    """Copies whole lines to the stream while the body runs. directory: the session's logs."""
    seen: dict[Path, int] = defaultdict(int)

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

    with repeating(copy, EVERY_S):
        yield
