"""Leases as kernel locks, and the manifests of resident checkpoints.

A lease is a read lock on one byte of a file that is opened afresh for it (kernel_locks.py): a lease file of its user
(lease_files.py) or, as in 0.1, the manifest. The descriptor goes to the client, which maps it and closes it: the lock
lives as long as that mapping. Asking whether a lease is still held takes some microseconds where a file has few.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, NamedTuple

from weightd_daemon.core.checkpoint import CheckpointKey

from .kernel_locks import LocksUnclearError, first_lock, lock_byte, locked_bytes
from .segment_table import SegmentTable

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from weightd_daemon.core.lease import Lease

    from .lease_files import LeaseFiles, Owner

LOCK_BASE = 1 << 40
"""Lease n is byte LOCK_BASE + n of its manifest: past any content."""


class Manifests:
    """The manifests of all resident checkpoints, and the locks on them.

    `before_lock` is told the number of each lease before its lock is put on a manifest.
    """

    def __init__(self, before_lock: Callable[[int], None] = lambda _: None) -> None:
        self._descriptors: dict[CheckpointKey, int] = {}
        self._tables: dict[CheckpointKey, SegmentTable] = {}
        self._crowded: dict[CheckpointKey, tuple[int, int]] = {}
        self._numbers: dict[CheckpointKey, int] = {}
        self.before_lock = before_lock

    def add(self, key: CheckpointKey, descriptor: int, table: SegmentTable | None = None, number: int = 0) -> None:
        """Take over the descriptor of a manifest, which is kept under a number; 0 is none.

        `table` says where the tensors lie that it names.
        """
        self._descriptors[key] = descriptor
        self._numbers[key] = number
        self._tables[key] = table or SegmentTable(())

    def number(self, key: CheckpointKey) -> int:
        """Under which number a manifest is kept; 0 where it is not."""
        return self._numbers[key]

    def table(self, key: CheckpointKey) -> SegmentTable:
        """Where a checkpoint's tensors lie, by name."""
        return self._tables[key]

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
        except LocksUnclearError:
            return None
        return [byte - LOCK_BASE for byte in found]

    def hold_as_one(self, key: CheckpointKey, number: int, last: int) -> None:
        """Lease `number` counts as held from now on as long as any byte of the leases up to `last` is locked."""
        self._crowded[key] = (number, last)

    def size(self, key: CheckpointKey) -> int:
        """Length of the encoded manifest."""
        return os.fstat(self._descriptors[key]).st_size

    def lock(self, key: CheckpointKey, number: int) -> int:
        """A fresh read-only descriptor of the manifest with the lock of lease `number`; the caller closes it."""
        self.before_lock(number)
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


class Locked(NamedTuple):
    """Descriptors for a client, which the caller closes: of a manifest, and of its lease where that is another one."""

    manifest: int
    lease: int | None

    def close(self) -> None:
        """Close both."""
        for descriptor in self:
            if descriptor is not None:
                os.close(descriptor)


class LeaseLocks:
    """The locks of all leases: on lease files, or on manifests.

    On manifests are those of clients that know no other (0.1), of users for whom no lease file could be made, and of
    admins on checkpoints of other users. What else a client locks on a manifest counts for nothing but these.
    """

    def __init__(self, manifests: Manifests, files: LeaseFiles) -> None:
        self._manifests = manifests
        self._files = files

    def room(self, owner: Owner) -> Awaitable[None] | None:
        """What has to be awaited before `lock`, if anything; see LeaseFiles.room."""
        return self._files.room(owner)

    def lock(self, key: CheckpointKey, number: int, owner: Owner | None) -> Locked:
        """Take the lock of lease `number` for a client: on a file of its user, or without `owner` on the manifest.

        Errors: OSError.
        """
        if owner is None or owner.domain != key.domain:
            return Locked(self._manifests.lock(key, number), None)
        self._manifests.before_lock(number)
        lease = self._files.lock(owner, self._manifests.number(key), number)
        if lease is None:
            return Locked(self._manifests.lock(key, number), None)
        try:
            return Locked(self._manifests.open(key), lease)
        except BaseException:
            os.close(lease)
            raise

    def is_locked(self, lease: Lease) -> bool:
        """Whether the lock of a lease is still there."""
        on_file = self._files.is_locked(lease.number)
        return self._manifests.is_locked(lease) if on_file is None else on_file

    def forget(self, number: int) -> None:
        """A lease is struck from the books."""
        self._files.forget(number)
