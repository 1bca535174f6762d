"""The digest index: which blobs held a file's tensors when the file was last read. sqlite, on its own thread.

An entry names blob *instances*: it saves reading only while these very blobs are resident. It is kept by file identity
and used only for files whose identity can be trusted (loader/source.py). A damaged index is renamed and begun anew.

Nothing of it is mapped: a mapping of a file that is cut ends the process. So it has a rollback journal instead of a log
with an index in shared memory, and each row has a checksum, for a wrong row could make a tensor another's.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
import secrets
import sqlite3
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from weightd_daemon.loads.instances import LoadedInstance

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from weightd.types import FileIdentity

log = logging.getLogger(__name__)
T = TypeVar("T")

FILE_NAME = "digests-v1.sqlite3"
_ROW = struct.Struct("<QQ16sIQ")
_CHECKSUM_BYTES = 16
_HEADER = struct.Struct(">16sHBB")
"""How sqlite's file begins: its name, the page size, and how it is written and read."""
_ROLLBACK = 1
_MAX_FILES = 20_000
_FORGET_AFTER = 100
"""Files that are remembered until old ones are looked for."""
_CACHE_KIB = 256
"""Of the file that sqlite keeps in the daemon's memory: the kernel has the file as well, so more saves no time."""
_SCHEMA = """
CREATE TABLE IF NOT EXISTS files (
    device INTEGER NOT NULL, inode INTEGER NOT NULL, size INTEGER NOT NULL,
    mtime_ns INTEGER NOT NULL, ctime_ns INTEGER NOT NULL,
    epoch TEXT NOT NULL, used INTEGER NOT NULL, instances BLOB NOT NULL,
    PRIMARY KEY (device, inode, size, mtime_ns, ctime_ns)
) WITHOUT ROWID
"""


_BY_USE = "CREATE INDEX IF NOT EXISTS by_use ON files (used)"
_PUT = "INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?, ?, (SELECT coalesce(max(used), 0) + 1 FROM files), ?)"
"""`used` is a count, by which files are forgotten. It was a time once, of a clock that may have been ahead."""
_GET = (
    "SELECT instances FROM files WHERE epoch = ? AND device = ? AND inode = ? AND size = ? AND mtime_ns = ? "
    "AND ctime_ns = ?"
)
_FORGET = (
    "DELETE FROM files WHERE (device, inode, size, mtime_ns, ctime_ns) IN (SELECT device, inode, size, "
    "mtime_ns, ctime_ns FROM files ORDER BY used DESC LIMIT -1 OFFSET ?)"
)


class PersistentDigestIndex:
    """Digest index on disk, below `folder`. Blob numbers are valid within one `epoch`: the life of one set of books."""

    def __init__(self, folder: Path, epoch: str | None = None) -> None:
        self.path = folder / FILE_NAME
        self.problem = ""
        """Why it cannot be used now; empty while it can."""
        self.failures = 0
        """Times that a file could not be looked up or remembered."""
        self._epoch = epoch or secrets.token_hex(16)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="digest-index")
        self._database: sqlite3.Connection | None = None
        self._put_since = 0

    def begin(self) -> None:
        """See whether it can be written to, and say so if not. Waits for nothing: the folder may hang."""
        self._thread.submit(self._try)

    async def get(self, files: Iterable[FileIdentity]) -> dict[FileIdentity, list[LoadedInstance]]:
        """What is known of files in this epoch; those of which nothing is are left out."""
        return await self._on_thread(self._get, files)

    async def put(self, files: Mapping[FileIdentity, Sequence[LoadedInstance]]) -> None:
        """Remember files, in one transaction: a checkpoint may have hundreds."""
        await self._on_thread(self._put, files)

    async def close(self) -> None:
        """Close the database."""
        await self._on_thread(self._close)
        self._thread.shutdown()

    async def _on_thread(self, call: Callable[..., T], *arguments: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, call, *arguments)

    def _get(self, files: Iterable[FileIdentity]) -> dict[FileIdentity, list[LoadedInstance]]:
        found: dict[FileIdentity, list[LoadedInstance]] = {}
        asked = list(files)
        for number, identity in enumerate(asked):
            rows = self._execute(_GET, [(self._epoch, *_signed(identity))])
            if rows is None:  # it would keep this thread, which all loads share, for seconds a file
                self.failures += len(asked) - number
                break
            if rows and (instances := _unpack(rows[0][0], self._epoch, identity)):
                found[identity] = instances
        return found

    def _put(self, files: Mapping[FileIdentity, Sequence[LoadedInstance]]) -> None:
        rows = [
            (*_signed(identity), self._epoch, _pack(instances, self._epoch, identity))
            for identity, instances in files.items()
        ]
        if self._execute(_PUT, rows, writes=True) is None:
            self.failures += len(files)
            return
        self._put_since += len(files)
        if self._put_since >= _FORGET_AFTER:
            self._put_since = 0
            self._execute(_FORGET, [(_MAX_FILES,)], writes=True)

    def _try(self) -> None:
        self._execute("PRAGMA user_version = 1", [()], writes=True)

    def _execute(
        self, statement: str, rows: Sequence[tuple[object, ...]], *, writes: bool = False
    ) -> list[tuple[bytes]] | None:
        """Run a statement for each row of parameters, in one transaction; returns what the last one found.

        None where it failed, and then nothing is changed: whatever is wrong with a cache costs speed, never a load.
        """
        reason = ""
        for _ in range(2):
            try:
                found: list[tuple[bytes]] = []
                with self._open() as database:
                    for parameters in rows:
                        found = database.execute(statement, parameters).fetchall()
            except (sqlite3.DatabaseError, OSError) as error:
                reason = getattr(error, "strerror", None) or str(error)
                self._set_aside(error)
            else:
                if writes:  # one that can be read only is still no use
                    self._works()
                return found
        self._fails(reason)
        return None

    def _works(self) -> None:
        if self.problem:
            log.info("digest index %s can be used again", self.path)
        self.problem = ""

    def _fails(self, reason: str) -> None:
        if not self.problem:
            log.warning("digest index %s cannot be used: %s; loads go on, and read more", self.path, reason)
        self.problem = reason

    def _open(self) -> sqlite3.Connection:
        if self._database is None:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))  # of why not, sqlite says less
            self._database = sqlite3.connect(self.path, timeout=2.0, check_same_thread=False)
            os.chmod(self.path, 0o600)
            # Exclusively until it has another journal: an index of weightd 0.1 would map its log's index.
            for pragma in ("mmap_size = 0", f"cache_size = -{_CACHE_KIB}", "locking_mode = EXCLUSIVE",
                           "journal_mode = TRUNCATE", "locking_mode = NORMAL", "synchronous = OFF"):  # fmt: skip
                self._database.execute(f"PRAGMA {pragma}").fetchall()
            self._database.execute(_SCHEMA)
            self._database.execute(_BY_USE)
        return self._database

    def _set_aside(self, error: sqlite3.DatabaseError | OSError) -> None:
        self._close()
        # What we ask is always right, so an SQLITE_ERROR is of the file, too: a format or a table that is not ours.
        strange = getattr(error, "sqlite_errorname", "") == "SQLITE_ERROR"
        if isinstance(error, sqlite3.OperationalError | OSError) and not strange:
            return
        damaged = self.path.with_name(f"{FILE_NAME}.damaged")
        with contextlib.suppress(OSError):  # then it stays, and cannot be used
            for suffix in ("-journal", "-wal", "-shm"):
                Path(f"{self.path}{suffix}").unlink(missing_ok=True)
            self.path.replace(damaged)
            log.warning("digest index is damaged (%s); it is now %s, and begun anew", error, damaged)

    def _close(self) -> None:
        if self._database is not None:
            self._database.close()
            self._database = None


