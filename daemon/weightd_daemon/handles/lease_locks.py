"""Leases as kernel locks.

A lease is a read lock on one byte of a file that is opened afresh for it (kernel_locks.py): a lease file of its user
(lease_files.py) or, as in 0.1, the manifest. The descriptor goes to the client, which maps it and closes it: the lock
lives as long as that mapping. Asking whether a lease is still held takes some microseconds where a file has few.
"""

from __future__ import annotations

import asyncio
import itertools
import os
from typing import TYPE_CHECKING, NamedTuple

from .kernel_locks import locked_bytes

if TYPE_CHECKING:
    from collections.abc import Awaitable, Iterable

    from weightd_daemon.core.checkpoint import CheckpointKey
    from weightd_daemon.core.lease import Lease

    from .lease_files import HandleLeaseFiles, HandleLeaseOwner
    from .manifests import ManifestHandles

COUNTED_AT_ONCE = 32
"""Files whose locks are counted at a time: each takes a further descriptor, of which a full daemon may have few."""


class LockedHandles(NamedTuple):
    """Handles for a client, which the caller closes: descriptors of a manifest, and of its lease file if it has one."""

    manifest: int
    lease: int | None

    def close(self) -> None:
        """Close both."""
        for descriptor in self:
            if descriptor is not None:
                os.close(descriptor)


class HandleLeaseLocks:
    """Kernel locks on the descriptors handed to clients: each is a lease, on a lease file or on a manifest.

    On manifests are those of clients that know no other (0.1), of users for whom no lease file could be made, and of
    admins on checkpoints of other users. What else a client locks on a manifest counts for nothing but these.
    """

    def __init__(self, manifests: ManifestHandles, files: HandleLeaseFiles) -> None:
        self._manifests = manifests
        self._files = files

    def room(self, owner: HandleLeaseOwner) -> Awaitable[None] | None:
        """What has to be awaited before `lock`, if anything; see HandleLeaseFiles.room."""
        return self._files.room(owner)

    def lock(self, key: CheckpointKey, number: int, owner: HandleLeaseOwner | None) -> LockedHandles:
        """Take the lock of lease `number` for a client: on a file of its user, or without `owner` on the manifest.

        Errors: OSError.
        """
        self._manifests.before_lock(number)
        if owner is None or owner.domain != key.domain:
            return LockedHandles(self._manifests.lock(key, number), None)
        lease = self._files.lock(owner, self._manifests.number(key), number)
        if lease is None:
            return LockedHandles(self._manifests.lock(key, number), None)
        try:
            return LockedHandles(self._manifests.open(key), lease)
        except BaseException:
            os.close(lease)
            raise

    def is_locked(self, lease: Lease) -> bool:
        """Whether the lock of a lease is still there."""
        on_file = self._files.is_locked(lease.number)
        return self._manifests.is_locked(lease) if on_file is None else on_file

    async def count_locks(self) -> int:
        """How many bytes of lease files and manifests are locked, as the kernel says; books have no part in that.

        Errors: HandleLocksUnclearError, OSError (no descriptor is left).
        """
        ranges = itertools.chain(self._files.lock_ranges(), self._manifests.lock_ranges())
        locked = 0
        while some := list(itertools.islice(ranges, COUNTED_AT_ONCE)):
            locked += await _count(some)
        return locked

    def forget(self, number: int) -> None:
        """A lease is struck from the books."""
        self._files.forget(number)


async def _count(ranges: Iterable[tuple[int, int, int]]) -> int:
    """How many bytes are locked in ranges of files, counted on a thread: of copies, for the files may be closed."""
    copies: list[tuple[int, int, int]] = []
    try:
        for file, start, end in ranges:
            copies.append((os.dup(file), start, end))
        return await asyncio.to_thread(lambda: sum(len(locked_bytes(*one)) for one in copies))
    finally:
        for copy, _, _ in copies:
            os.close(copy)
