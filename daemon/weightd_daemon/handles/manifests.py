"""The manifests of resident checkpoints, and the leases that are locks on them (all of them, in weightd 0.1)."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from weightd_daemon.core.checkpoint import CheckpointKey

from .kernel_locks import HandleLocksUnclearError, first_lock, lock_byte, locked_bytes
from .segment_table import HandleSegmentTable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from weightd_daemon.core.lease import Lease

LOCK_BASE = 1 << 40
"""Lease n is byte LOCK_BASE + n of its manifest: past any content."""


class ManifestHandles:
    """Manifests of all resident checkpoints as descriptors to hand out, and the locks on them.

    `before_lock` is told the number of each lease before its lock is put on a manifest.
    """

    def __init__(self, before_lock: Callable[[int], None] = lambda _: None) -> None:
        self._descriptors: dict[CheckpointKey, int] = {}
        self._tables: dict[CheckpointKey, HandleSegmentTable] = {}
        self._crowded: dict[CheckpointKey, tuple[int, int]] = {}
        self._numbers: dict[CheckpointKey, int] = {}
        self.before_lock = before_lock

    def add(
        self, key: CheckpointKey, descriptor: int, table: HandleSegmentTable | None = None, *, number: int = 0
    ) -> None:
        """Take over the descriptor of a manifest.

        `table` says where the tensors lie that the manifest names; `number` is the one under which the service manager
        keeps it, 0 if it does not.
        """
        self._descriptors[key] = descriptor
        self._tables[key] = table or HandleSegmentTable(())
        self._numbers[key] = number

    def table(self, key: CheckpointKey) -> HandleSegmentTable:
        """Where a checkpoint's tensors lie, by name."""
        return self._tables[key]

    def number(self, key: CheckpointKey) -> int:
        """Under which number a manifest is kept; 0 where it is not."""
        return self._numbers[key]

    def remove(self, key: CheckpointKey) -> None:
        """Give a manifest up; those who map it keep it."""
        os.close(self._descriptors.pop(key))
        del self._tables[key]
        self._crowded.pop(key, None)
        del self._numbers[key]

    def inherited(self, key: CheckpointKey, last: int) -> list[int] | None:
        """The numbers of the leases, up to `last`, that an earlier daemon gave and that are held.

        None where they cannot be told apart: a lock on more than one byte is nobody's lease, and hides those that lie
        under it; and nobody shall hold up the start with very many. Then `hold_as_one` is due.
        """
        try:
            found = locked_bytes(self._descriptors[key], LOCK_BASE + 1, LOCK_BASE + last + 1)
        except HandleLocksUnclearError:
            return None
        return [byte - LOCK_BASE for byte in found]

    def hold_as_one(self, key: CheckpointKey, number: int, last: int) -> None:
        """Lease `number` counts as held from now on as long as any byte of the leases up to `last` is locked."""
        self._crowded[key] = (number, last)

    def lock_ranges(self) -> Iterator[tuple[int, int, int]]:
        """The descriptor of each manifest, and from where to before where leases are locked on it.

        Manifests that are removed before it is their turn are left out.
        """
        for key in list(self._descriptors):
            if key in self._descriptors:
                yield self._descriptors[key], LOCK_BASE, LOCK_BASE << 1

    def size(self, key: CheckpointKey) -> int:
        """Length of the encoded manifest."""
        return os.fstat(self._descriptors[key]).st_size

    def lock(self, key: CheckpointKey, number: int) -> int:
        """A fresh read-only descriptor of the manifest with the lock of lease `number`; the caller closes it.

        `before_lock` is due first.
        """
        return lock_byte(self._descriptors[key], LOCK_BASE + number)

    def open(self, key: CheckpointKey) -> int:
        """A fresh read-only descriptor of the manifest; the caller closes it. Errors: OSError."""
        return os.open(f"/proc/self/fd/{self._descriptors[key]}", os.O_RDONLY | os.O_CLOEXEC)

    def is_locked(self, lease: Lease) -> bool:
        """Whether the lock of a lease is still there."""
        key = lease.checkpoint
        if not isinstance(key, CheckpointKey) or key not in self._descriptors:
            return False
        number, last = self._crowded.get(key, (0, 0))
        low, high = (1, last) if lease.number == number else (lease.number, lease.number)
        return first_lock(self._descriptors[key], LOCK_BASE + low, LOCK_BASE + high + 1) is not None

    def close(self) -> None:
        """Give every manifest up."""
        for key in list(self._descriptors):
            self.remove(key)
