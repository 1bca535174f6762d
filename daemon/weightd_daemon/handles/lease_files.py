"""Lease files: empty memfds whose locks are the leases of one user.

Only processes of that user get descriptors of it. So whatever a process locks, it holds no lease but its own user's. A
file takes FILE_LEASES leases, then the next one is made: the kernel looks at the locks of a file one after the other,
so asking about one lease costs the same however many there are.

The byte that is locked says which lease it is, and on which checkpoint; the file's name says whose. So a daemon that is
given the files of an earlier one finds every lease that is held, and needs no record of it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import time
from itertools import count
from typing import TYPE_CHECKING, NamedTuple, Protocol

from weightd_daemon.core.lease import LeasePeer

from .kernel_locks import HandleLocksUnclearError, first_lock, lock_byte, locked_bytes
from .manifest_file import is_manifest, make_sealed

if TYPE_CHECKING:
    from collections.abc import Awaitable, Iterator, Mapping

    from weightd_daemon.core.checkpoint import CheckpointKey
    from weightd_daemon.core.lease import LeaseTable

log = logging.getLogger(__name__)

FILE_LEASES = 256
"""Leases of one file."""

_LEASE_BITS = 36
_CHECKPOINT_BITS = 26
_NAME = re.compile(r"lck\.(\d{1,18})\.(\d{1,10}|none)\.([0-9a-z-]{0,40})")
_PAUSE_SECONDS = 60.0
"""After the service manager has not kept a file, leases are locks on manifests for so long."""


class HandleLeaseOwner(NamedTuple):
    """Whose leases a lease file has: a user (None: peers without an identity), on checkpoints of one domain."""

    uid: int | None
    domain: str


class _File:
    """One lease file. `leases` are those in the books; it is `open` for new ones as long as it has few locks."""

    def __init__(self, name: str, owner: HandleLeaseOwner, descriptor: int) -> None:
        self.name = name
        self.owner = owner
        self.descriptor = descriptor
        self.leases = 0
        self.open = True

    @property
    def has_room(self) -> bool:
        return self.open and self.leases < FILE_LEASES


class _Storage(Protocol):
    """Stores descriptors for the next daemon."""

    @property
    def stores(self) -> bool:
        """Whether anything outlives this daemon."""

    async def store(self, name: str, descriptor: int) -> None:
        """Store a descriptor under a name. When this returns, it is stored. Errors: OSError, TimeoutError; then not."""

    def drop(self, name: str) -> None:
        """Remove it from the store."""


class HandleLeaseFiles:
    """Lease files of all users, handed to clients to lock. They outlive the daemon from `store_in` on."""

    def __init__(self) -> None:
        self._storage: _Storage | None = None
        self._files: dict[HandleLeaseOwner, dict[_File, None]] = {}
        # Nothing but numbers and what is there already: the loop stands still while Python collects garbage, and that
        # takes the longer, the more objects there are.
        self._file_of: dict[int, _File] = {}
        self._byte_of: dict[int, int] = {}
        self._bytes_of: dict[int, tuple[int, int]] = {}
        """First byte and the one after the last, of leases that any of these bytes stands for."""
        self._empty: dict[_File, bool] = {}
        self._making: dict[HandleLeaseOwner, asyncio.Lock] = {}
        self._paused_until = 0.0
        self._numbers = count(1)

    def __len__(self) -> int:
        return sum(map(len, self._files.values()))

    def store_in(self, storage: _Storage) -> None:
        """Have every file kept before a lease is taken on it."""
        self._storage = storage

    def room(self, owner: HandleLeaseOwner) -> Awaitable[None] | None:
        """Have a file with room for one more lease of a user; what has to be awaited for that, if anything.

        Afterwards `lock` may still find none: another took it, or the service manager keeps no more. Errors: OSError.
        """
        if self._with_room(owner) is not None or time.monotonic() < self._paused_until:
            return None
        if self._storage is not None and self._storage.stores:
            return self._make_stored(owner, self._storage)
        self._add(self._make(owner))
        return None

    def lock(self, owner: HandleLeaseOwner, checkpoint: int, lease: int) -> int | None:
        """A fresh descriptor of a file with the lock of a lease; the caller closes it. None where no file has room.

        `checkpoint` is the number under which its manifest is kept, 0 where it is not. Errors: OSError.
        """
        file = self._with_room(owner)
        if file is None or checkpoint >> _CHECKPOINT_BITS or lease >> _LEASE_BITS:
            return None
        start = _first_byte(checkpoint) + lease
        descriptor = lock_byte(file.descriptor, start)
        self._enter(lease, file)
        self._byte_of[lease] = start
        return descriptor

    def is_locked(self, lease: int) -> bool | None:
        """Whether a lease is held; None where it has no place in a file."""
        file = self._file_of.get(lease)
        if file is None:
            return None
        at = self._byte_of.get(lease)
        start, end = self._bytes_of[lease] if at is None else (at, at + 1)
        return first_lock(file.descriptor, start, end) is not None

    def lock_ranges(self) -> Iterator[tuple[int, int, int]]:
        """The descriptor of each file, and from where to before where its leases are locked.

        Files that are removed before it is their turn are left out.
        """
        end = _first_byte(1 << _CHECKPOINT_BITS)
        for file in [file for files in self._files.values() for file in files]:
            if file in self._files.get(file.owner, ()):
                yield file.descriptor, 0, end

    def forget(self, lease: int) -> None:
        """A lease is struck from the books; that it has no file is no error."""
        file = self._file_of.pop(lease, None)
        if file is None:
            return
        self._byte_of.pop(lease, None)
        self._bytes_of.pop(lease, None)
        file.leases -= 1
        if not file.leases:
            self._empty[file] = False

    def tidy(self) -> None:
        """Remove the files that have had no lease since the last call: the next lease may come at once.

        A new file costs its user time, also where nothing is stored: a memfd takes as long to make and seal as a lease.
        """
        for file, seen in list(self._empty.items()):
            if seen:
                self._remove(file)
            else:
                self._empty[file] = True

    def adopt(
        self, given: Mapping[str, int], kept: Mapping[CheckpointKey, int], leases: LeaseTable, last: int, now: float
    ) -> set[str]:
        """Enter the leases, up to number `last`, whose locks are on the files of an earlier daemon.

        `given` is all that was kept, by name, and `kept` the number of each checkpoint that was taken up. Returns the
        names of the files, which are this object's now.
        """
        taken: set[str] = set()
        for name, descriptor in given.items():
            match = _NAME.fullmatch(name)
            if match is None or not is_manifest(descriptor):  # it is sealed and shut to others in the same way
                continue
            owner = HandleLeaseOwner(None if match[2] == "none" else int(match[2]), match[3])
            file = _File(name, owner, descriptor)
            self._numbers = count(max(int(match[1]) + 1, next(self._numbers)))
            self._add(file)
            taken.add(name)
            there = {number: key for key, number in kept.items() if key.domain == owner.domain}
            self._inherit(file, there, leases, last, now)
        return taken

    def close(self) -> None:
        """Close every file; what is kept stays kept, and so do the locks."""
        for files in self._files.values():
            for file in files:
                os.close(file.descriptor)
        self._files.clear()
        self._empty.clear()

    def _inherit(
        self, file: _File, there: Mapping[int, CheckpointKey], leases: LeaseTable, last: int, now: float
    ) -> None:
        peer = LeasePeer(connection=0, pid=None, uid=file.owner.uid, command="")
        try:
            found = locked_bytes(file.descriptor, 0, _first_byte(1 << _CHECKPOINT_BITS))
        except HandleLocksUnclearError:
            # Somebody has locked more than a byte, or very many: any lease of this user may lie under that.
            file.open = False
            for number, key in there.items():
                lease = leases.inherit_some(key, peer, now)
                self._enter(lease, file)
                self._bytes_of[lease] = _first_byte(number), _first_byte(number + 1)
            log.warning("leases of user %s cannot be told apart: one line a checkpoint stands for all", file.owner.uid)
            return
        for byte in found:
            number, lease = byte >> _LEASE_BITS, byte & (1 << _LEASE_BITS) - 1
            if number not in there or not 0 < lease <= last:
                continue  # on what is gone, or on what no daemon has lent
            if leases.get(lease) is None:
                leases.inherit(lease, there[number], peer, now)
            else:  # somebody has locked the byte of another's lease: that is to hold neither more nor less
                lease = leases.inherit_some(there[number], peer, now)
            self._enter(lease, file)
            self._byte_of[lease] = byte

    async def _make_stored(self, owner: HandleLeaseOwner, storage: _Storage) -> None:
        making = self._making.setdefault(owner, asyncio.Lock())
        async with making:
            if self._with_room(owner) is not None or time.monotonic() < self._paused_until:
                return
            file = self._make(owner)
            try:
                await storage.store(file.name, file.descriptor)
            except (OSError, TimeoutError) as error:
                os.close(file.descriptor)
                self._paused_until = time.monotonic() + _PAUSE_SECONDS
                log.warning("a lease file of user %s is not kept, and leases lock manifests for %.0f s: %s", owner.uid,
                            _PAUSE_SECONDS, str(error) or "the service manager does not answer")  # fmt: skip
            except BaseException:
                os.close(file.descriptor)
                storage.drop(file.name)
                raise
            else:
                self._add(file)
            finally:
                self._making.pop(owner, None)

    def _make(self, owner: HandleLeaseOwner) -> _File:
        name = f"lck.{next(self._numbers)}.{'none' if owner.uid is None else owner.uid}.{owner.domain}"
        return _File(name, owner, make_sealed("weightd-lease"))

    def _add(self, file: _File) -> None:
        self._files.setdefault(file.owner, {})[file] = None
        self._empty[file] = False

    def _remove(self, file: _File) -> None:
        del self._empty[file]
        files = self._files[file.owner]
        del files[file]
        if not files:
            del self._files[file.owner]
        os.close(file.descriptor)
        if self._storage is not None:
            self._storage.drop(file.name)

    def _enter(self, lease: int, file: _File) -> None:
        self._file_of[lease] = file
        file.leases += 1
        self._empty.pop(file, None)

    def _with_room(self, owner: HandleLeaseOwner) -> _File | None:
        return next((file for file in self._files.get(owner, ()) if file.has_room), None)


def _first_byte(checkpoint: int) -> int:
    return checkpoint << _LEASE_BITS
