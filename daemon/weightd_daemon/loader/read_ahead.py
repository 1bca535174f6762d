"""Reading ahead: the kernel is asked for what reader threads will need next, so that they seldom wait for a disk.

The kernel reads ahead by itself where one reader goes through a file. Reader threads share a descriptor, and their
turns look like jumps; tensors of several sizes and files end each run early; and how far ahead it goes is the
administrator's setting, often 128 KiB. So once a read would have to wait, the kernel is asked for the next bytes in the
order in which threads will read them, across tensors and files, as far as a window reaches.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from .schedule import LoaderTensor, LoaderUnit
    from .source import LoaderSource

WINDOW = 32 << 20
"""Bytes that are on their way or read, and not used yet, of each row: what a fast disk delivers in 5 ms."""

STEP = 4 << 20
"""Bytes that the window moves at a time."""


class LoaderReadAhead:
    """Reads pieces of tensors. `rows` are the units of each thread, in the order in which it works them off.

    Nothing is asked for before the first read of a row that would have to wait, so what is in the page cache costs no
    more than reading it. Filesystems that cannot tell count as waiting. Ahead of a tensor in no row nothing is read.
    """

    def __init__(self, sources: Sequence[LoaderSource], rows: Iterable[Iterable[LoaderUnit]] = ()) -> None:
        self._sources = sources
        self._places: dict[int, tuple[_Row, int]] = {}
        """Of a tensor, by its number: its row, and its position there."""
        for units in rows:
            row = _Row(sources)
            for unit in units:
                position = row.append(unit.file, unit.start, unit.end)
                for tensor in unit.tensors:
                    self._places[tensor.number] = row, position + tensor.spec.offset - unit.start

    def read_into(self, view: memoryview, tensor: LoaderTensor, offset: int = 0) -> None:
        """Fill `view` from byte `offset` of a tensor on, beyond its end where neighbours follow.

        Errors: those of LoaderSource.read_into.
        """
        source, start, done = self._sources[tensor.file], tensor.spec.offset + offset, 0
        if (place := self._places.get(tensor.number)) is not None:
            row, position = place
            if not row.waits:
                done = source.read_cached(view, start)
                row.waits = done < len(view)
            if row.waits:
                row.reach(position + offset)
        if done < len(view):
            source.read_into(view[done:], start + done)


class _Extent(NamedTuple):
    """Bytes of a file that follow each other there and in the row."""

    position: int
    file: int
    start: int
    length: int


class _Row:
    """What one thread reads, in this order, and how far the kernel was asked for it."""

    def __init__(self, sources: Sequence[LoaderSource]) -> None:
        self.waits = False
        """Whether a read had to wait: from then on the kernel is asked ahead."""
        self._sources = sources
        self._extents: list[_Extent] = []
        self._length = 0
        self._asked = 0
        self._next = 0
        """The extent that `_asked` lies in."""
        self._asking = threading.Lock()

    def append(self, file: int, start: int, end: int) -> int:
        """Add bytes of a file at the end. Returns their position in the row."""
        position = self._length
        self._length += end - start
        last = self._extents[-1] if self._extents else None
        if last is not None and (last.file, last.start + last.length) == (file, start):
            self._extents[-1] = last._replace(length=last.length + end - start)
        else:
            self._extents.append(_Extent(position, file, start, end - start))
        return position

    def reach(self, position: int) -> None:
        """Ask for what follows a position, up to the window's end."""
        end = min(position + WINDOW, self._length)
        if end < min(self._asked + STEP, self._length) or self._asked == self._length:
            return
        with self._asking:
            begin = max(self._asked, position)  # what was cached before the first wait is not asked for
            if end <= begin:
                return
            extents = list(self._between(begin, end))
            self._asked = end
        for file, start, length in extents:
            self._sources[file].will_need(start, length)

    def _between(self, begin: int, end: int) -> Iterator[tuple[int, int, int]]:
        """(file, start, length) of the bytes between two positions."""
        while self._next < len(self._extents):
            extent = self._extents[self._next]
            first, last = max(begin, extent.position), min(end, extent.position + extent.length)
            if first < last:
                yield extent.file, extent.start + first - extent.position, last - first
            if extent.position + extent.length > end:
                return
            self._next += 1
