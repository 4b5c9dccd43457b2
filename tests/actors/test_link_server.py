"""The router's end of a link: whom it cuts off, and whom it waits for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from actors.link_server import MAX_BACKLOG_BYTES, MAX_SLOW_BACKLOG_BYTES, UNREAD_S, Outlet


@dataclass
class Writer:
    """An asyncio.StreamWriter and its transport; the test says what the peer takes."""

    backlog: int = 0
    is_cut: bool = False
    now: float = 0.0

    @property
    def transport(self) -> Writer:
        return self

    def get_write_buffer_size(self) -> int:
        return self.backlog

    def write(self, line: bytes) -> None:
        self.backlog += len(line)

    def abort(self) -> None:
        self.is_cut = True


class Line(bytes):
    """As long as it says, without the memory."""

    def __new__(cls, size: int) -> Self:
        line = super().__new__(cls)
        line.size = size  # type: ignore[attr-defined]
        return line

    def __len__(self) -> int:
        return int(self.size)  # type: ignore[attr-defined]


def test_an_ingress_that_takes_nothing_of_a_large_backlog_is_cut_off_in_time() -> None:
    writer = Writer()
    outlet = Outlet(writer, lambda: writer.now)  # type: ignore[arg-type]
    outlet.write(Line(3 * MAX_BACKLOG_BYTES))  # one answer, however long, is no reason
    outlet.write(Line(10))
    writer.now += UNREAD_S - 1
    outlet.write(Line(10))
    assert not writer.is_cut
    writer.now += 2
    outlet.write(Line(10))
    assert writer.is_cut


def test_an_ingress_that_reads_slowly_keeps_its_link_until_too_much_waits_for_it() -> None:
    writer = Writer()
    outlet = Outlet(writer, lambda: writer.now)  # type: ignore[arg-type]
    while writer.backlog <= MAX_SLOW_BACKLOG_BYTES:
        assert not writer.is_cut
        outlet.write(Line(2 * MAX_BACKLOG_BYTES))
        writer.backlog -= 1000
        writer.now += UNREAD_S - 1
    outlet.write(Line(10))
    assert writer.is_cut


def test_an_ingress_that_took_all_but_little_is_no_silent_one_later() -> None:
    writer = Writer()
    outlet = Outlet(writer, lambda: writer.now)  # type: ignore[arg-type]
    outlet.write(Line(10))
    writer.now, writer.backlog = 1000.0, 0
    outlet.write(Line(3 * MAX_BACKLOG_BYTES))
    outlet.write(Line(10))
    assert not writer.is_cut
