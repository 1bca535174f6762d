"""What this node has of checkpoints and can serve: published files, blobs of its state folder, resident tensors."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from weightd import _failpoints
from weightd._references.files import open_regular
from weightd.errors import FormatError, NotFoundError, WeightdError
from weightd_fleet.core.manifest_rows import WeightFile

from .blobs import PIECE, file_pieces

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

    from weightd_fleet.core.manifest import FleetManifest
    from weightd_fleet.publishing.state import PublishedState

    from .blobs import BlobReader


class _FileRun(NamedTuple):
    path: Path
    descriptor: int
    offset: int
    length: int


class PublishedFiles:
    """Tensors in published files whose identity is what it was when they were read. They are a BlobReader."""

    def __init__(self) -> None:
        self._runs: dict[bytes, _FileRun] = {}

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._runs

    def add(self, path: Path, descriptor: int, manifest: FleetManifest, file: WeightFile) -> None:
        """Add the tensors of an open file."""
        for piece in manifest.pieces(file):
            if piece.row is not None:
                self._runs.setdefault(piece.row.digest, _FileRun(path, descriptor, piece.offset, piece.length))

    def pieces(self, digest: bytes) -> Iterator[memoryview]:
        """The bytes of a tensor, in pieces. Errors: FormatError."""
        run = self._runs[digest]
        return file_pieces(run.descriptor, run.offset, run.length, str(run.path))


class StateBlobs:
    """Frames and small files of a checkpoint, from the state folder. They are a BlobReader."""

    def __init__(self, state: PublishedState, manifest: FleetManifest) -> None:
        self._state = state
        self._digests = {file.frame for file in manifest.files} | {small.digest for small in manifest.small_files}

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._digests

    def pieces(self, digest: bytes) -> Iterator[memoryview]:
        """The bytes of a blob, whole. Errors: NotFoundError, FormatError."""
        content = memoryview(self._state.blob(digest))
        for offset in range(0, len(content), PIECE):
            yield content[offset : offset + PIECE]


class BlobReaders:
    """Several BlobReaders as one; the first that has a blob is read."""

    def __init__(self, readers: Sequence[BlobReader]) -> None:
        self._readers = readers

    def __contains__(self, digest: bytes) -> bool:
        return any(digest in reader for reader in self._readers)

    def pieces(self, digest: bytes) -> Iterator[memoryview]:
        """The bytes of a blob. Errors: NotFoundError, those of the reader."""
        _failpoints.reach("fetch.serve")
        for reader in self._readers:
            if digest in reader:
                return reader.pieces(digest)
        raise NotFoundError(f"blob {digest.hex()[:16]}: is not on this node")


@contextlib.contextmanager
def published_files(state: PublishedState, names: Sequence[str], wanted: Collection[bytes]) -> Iterator[PublishedFiles]:
    """Open those published files of some checkpoints that have wanted tensors, as far as they are unchanged."""
    missing = set(wanted)
    found = PublishedFiles()
    with contextlib.ExitStack() as stack:
        for name in names:
            with contextlib.suppress(NotFoundError, FormatError):  # was never published as files, or was removed
                manifest = state.manifest(name)
                described = _described(state, name)
                for file in manifest.files:
                    rows = {piece.row.digest for piece in manifest.pieces(file) if piece.row is not None}
                    if not rows & missing:
                        continue
                    opened = _open_unchanged(described.get((file.component, file.file)))
                    if opened is not None:
                        stack.callback(os.close, opened[1])
                        found.add(*opened, manifest, file)
                        missing -= rows
        yield found


class UnchangedFiles:
    """Whether tensors of a checkpoint lie in unchanged published files of it. Nothing of them is read."""

    def __init__(self, state: PublishedState, manifest: FleetManifest, wanted: set[bytes]) -> None:
        described: dict[tuple[str, str], dict[str, Any]] = {}
        with contextlib.suppress(NotFoundError, FormatError):
            described = _described(state, manifest.name)
        self._manifest = manifest
        self._wanted = wanted
        self._described = [described.get((file.component, file.file)) for file in manifest.files]
        self._unchanged: list[bool] = []
        self._has_all = False

    def have_all(self) -> bool:
        """Look at each file. What they have is found out again only where another one has changed, or is back."""
        unchanged = [_is_unchanged(one) for one in self._described]
        if unchanged != self._unchanged:
            files = [file for file, same in zip(self._manifest.files, unchanged, strict=True) if same]
            self._has_all = self._wanted <= {row.digest for file in files for row in self._manifest.rows_of(file)}
            self._unchanged = unchanged
        return self._has_all


def _described(state: PublishedState, name: str) -> dict[tuple[str, str], dict[str, Any]]:
    """The published files of a checkpoint by component and name. Errors: NotFoundError, FormatError."""
    listed = (one for one in state.sources(name)["files"] if isinstance(one, dict))
    return {(str(one.get("component")), str(one.get("file"))): one for one in listed}


def _open_unchanged(described: dict[str, Any] | None) -> tuple[Path, int] | None:
    """Path and descriptor of a published file; None if it is another by now."""
    if described is None or not isinstance(described.get("path"), str):
        return None
    path = Path(described["path"])
    try:
        descriptor, _ = open_regular(path)
    except WeightdError:
        return None
    if file_identity(descriptor) == described.get("identity"):
        return path, descriptor
    os.close(descriptor)
    return None


def _is_unchanged(described: dict[str, Any] | None) -> bool:
    if (opened := _open_unchanged(described)) is None:
        return False
    os.close(opened[1])
    return True


def file_identity(descriptor: int) -> list[int]:
    """What a state folder keeps of a file: device, inode, size, and the times of its last changes."""
    status = os.fstat(descriptor)
    return [status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]
