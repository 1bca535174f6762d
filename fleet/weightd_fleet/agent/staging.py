"""The staging folder of a fetch: rows that were verified and not yet taken by their sink, each a file of its own.

    staging/HEX.lock            held by the fetch of `b3:HEX` that is under way
    staging/HEX/DIGEST          a row, verified
    staging/HEX/DIGEST.part     a row that is being received; the next fetch removes it, unless it is whole

A fetch that is killed leaves its rows, and the next one finds them. It verifies them, and each again when it is used:
so none needs to be on the disk before the next one is received, and one that a crash has cut off is fetched again.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import time
from typing import TYPE_CHECKING, Final, Self

from weightd import _failpoints
from weightd._references.files import show
from weightd.errors import CapacityError, DaemonBusyError, DigestMismatchError, FormatError, WeightdError
from weightd_fleet.core.digests import new_hasher

from .blobs import file_pieces

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_SUFFIX: Final = ".part"


class IncomingRow:
    """A row that is being received: `digest` and `length` are what it must come to.

    It is a context manager, at whose end a row that was not kept is removed.
    """

    def __init__(self, folder: Path, digest: bytes, length: int) -> None:
        self.digest = digest
        self.length = length
        self.received = 0
        self._path = folder / digest.hex()
        self._hasher = new_hasher()
        with disk_errors(folder):
            self._file = open(f"{self._path}{_SUFFIX}", "wb", buffering=0)  # noqa: SIM115  # the block's end closes it

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        with contextlib.suppress(OSError):  # usually it has been kept, and is not there under this name
            os.unlink(f"{self._path}{_SUFFIX}")

    def write(self, data: bytes) -> None:
        """Add the next bytes. Errors: FormatError (more than the row has), CapacityError (the disk is full)."""
        self.received += len(data)
        if self.received > self.length:
            raise FormatError(f"row {self.digest.hex()[:16]}: comes with more bytes than the manifest says")
        self._hasher.update(data)
        with disk_errors(self._path.parent):
            _failpoints.reach("fetch.write")
            view = memoryview(data)
            while view:
                view = view[self._file.write(view) :]

    def verify(self) -> None:
        """Errors: DigestMismatchError (the bytes are others)."""
        if self.received != self.length or self._hasher.digest() != self.digest:
            raise DigestMismatchError(f"row {self.digest.hex()[:16]}: comes with other bytes than the manifest says")

    def keep(self) -> None:
        """Enter the row among those that are verified."""
        with disk_errors(self._path.parent):
            _failpoints.reach("fetch.keep")
            os.rename(f"{self._path}{_SUFFIX}", self._path)


class StagingFolder:
    """The rows of one fetch, which has the folder for itself. It is a BlobReader."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with disk_errors(folder):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._rows: dict[bytes, int] = {}
            for path in list(folder.iterdir()):
                name = path.name.removesuffix(_SUFFIX)
                if not _is_digest(name) or not _is_whole(path, bytes.fromhex(name)):
                    path.unlink()
                    continue
                os.rename(path, folder / name)
                self._rows[bytes.fromhex(name)] = (folder / name).stat().st_size

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._rows

    def receive(self, digest: bytes, length: int) -> IncomingRow:
        """A row to write to."""
        return IncomingRow(self.folder, digest, length)

    def enter(self, row: IncomingRow) -> None:
        """Verify a row and keep it. Errors: DigestMismatchError."""
        row.verify()
        row.keep()
        self._rows[row.digest] = row.length

    def pieces(self, digest: bytes) -> Iterator[memoryview]:
        """The bytes of a row, in pieces. Errors: FormatError."""
        path = self.folder / digest.hex()
        with open(path, "rb", buffering=0) as file:
            yield from file_pieces(file.fileno(), 0, self._rows[digest], show(path))

    def drop(self, digest: bytes) -> None:
        """Remove a row, if it is there."""
        if self._rows.pop(digest, None) is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.folder / digest.hex())

    def remove(self) -> None:
        """Remove the folder with all rows."""
        shutil.rmtree(self.folder, ignore_errors=True)


@contextlib.contextmanager
def staging(root: Path, digits: str, wait_seconds: float) -> Iterator[StagingFolder]:
    """The staging folder of a checkpoint, `digits` of its name; one fetch at a time has it, in any process.

    Errors: DaemonBusyError (another fetch of it goes on for longer than `wait_seconds`), CapacityError, WeightdError.
    """
    with disk_errors(root):
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(root / f"{digits}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        deadline = time.monotonic() + wait_seconds
        while not _locked(lock):
            if time.monotonic() > deadline:
                raise DaemonBusyError(f"b3:{digits}: another fetch of it is under way on this node; wait for its end")
            time.sleep(0.05)
        yield StagingFolder(root / digits)
    finally:
        os.close(lock)


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_whole(path: Path, digest: bytes) -> bool:
    """Whether a row that a killed fetch left has all its bytes."""
    hasher = new_hasher()
    with open(path, "rb", buffering=0) as file:
        for piece in file_pieces(file.fileno(), 0, os.fstat(file.fileno()).st_size, show(path)):
            hasher.update(piece)
    return hasher.digest() == digest


def _is_digest(name: str) -> bool:
    return len(name) == 64 and not name.strip("0123456789abcdef")


@contextlib.contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn errors of the disk into CapacityError (it is full) and WeightdError."""
    try:
        yield
    except OSError as error:
        if isinstance(error, WeightdError):
            raise
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CapacityError(
                f"{show(folder)}: the disk is full; free some space and fetch again, what is verified is kept"
            ) from error
        raise WeightdError(f"{show(folder)}: cannot be written: {error.strerror}") from error
