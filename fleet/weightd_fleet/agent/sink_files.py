"""The sink that is a folder: every file of the checkpoint byte for byte, in a hub's cache or as a plain folder."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from weightd import _failpoints
from weightd._references.files import show
from weightd.errors import InvalidReferenceError, WeightdError
from weightd_fleet.core.digests import new_hasher
from weightd_fleet.publishing.hub import HubCheck

from .blobs import copy_checked, file_pieces
from .local_blobs import file_identity
from .staging import disk_errors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from weightd_fleet.core.manifest import FleetManifest
    from weightd_fleet.core.manifest_rows import WeightFile

    from .blobs import BlobReader
    from .local_blobs import PublishedFiles


class FileLayoutOnDisk(Protocol):
    """Where files go."""

    @property
    def folder(self) -> Path:
        """The folder in which users find the files."""

    def place(self, path: str, hub_blob: str) -> Path:
        """Where the content of a file goes."""

    def may_replace(self, hub_blob: str) -> bool:
        """Whether other content in the place of a file is damage, and no file of the user's."""

    def enter(self, path: str, hub_blob: str) -> None:
        """Make a file that is complete available under its path. Errors: InvalidReferenceError, OSError."""

    def finish(self) -> None:
        """Say that all files are there."""


class PlainFolder:
    """A folder with the files under their own paths."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def place(self, path: str, hub_blob: str) -> Path:
        """The path below the folder."""
        return self.folder / path

    def may_replace(self, hub_blob: str) -> bool:
        """Never."""
        return False

    def enter(self, path: str, hub_blob: str) -> None:
        """Nothing: the file is where it belongs."""

    def finish(self) -> None:
        """Nothing."""


class FilesSink:
    """Writes a checkpoint's files. Those that are there already, from this fetch or another one, are read and kept."""

    def __init__(self, manifest: FleetManifest, layout: FileLayoutOnDisk, present: PublishedFiles) -> None:
        self._manifest = manifest
        self._layout = layout
        self._present = present
        self._descriptors: list[int] = []
        self._absent: list[WeightFile] = []
        for file in manifest.files:
            if not self._is_there(file):
                self._absent.append(file)
        self._next: WeightFile | None = None

    @property
    def folder(self) -> Path:
        """The folder in which users find the files."""
        return self._layout.folder

    def close(self) -> None:
        """Close the files that were there."""
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors.clear()

    @property
    def wanted(self) -> dict[bytes, int]:
        """All tensors, for every file comes whole."""
        return {row.digest: row.length for row in self._manifest.tensors if row.length}

    def batches(self) -> Iterator[dict[bytes, int]]:
        """The tensors of each file that is not there."""
        for file in self._absent:
            self._next = file
            yield {piece.row.digest: piece.length for piece in self._manifest.pieces(file) if piece.row is not None}

    def take(self, batch: dict[bytes, int], blobs: BlobReader) -> None:
        """Write the file of a batch. Errors: DigestMismatchError, CapacityError, InvalidReferenceError."""
        file = self._next
        assert file is not None  # set with the batch

        def write(put: Callable[[memoryview], None]) -> None:
            frame = memoryview(b"".join(blobs.pieces(file.frame)) if file.frame_bytes else b"")
            for piece in self._manifest.pieces(file):
                if piece.row is None:
                    put(frame[piece.frame_offset : piece.frame_offset + piece.length])
                else:
                    copy_checked(blobs.pieces(piece.row.digest), piece.row.digest, piece.length, put)

        self._write(file.path, file.hub_blob, file.size, write)
        self._is_there(file)  # from now on its tensors can be read from it

    def finish(self, blobs: BlobReader) -> None:
        """Write the small files, then make all files available."""
        for small in self._manifest.small_files:
            content = b"".join(blobs.pieces(small.digest)) if small.length else b""
            where = self._layout.place(small.path, small.hub_blob)
            if not _holds(where, content):
                self._write(small.path, small.hub_blob, small.length, _writer_of(content))
        with disk_errors(self._layout.folder):
            for path, hub_blob in self._paths():
                self._layout.enter(path, hub_blob)
            self._layout.finish()

    def sources(self) -> list[dict[str, Any]]:
        """The weight files, with their identities."""
        listed = []
        for file in self._manifest.files:
            path = (self._layout.folder / file.path).absolute()  # an agent elsewhere reads it
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                identity = file_identity(descriptor)
            finally:
                os.close(descriptor)
            listed.append({"component": file.component, "file": file.file, "path": str(path), "identity": identity})
        return listed

    def _paths(self) -> list[tuple[str, str]]:
        files = [(file.path, file.hub_blob) for file in self._manifest.files]
        return files + [(small.path, small.hub_blob) for small in self._manifest.small_files]

    def _is_there(self, file: WeightFile) -> bool:
        """Whether a file is complete; then its tensors can be read from it."""
        path = self._layout.place(file.path, file.hub_blob)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError:
            return False
        if os.fstat(descriptor).st_size != file.size or not self._is_correct(file, descriptor, path):
            os.close(descriptor)
            return False
        self._descriptors.append(descriptor)
        self._present.add(path, descriptor, self._manifest, file)
        return True

    def _is_correct(self, file: WeightFile, descriptor: int, path: Path) -> bool:
        frame = new_hasher()
        for piece in self._manifest.pieces(file):
            pieces = file_pieces(descriptor, piece.offset, piece.length, show(path))
            try:
                if piece.row is None:
                    for data in pieces:
                        frame.update(data)
                else:
                    copy_checked(pieces, piece.row.digest, piece.length, lambda _: None)
            except WeightdError:
                return False
        return frame.digest() == file.frame

    def _write(self, path: str, hub_blob: str, size: int, fill: Callable[[Callable[[memoryview], None]], None]) -> None:
        """Write a file beside its place, check it, and move it there."""
        where = self._layout.place(path, hub_blob)
        if os.path.lexists(where) and not self._layout.may_replace(hub_blob):
            raise InvalidReferenceError(f"{show(where)}: has other content; remove it, or give another folder")
        # Another fetch may write the same blob of a cache now. Each has a name of its own, or one would move the
        # other's unfinished file. What a killed fetch of this checkpoint left is removed.
        prefix = f".weightd-{self._manifest.name.removeprefix('b3:')[:16]}-"
        beside = where.with_name(f"{prefix}{secrets.token_hex(8)}")
        check = HubCheck(hub_blob, size)
        with disk_errors(where.parent):
            where.parent.mkdir(parents=True, exist_ok=True)
            for left in where.parent.glob(f"{prefix}*"):
                left.unlink(missing_ok=True)
            with open(beside, "xb", buffering=0) as file:

                def put(data: memoryview) -> None:
                    check.update(data)
                    while data:
                        data = data[file.write(data) :]

                fill(put)
                os.fsync(file.fileno())
            check.finish(beside)
            self._rename(beside, where)

    def _rename(self, beside: Path, where: Path) -> None:
        _failpoints.reach("fetch.rename")
        os.rename(beside, where)


def _writer_of(content: bytes) -> Callable[[Callable[[memoryview], None]], None]:
    return lambda put: put(memoryview(content))


def _holds(path: Path, content: bytes) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(len(content) + 1) == content
    except OSError:
        return False
