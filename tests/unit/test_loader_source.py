"""Whether a file counts as changed while it was read."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from weightd.errors import FormatError, InvalidReferenceError
from weightd_daemon.loader.source import LoaderSource


def write(path: Path) -> None:
    path.write_bytes(b"others")


def replace(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(b"something else")
    os.rename(other, path)


def keep_the_times(path: Path, change: Callable[[Path], None]) -> None:
    status = path.stat()
    with path.open("rb") as file:
        change(path)
        os.utime(file.fileno(), ns=(status.st_atime_ns, status.st_mtime_ns))


UNCHANGED: dict[str, Callable[[Path], None]] = {
    "removed": os.unlink,
    "replaced by rename": replace,
    "one of two names removed": lambda path: os.unlink(path.with_name("second")),
}
CHANGED: dict[str, Callable[[Path], None]] = {
    "written": write,
    "touched": lambda path: os.utime(path, (1, 1)),
    "another mode": lambda path: path.chmod(0o600),
    "another name": lambda path: os.link(path, path.with_name("third")),
    "renamed, which may be hiding a write": lambda path: os.rename(path, path.with_name("third")),
    "written and removed": lambda path: (write(path), path.unlink())[0],
    "same length, written and removed": lambda path: (path.write_bytes(b"CONTENT"), path.unlink())[0],
    "times put back": lambda path: keep_the_times(path, write),
}


@pytest.fixture
def source(tmp_path: Path) -> Iterator[LoaderSource]:
    path = tmp_path / "m"
    path.write_bytes(b"content")
    os.utime(path, (10, 10))
    os.link(path, path.with_name("second"))
    with path.open("rb") as file:
        yield LoaderSource("m", file.fileno())


@pytest.mark.parametrize("case", UNCHANGED)
def test_a_file_that_lost_a_name_is_as_it_was(case: str, source: LoaderSource, tmp_path: Path) -> None:
    UNCHANGED[case](tmp_path / "m")
    source.check_unchanged()


@pytest.mark.parametrize("case", CHANGED)
def test_anything_else_is_a_change(case: str, source: LoaderSource, tmp_path: Path) -> None:
    CHANGED[case](tmp_path / "m")
    with pytest.raises(FormatError, match=r"^m: changed while it was read; load it again$"):
        source.check_unchanged()


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (os.O_WRONLY, "its descriptor is not open for reading"),
        (os.O_PATH, "its descriptor is not open for reading"),
        (os.O_RDONLY | os.O_DIRECTORY, "is not a regular file"),
    ],
)
def test_what_cannot_be_read_as_a_file_is_refused(flags: int, why: str, tmp_path: Path) -> None:
    path = tmp_path / "m"
    path.write_bytes(b"content")
    descriptor = os.open(tmp_path if flags & os.O_DIRECTORY else path, flags)
    try:
        with pytest.raises(InvalidReferenceError, match=f"^m: {why}"):
            LoaderSource("m", descriptor)
    finally:
        os.close(descriptor)


def test_a_file_that_the_kernel_cannot_read(source: LoaderSource, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the file's fault, whichever read finds it; and where a read may not wait, nothing is said yet."""

    def fail(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(FormatError, match=r"^m: cannot be read at byte 3: Input/output error$"):
        source.read_into(memoryview(bytearray(2)), 3)
    assert source.read_cached(memoryview(bytearray(2)), 3) == 0


def test_a_file_that_is_held_is_what_it_was(tmp_path: Path) -> None:
    path = tmp_path / "m"
    path.write_bytes(b"content")
    with path.open("rb") as file:
        source = LoaderSource("m", file.fileno(), hold=7)
    path.write_bytes(b"other content")
    source.check_unchanged()
    for read in (source.read_into, source.read_cached):
        view = memoryview(bytearray(4))
        read(view, 3)
        assert bytes(view) == b"tent"
