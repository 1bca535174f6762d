"""CheckBooks: what the daemon's books say, against what the kernel and the devices' drivers say.

The books are in motion while loads and evictions are under way. So what does not agree is asked for again, and what is
on its way in or out of a segment counts for either side.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from weightd._proto.v1 import inspection_pb2
from weightd_daemon.handles.kernel_locks import HandleLocksUnclearError
from weightd_daemon.turns import LoopTurn

if TYPE_CHECKING:
    from collections.abc import Mapping

    from weightd_daemon.core.memory import MemoryAccounting
    from weightd_daemon.core.store import ContentStore
    from weightd_daemon.devices.device import Device
    from weightd_daemon.handles.lease_locks import HandleLeaseLocks

_ATTEMPTS = 10
_PAUSE_SECONDS = 0.3
_MEMFD = re.compile(r"/memfd:weightd-(\d+|[a-z]+)")
_SEGMENT = "segment"

KERNEL, LOCKS, DRIVER = "memfds of the daemon", "kernel locks", "the device, whoever uses it"


@dataclass(frozen=True, slots=True)
class BooksFigure:
    """One figure: of the books, and as `source` says it; None where that cannot say. They agree from `least` to `most`.

    `device` is a UUID, empty for the daemon as a whole; figures are bytes or counts.
    """

    device: str
    what: str
    books: int
    least: int
    most: int | None
    found: int | None
    source: str
    in_bytes: bool = False

    @property
    def agrees(self) -> bool:
        if self.found is None:
            return True
        return self.least <= self.found and (self.most is None or self.found <= self.most)


class BooksCheck:
    """Compares the books with what is there. It changes nothing."""

    def __init__(self, store: ContentStore, devices: Mapping[str, Device], locks: HandleLeaseLocks) -> None:
        self._store = store
        self._devices = devices
        self._locks = locks

    async def check(self) -> inspection_pb2.CheckBooksResponse:
        """Every figure; one that does not agree does so after several looks."""
        figures = await self._look()
        for _ in range(_ATTEMPTS - 1):
            if all(figure.agrees for figure in figures):
                break
            await asyncio.sleep(_PAUSE_SECONDS)
            figures = await self._look()
        response = inspection_pb2.CheckBooksResponse()
        for figure in figures:
            response.figures.add(
                device=figure.device, what=figure.what, books=figure.books, found=figure.found, source=figure.source,
                agrees=figure.agrees, in_bytes=figure.in_bytes,
            )  # fmt: skip
        return response

    async def _look(self) -> list[BooksFigure]:
        memfds = await asyncio.to_thread(_memfds)
        figures: list[BooksFigure] = []
        for uuid, memory in self._store.memories.items():
            if uuid in self._store.absent:
                continue  # nobody can be asked
            device = self._devices[uuid]
            if device.sparse:
                figures.append(_exactly("segments", memory.segments, memfds[_SEGMENT], KERNEL, uuid))
                figures += await _memory_by_segment(uuid, memory, device)
            else:
                await device.refresh()
                free = device.available()
                taken = None if free is None else device.capacity() - free
                used = memory.used
                figures.append(BooksFigure(uuid, "memory", used, used, None, taken, DRIVER, in_bytes=True))
        figures.append(_exactly("manifests", len(self._store.checkpoints), memfds["manifest"], KERNEL))
        figures.append(await self._leases())
        return figures

    async def _leases(self) -> BooksFigure:
        """Leases in the books, but for those without a lock, which wait for an attach."""
        try:
            locked: int | None = await self._locks.count_locks()
        except HandleLocksUnclearError:  # a client has locked more than a lease: nobody can tell them apart
            locked = None
        held = sum(not lease.waiting for lease in self._store.leases.refresh())
        return _exactly("leases", held, locked, LOCKS)


async def _memory_by_segment(uuid: str, memory: MemoryAccounting, device: Device) -> list[BooksFigure]:
    """The sum over all segments, and each segment with more memory than the books know of."""
    turn, books, found = LoopTurn(), 0, 0
    beyond: list[BooksFigure] = []
    for segment, domain in memory.domains().items():
        arena = memory.arena(domain)
        if segment not in arena:  # released since
            continue
        populated, allocated = arena.populated(segment), device.allocated(segment)
        books, found = books + populated, found + allocated
        if allocated > populated:
            beyond.append(
                BooksFigure(uuid, f"segment {segment}", populated, 0, populated, allocated, KERNEL, in_bytes=True)
            )
        if turn.is_over:
            await turn.next()
    moving = memory.in_flight + sum(memory.arena(domain).leaving for domain in set(memory.domains().values()))
    return [BooksFigure(uuid, "memory", books, books - moving, books, found, KERNEL, in_bytes=True), *beyond]


def _exactly(what: str, books: int, found: int | None, source: str, device: str = "") -> BooksFigure:
    return BooksFigure(device, what, books, books, books, found, source)


def _memfds() -> Counter[str]:
    """How many memfds of which kind this process has open, each counted once."""
    found: dict[int, str] = {}
    for number in os.listdir("/proc/self/fd"):
        path = f"/proc/self/fd/{number}"
        try:
            match = _MEMFD.match(os.readlink(path))
            if match is not None:
                found[os.stat(path).st_ino] = _SEGMENT if match[1].isdigit() else match[1]
        except FileNotFoundError:  # closed since
            continue
    return Counter(found.values())
