"""Open checkpoint files: only regular files, never blocking, and with errors that name the path."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from typing import TYPE_CHECKING, NamedTuple

from weightd._limits import limit_error
from weightd.errors import InvalidReferenceError, NotFoundError, PermissionDeniedError, WeightdError
from weightd.types import FileIdentity, SourceFile

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path
    from types import TracebackType
    from typing import Self


class ReferencedFile(NamedTuple):
    """One file of a reference: its component ("" for the checkpoint's own folder), its name in there, its path.

    An index has no tensors: it says whose a tensor is that several files of its component have.
    """

    component: str
    file: str
    path: Path
    is_index: bool = False


def in_order(sources: Iterable[ReferencedFile]) -> tuple[ReferencedFile, ...]:
    """Files as they travel: by component and name, and the indexes after all others."""
    return tuple(sorted(sources, key=lambda source: (source.is_index, source)))


class OpenedReference:
    """The opened files of a reference, closed at the end of the `with` block.

    `fds` are read-only descriptors of regular files and `sources` say what each is, in the same order. `reference` is
    what they were found by, for people.
    """

    def __init__(self, sources: Iterable[ReferencedFile], reference: str = "") -> None:
        self.reference = reference
        self.fds: tuple[int, ...] = ()
        self.sources: tuple[SourceFile, ...] = ()
        self._paths: tuple[Path, ...] = ()
        try:
            for source in sources:
                self._open(source)
        except BaseException:
            self.close()
            raise

    def _open(self, source: ReferencedFile) -> None:
        descriptor, status = open_regular(source.path)
        self.fds += (descriptor,)
        self._paths += (source.path,)
        identity = FileIdentity(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        self.sources += (SourceFile(source.component, source.file, identity, source.is_index),)

    def close(self) -> None:
        """Close all descriptors; a second call does nothing."""
        descriptors, self.fds = self.fds, ()
        for descriptor in descriptors:
            os.close(descriptor)

    @contextlib.contextmanager
    def errors_by_path(self) -> Iterator[None]:
        """Errors that begin with a file's name inside its component, as the daemon's do, begin with its path."""
        try:
            yield
        except WeightdError as error:
            for source, path in zip(self.sources, self._paths, strict=True):
                label = "/".join(filter(None, (source.component, source.file)))
                if error.message.startswith(f"{label}: "):
                    error.message = show(path) + error.message.removeprefix(label)
                    error.args = (error.message,)
                    break
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def inodes(sources: Iterable[ReferencedFile]) -> list[tuple[int, int] | None]:
    """Device and inode of what stands at each path now; None where nothing can be seen there."""

    def inode(path: Path) -> tuple[int, int] | None:
        try:
            status = path.stat()
        except OSError:
            return None
        return status.st_dev, status.st_ino

    return [inode(source.path) for source in sources]


def open_regular(path: Path) -> tuple[int, os.stat_result]:
    """Open a regular file for reading, without ever waiting for a writer or taking a terminal."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError as error:
        raise translated(path, error) from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise InvalidReferenceError(f"{show(path)}: not a regular file; give a safetensors or GGUF file or a directory")
    os.set_blocking(descriptor, True)
    return descriptor, status


def translated(path: Path, error: OSError) -> WeightdError:
    """The error to raise for a failed open or stat."""
    if isinstance(error, (FileNotFoundError, NotADirectoryError)):
        return NotFoundError(f"{show(path)}: no such file or directory; check the path")
    if isinstance(error, PermissionError):
        return PermissionDeniedError(f"{show(path)}: may not be read by this user; check its permissions")
    if error.errno == errno.ENXIO:
        return InvalidReferenceError(
            f"{show(path)}: not a regular file; give a safetensors or GGUF file or a directory"
        )
    if error.errno == errno.ENAMETOOLONG:
        return InvalidReferenceError(f"{show(path)}: longer than a path can be; check the reference")
    if error.errno == errno.EAGAIN:  # it has to be waited for: another process holds a lease on it (F_SETLEASE)
        return WeightdError(f"{show(path)}: is in use by another process, which has to give it up first; try again")
    if limit := limit_error(error, f"opening {show(path)}"):
        return limit
    return WeightdError(f"{show(path)}: cannot be opened: {error.strerror}")


def show(path: Path | str) -> str:
    """A path for a message: quoted where it would not print as it is."""
    text = str(path)
    return text if text.isprintable() and len(text) <= 4096 else repr(text[:4096])