def known_digests(folder: Path, files: Iterable[FileIdentity]) -> dict[FileIdentity, dict[tuple[int, int], bytes]]:
    """The digests that an index below `folder` knows of these files, by offset and length, in bytes.

    Of any epoch: what the bytes of an unchanged file are does not depend on which blobs held them. For readers beside
    the daemon: changes and makes nothing, does not wait, and whatever is wrong with the index, it then knows nothing.
    An index of weightd 0.1 is left to its daemon, or to the next one, which gives it another journal.
    """
    path = folder / FILE_NAME
    query = (
        "SELECT epoch, instances FROM files WHERE device = ? AND inode = ? AND size = ? AND mtime_ns = ? "
        "AND ctime_ns = ?"
    )
    found: dict[FileIdentity, dict[tuple[int, int], bytes]] = {}
    try:
        with path.open("rb") as file:
            *_, written, read = _HEADER.unpack(file.read(_HEADER.size).ljust(_HEADER.size, b"\0"))
        if (written, read) != (_ROLLBACK, _ROLLBACK) or os.path.exists(f"{path}-wal"):
            return {}
        # With a journal in it, the owner is in the midst of a change, or was cut off: sqlite refuses to read then.
        uri = f"{path.absolute().as_uri()}?mode=ro"
        with contextlib.closing(sqlite3.connect(uri, uri=True, timeout=0)) as database:
            database.execute("PRAGMA mmap_size = 0")
            for identity in files:
                for epoch, packed in database.execute(query, _signed(identity)):
                    instances = _unpack(packed, epoch, identity)
                    if instances:
                        found[identity] = {(each.offset, each.length): each.digest for each in instances}
        return found
    except (sqlite3.Error, OSError):
        return {}


def _pack(instances: Sequence[LoadedInstance], epoch: str, identity: FileIdentity) -> bytes:
    """A row: the instances, and a checksum over them and what they are of."""
    packed = b"".join(_ROW.pack(*instance) for instance in instances)
    return packed + _checksum(packed, epoch, identity)


def _unpack(row: object, epoch: object, identity: FileIdentity) -> list[LoadedInstance]:
    """The instances of a row; none of one that is damaged, or was written by weightd 0.1."""
    if not isinstance(row, bytes) or len(row) % _ROW.size != _CHECKSUM_BYTES:
        return []
    packed = row[:-_CHECKSUM_BYTES]
    if row[-_CHECKSUM_BYTES:] != _checksum(packed, epoch, identity):
        return []
    return [LoadedInstance(*fields) for fields in _ROW.iter_unpack(packed)]


def _checksum(packed: bytes, epoch: object, identity: FileIdentity) -> bytes:
    hasher = hashlib.blake2b(f"{epoch} {tuple(identity)} ".encode(), digest_size=_CHECKSUM_BYTES)
    hasher.update(packed)
    return hasher.digest()


def _signed(identity: FileIdentity) -> tuple[int, ...]:
    """sqlite's integers are signed; device and inode numbers are not."""
    return tuple(value - (1 << 64) if value >= 1 << 63 else value for value in identity)
