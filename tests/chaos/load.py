"""A steady load whose answers are known, and the longest gap that any of its streams saw."""

from __future__ import annotations

import http.client
import json
import threading
import time
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit


@dataclass
class Load:
    """`num_streams` threads, each asking one prompt after the other from the same few, until stop().

    gaps: (begin, end) of pauses above `notable_s` between two tokens of a stream, in time.monotonic(). num_gaps and
    sum_gaps_s count all of them.
    """

    url: str
    model: str
    num_streams: int = 16
    num_tokens: int = 120
    notable_s: float = 0.02
    answers: dict[int, list[int]] = field(default_factory=dict)
    num_sent: int = 0
    num_finished: int = 0
    wrong: list[str] = field(default_factory=list)
    gaps: list[tuple[float, float]] = field(default_factory=list)
    latest: dict[int, float] = field(default_factory=dict)  # stream -> time of its last token
    num_gaps: int = 0
    sum_gaps_s: float = 0.0

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []

    def body(self, number: int) -> dict[str, Any]:
        """Request `number`: greedy when even, drawn with a seed of its own when odd."""
        return {
            "model": self.model,
            "prompt": [3 + (7 * number + 5 * i) % 250 for i in range(4 + number % 13)],
            "max_tokens": self.num_tokens,
            "temperature": 0.8 * (number % 2),
            "seed": number,
            "ignore_eos": True,
            "return_token_ids": True,
            "stream": True,
        }

    def learn(self) -> None:
        """Compute the answers, while nothing fails."""

        def ask(number: int) -> None:
            self.answers[number], _ = self._ask(number)

        askers = [threading.Thread(target=ask, args=(number,)) for number in range(self.num_streams)]
        for asker in askers:
            asker.start()
        for asker in askers:
            asker.join()
        assert len(self.answers) == self.num_streams and all(
            len(ids) == self.num_tokens for ids in self.answers.values()
        )

    def start(self) -> None:
        self._threads = [threading.Thread(target=self._run, args=(i,), daemon=True) for i in range(self.num_streams)]
        for thread in self._threads:
            thread.start()

    def stop(self, timeout_s: float = 150.0) -> None:
        self._stop.set()
        end = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))

    def between_tokens_s(self, measure_s: float) -> float:
        """The mean time between two tokens of a stream during the next measure_s."""
        num_gaps, sum_gaps_s = self.num_gaps, self.sum_gaps_s
        time.sleep(measure_s)
        return (self.sum_gaps_s - sum_gaps_s) / (self.num_gaps - num_gaps)

    def wait_for_all(self, timeout_s: float = 60.0) -> None:
        """Until every stream has got a token from now on."""
        now = time.monotonic()
        while any(last < now for last in list(self.latest.values())):
            assert time.monotonic() < now + timeout_s, "a stream stands still"
            time.sleep(0.01)

    def longest_gap_s(self, begin: float, end: float) -> float:
        """The longest pause of any stream that overlaps [begin, end]."""
        with self._lock:
            return max((b - a for a, b in self.gaps if b >= begin and a <= end), default=0.0)

    def _run(self, number: int) -> None:
        while not self._stop.is_set():
            with self._lock:
                self.num_sent += 1
            try:
                ids, error = self._ask(number)
            except (OSError, http.client.HTTPException, ValueError) as broken:
                ids, error = [], f"{type(broken).__name__}: {broken}"
            with self._lock:
                self.num_finished += 1
                expected = self.answers[number]
                if error or ids != expected:
                    at = next((i for i, (a, b) in enumerate(zip(ids, expected, strict=False)) if a != b), len(ids))
                    self.wrong.append(f"request {number}: {error or 'other tokens'}, from token {at} of {len(ids)} on")
            if error:
                time.sleep(0.5)

    def _ask(self, number: int) -> tuple[list[int], str]:
        """The token ids, and what went wrong."""
        address = urlsplit(self.url)
        connection = http.client.HTTPConnection(str(address.hostname), address.port, timeout=150)
        try:
            body = json.dumps(self.body(number))
            connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            if answer.status != 200:
                return [], f"HTTP {answer.status}: {answer.read()[:300]!r}"
            return self._read(number, answer)
        finally:
            connection.close()

    def _read(self, number: int, answer: http.client.HTTPResponse) -> tuple[list[int], str]:
        ids: list[int] = []
        last: float | None = None
        for line in answer:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                return ids, str(event["error"])[:300]
            for choice in event.get("choices", ()):
                if new := choice.get("token_ids"):
                    ids += new
                    now = self.latest[number] = time.monotonic()
                    if last is not None:
                        with self._lock:
                            self.num_gaps += 1
                            self.sum_gaps_s += now - last
                            if now - last > self.notable_s:
                                self.gaps.append((last, now))
                    last = now
        return ids, ""
