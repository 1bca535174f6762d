"""The digest index: which blobs the tensors of a file were when it was last read. sqlite, on a thread of its own.

An entry names blob *instances*: it saves reading only while these very blobs are resident. It is kept by file identity
and used only for files whose identity can be trusted (loader/source.py). A damaged index is renamed and begun anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import sqlite3
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from weightd_daemon.loads.instances import Instance

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from weightd.types import FileIdentity

log = logging.getLogger(__name__)
T = TypeVar("T")

FILE_NAME = "digests-v1.sqlite3"
_ROW = struct.Struct("<QQ16sIQ")
_MAX_FILES = 20_000
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


class DigestIndex:
    """An index below `folder`. Blob numbers mean something only within one `epoch`: the life of one set of books."""

    def __init__(self, folder: Path, epoch: str | None = None) -> None:
        self.path = folder / FILE_NAME
        self.problem = ""
        """Why it cannot be used now; empty while it can."""
        self.failures = 0
        """Times that a file could not be looked up or remembered."""
        self._epoch = epoch or secrets.token_hex(16)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="digest-index")
        self._database: sqlite3.Connection | None = None
        self._clock = 0

    def begin(self) -> None:
        """See whether it can be written to, and say so if not. Waits for nothing: the folder may hang."""
        self._thread.submit(self._try)

    async def get(self, identity: FileIdentity) -> list[Instance]:
        """What is known of a file in this epoch; empty when nothing is."""
        return await self._on_thread(self._get, identity)

    async def put(self, identity: FileIdentity, instances: Sequence[Instance]) -> None:
        """Remember a file."""
        await self._on_thread(self._put, identity, instances)

    async def close(self) -> None:
        """Close the database."""
        await self._on_thread(self._close)
        self._thread.shutdown()

    async def _on_thread(self, call: Callable[..., T], *arguments: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, call, *arguments)

    def _get(self, identity: FileIdentity) -> list[Instance]:
        row = self._execute(
            "SELECT instances FROM files WHERE epoch = ? AND device = ? AND inode = ? AND size = ? AND mtime_ns = ? "
            "AND ctime_ns = ?",
            (self._epoch, *_signed(identity)),
        )
        self.failures += row is None
        packed = row[0][0] if row else b""
        if len(packed) % _ROW.size:
            return []  # a damaged row: what cannot be read is not known
        return [Instance(*fields) for fields in _ROW.iter_unpack(packed)]

    def _put(self, identity: FileIdentity, instances: Sequence[Instance]) -> None:
        self._clock += 1
        packed = b"".join(_ROW.pack(*instance) for instance in instances)
        if self._execute(_PUT, (*_signed(identity), self._epoch, packed), writes=True) is None:
            self.failures += 1
        elif self._clock % 100 == 0:
            self._execute(
                "DELETE FROM files WHERE (device, inode, size, mtime_ns, ctime_ns) IN (SELECT device, inode, size, "
                "mtime_ns, ctime_ns FROM files ORDER BY used DESC LIMIT -1 OFFSET ?)",
                (_MAX_FILES,),
                writes=True,
            )

    def _try(self) -> None:
        self._execute("PRAGMA user_version = 1", (), writes=True)

    def _execute(
        self, statement: str, parameters: tuple[object, ...], *, writes: bool = False
    ) -> list[tuple[bytes]] | None:
        """Run a statement. None where it failed: whatever is wrong with a cache costs speed, never a load."""
        reason = ""
        for _ in range(2):
            try:
                with self._open() as database:
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
            self._database.execute("PRAGMA journal_mode = WAL")
            self._database.execute("PRAGMA synchronous = NORMAL")
            self._database.execute(_SCHEMA)
            self._database.execute(_BY_USE)
        return self._database

    def _set_aside(self, error: sqlite3.DatabaseError | OSError) -> None:
        self._close()
        if isinstance(error, sqlite3.OperationalError | OSError):
            return
        damaged = self.path.with_name(f"{FILE_NAME}.damaged")
        with contextlib.suppress(OSError):  # then it stays, and cannot be used
            for suffix in ("-wal", "-shm"):
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
    """
    path = folder / FILE_NAME
    query = "SELECT instances FROM files WHERE device = ? AND inode = ? AND size = ? AND mtime_ns = ? AND ctime_ns = ?"
    found: dict[FileIdentity, dict[tuple[int, int], bytes]] = {}
    try:
        before = _on_disk(path)
        if before.log != before.shared:
            return {}  # its owner was cut off, and has to mend it
        # Where no daemon has it open, even a reader would make these two files, unless it is told that nothing changes.
        options = "mode=ro" if before.log else "mode=ro&immutable=1"
        uri = f"{path.absolute().as_uri()}?{options}"
        with contextlib.closing(sqlite3.connect(uri, uri=True, timeout=0)) as database:
            for identity in files:
                for (packed,) in database.execute(query, _signed(identity)):
                    if isinstance(packed, bytes) and len(packed) % _ROW.size == 0:
                        instances = map(Instance._make, _ROW.iter_unpack(packed))
                        found[identity] = {(each.offset, each.length): each.digest for each in instances}
        return found if before.log or _on_disk(path) == before else {}
    except (sqlite3.Error, OSError):
        return {}


class _OnDisk(NamedTuple):
    """The state of an index: whether sqlite's two files are beside it, as long as it is open, and when it changed."""

    log: bool
    shared: bool
    inode: int
    size: int
    mtime_ns: int


def _on_disk(path: Path) -> _OnDisk:
    log, shared = (os.path.exists(f"{path}{suffix}") for suffix in ("-wal", "-shm"))
    status = path.stat()
    return _OnDisk(log, shared, status.st_ino, status.st_size, status.st_mtime_ns)


def _signed(identity: FileIdentity) -> tuple[int, ...]:
    """sqlite's integers are signed; device and inode numbers are not."""
    return tuple(value - (1 << 64) if value >= 1 << 63 else value for value in identity)
