"""Leases: kernel locks on the manifests of resident checkpoints.

For each lease the manifest is opened afresh and a read lock (F_OFD_SETLK) is put on one byte that stands for it. The
descriptor goes to the client, which maps it and closes it: the lock lives exactly as long as that open file, that is as
long as any mapping of it, in forked children too, and whether or not this daemon lives. Asking whether a lease is still
held (F_OFD_GETLK) takes some microseconds where there are few; the kernel looks at the locks one after the other, which
at 30,000 on one manifest takes 0.2 ms and more.
"""

from __future__ import annotations

import fcntl
import os
import struct
import time
from typing import TYPE_CHECKING

from weightd_daemon.core.checkpoint import CheckpointKey

from .segment_table import SegmentTable

if TYPE_CHECKING:
    from collections.abc import Callable

    from weightd_daemon.core.lease import Lease

LOCK_BASE = 1 << 40
"""Lease n is byte LOCK_BASE + n of its manifest: past any content."""

LOOK_SECONDS = 0.2
"""How long the leases of an earlier daemon are looked for on one manifest; each takes longer, the more there are."""

_FLOCK = struct.Struct("hhqqi4x")


class Manifests:
    """The manifests of all resident checkpoints, and the locks on them.

    `before_lock` is told the number of each lease before its lock is put on a manifest.
    """

    def __init__(self, before_lock: Callable[[int], None] = lambda _: None) -> None:
        self._descriptors: dict[CheckpointKey, int] = {}
        self._tables: dict[CheckpointKey, SegmentTable] = {}
        self._crowded: dict[CheckpointKey, tuple[int, int]] = {}
        self._before_lock = before_lock

    def add(self, key: CheckpointKey, descriptor: int, table: SegmentTable | None = None) -> None:
        """Take over the descriptor of a manifest; `table` says where the tensors lie that it names."""
        self._descriptors[key] = descriptor
        self._tables[key] = table or SegmentTable(())

    def table(self, key: CheckpointKey) -> SegmentTable:
        """Where a checkpoint's tensors lie, by name."""
        return self._tables[key]

    def remove(self, key: CheckpointKey) -> None:
        """Give a manifest up; those who map it keep it."""
        os.close(self._descriptors.pop(key))
        del self._tables[key]
        self._crowded.pop(key, None)

    def inherited(self, key: CheckpointKey, last: int) -> list[int] | None:
        """The numbers of the leases, up to `last`, that an earlier daemon gave and that are held.

        None where they cannot be told apart: a lock on more than one byte is nobody's lease, and hides those that lie
        under it; and nobody shall hold up the start with very many. Then `hold_as_one` is due.
        """
        held: list[int] = []
        spans = [(1, last + 1)]
        end_of_looking = time.monotonic() + LOOK_SECONDS
        while spans:
            low, high = spans.pop()
            found = self._first_lock(key, low, high) if low < high else None
            if found is None:
                continue
            start, end = found
            if end - start != 1 or time.monotonic() > end_of_looking:
                return None
            held.append(start)
            spans += [(low, start), (end, high)]
        return sorted(held)

    def hold_as_one(self, key: CheckpointKey, number: int, last: int) -> None:
        """Lease `number` counts as held from now on as long as any byte of the leases up to `last` is locked."""
        self._crowded[key] = (number, last)

    def size(self, key: CheckpointKey) -> int:
        """Length of the encoded manifest."""
        return os.fstat(self._descriptors[key]).st_size

    def lock(self, key: CheckpointKey, number: int) -> int:
        """A fresh read-only descriptor of the manifest with the lock of lease `number`; the caller closes it."""
        self._before_lock(number)
        descriptor = os.open(f"/proc/self/fd/{self._descriptors[key]}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.fcntl(
                descriptor, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, LOCK_BASE + number, 1, 0)
            )
        except OSError:
            os.close(descriptor)
            raise
        return descriptor

    def is_locked(self, lease: Lease) -> bool:
        """Whether the lock of a lease is still there."""
        key = lease.checkpoint
        if not isinstance(key, CheckpointKey) or key not in self._descriptors:
            return False
        number, last = self._crowded.get(key, (0, 0))
        low, high = (1, last) if lease.number == number else (lease.number, lease.number)
        return self._first_lock(key, low, high + 1) is not None

    def close(self) -> None:
        """Give every manifest up."""
        for key in list(self._descriptors):
            self.remove(key)

    def _first_lock(self, key: CheckpointKey, low: int, high: int) -> tuple[int, int] | None:
        """One lock on the bytes of the leases from `low` to before `high`, as far as it is in there; None without."""
        wanted = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, LOCK_BASE + low, high - low, 0)
        answer = fcntl.fcntl(self._descriptors[key], fcntl.F_OFD_GETLK, wanted)
        kind, _, start, length, _ = _FLOCK.unpack(answer)
        if kind == fcntl.F_UNLCK:
            return None
        end = start + length - LOCK_BASE if length else high  # 0: to the end of all files
        return max(low, start - LOCK_BASE), min(high, end)
