"""The digest index: what is not read again, what is, and the risk that remains."""

from __future__ import annotations

import contextlib
import mmap
import os
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import weightd
from support import checkpoints
from support.backends import EVERY
from support.content import content
from support.daemon import Daemon, eventually
from weightd_daemon.loader.source import LoaderSource
from weightd_daemon.persistence.digest_index import FILE_NAME

MIB = 1 << 20

everywhere = pytest.mark.backends(*EVERY, swept="cuda_ipc")


def two(folder: Path) -> tuple[Path, Path]:
    """Two rested checkpoints of 6 MiB that share 4."""
    shared = {i: ("common", i) for i in range(4)}
    a, b = (checkpoints.write_random(folder / f"{n}.safetensors", 6, MIB, seed=n, shared=shared) for n in "ab")
    checkpoints.rest(a, b)
    return a, b


@pytest.fixture(scope="module")
def rested(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same, for tests that change nothing."""
    return two(tmp_path_factory.mktemp("rested"))


@pytest.fixture(autouse=True)
def trusted(rested: tuple[Path, Path]) -> None:
    """Skip where temporary files are on a filesystem whose inodes and times are never trusted."""
    with rested[0].open("rb") as file:
        if not LoaderSource("probe", file.fileno()).trusted:
            pytest.skip(f"{rested[0]} is on a filesystem that is never trusted; set --basetemp to one that is")


def read(client: weightd.Client, path: Path, **options: bool) -> int:
    report = client.load_report(path, name=path.stem, **options)
    assert report is not None
    return report.read_bytes


def check(client: weightd.Client, path: Path) -> None:
    with client.attach(path) as attachment:
        for i in range(6):
            seed = "common" if i < 4 else path.stem
            assert content(attachment, f"t{i}") == checkpoints.random_bytes((seed, i), MIB)


def drop(daemon: Daemon, client: weightd.Client, name: str) -> None:
    """Give a checkpoint up, once nobody waits for it."""
    client.attach(name).close()
    eventually(lambda: not any(lease.checkpoint == name for lease in client.leases()))
    client.remove(name)


@everywhere
def test_only_what_is_not_resident_is_read(daemon: Daemon, rested: tuple[Path, Path]) -> None:
    a, b = rested
    client = daemon.connect()
    assert read(client, a) == 6 * MIB
    assert read(client, a) == 0
    assert read(client, b) == 6 * MIB  # its file is not known yet
    drop(daemon, client, "b")
    assert read(client, b) == 2 * MIB  # what "a" has kept is known to be the same
    check(client, b)
    drop(daemon, client, "a")
    drop(daemon, client, "b")
    eventually(lambda: client.stats().blobs == 0, what="the bytes are gone")
    assert read(client, a) == 6 * MIB  # digests without bytes are of no use
    check(client, a)


@everywhere
def test_verify_trusts_nothing(daemon: Daemon, rested: tuple[Path, Path]) -> None:
    a, b = rested
    client = daemon.connect()
    read(client, a)
    read(client, b)
    drop(daemon, client, "b")
    assert read(client, b, verify=True) == 6 * MIB
    check(client, b)


def test_touched_file_is_read_again(daemon: Daemon, tmp_path: Path) -> None:
    a, _ = two(tmp_path)
    client = daemon.connect()
    first = client.load_report(a)
    os.utime(a, (1, 1))
    checkpoints.rest(a)
    second = client.load_report(a)
    assert first is not None
    assert second is not None
    assert second.read_bytes == 6 * MIB
    assert (second.unique_bytes, second.content_digest) == (0, first.content_digest)
    assert read(client, a) == 0


def test_changed_file_is_read_again(daemon: Daemon, tmp_path: Path) -> None:
    a, _ = two(tmp_path)
    times = a.stat()
    client = daemon.connect()
    digest = client.load(a).content_digest
    with a.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\xff" if checkpoints.random_bytes(("a", 5), MIB)[-1] != 0xFF else b"\0")
    os.utime(a, ns=(times.st_atime_ns, times.st_mtime_ns))  # who would hide it cannot set ctime back
    report = client.load_report(a)
    assert report is not None
    assert (report.read_bytes, report.unique_bytes) == (6 * MIB, MIB)
    assert report.content_digest != digest


def test_replaced_file_is_read_again(daemon: Daemon, tmp_path: Path) -> None:
    a, b = two(tmp_path)
    client = daemon.connect()
    digest = client.load(a).content_digest
    b.rename(a)
    assert client.load(a).content_digest != digest
    with client.attach(a) as attachment:
        assert attachment.buffer("t5") == checkpoints.random_bytes(("b", 5), MIB)


def test_file_that_has_not_rested_is_not_trusted(daemon: Daemon, tmp_path: Path) -> None:
    client = daemon.connect()
    path = checkpoints.write_random(tmp_path / "fresh.safetensors", 6, MIB)
    begun = time.monotonic()
    reads = [read(client, path) for _ in range(3)]
    if time.monotonic() - begun < 1.5:
        assert reads == [6 * MIB] * 3
    checkpoints.rest(path)
    assert [read(client, path) for _ in range(2)] == [6 * MIB, 0]


def test_file_of_the_future_is_read_once(daemon: Daemon, tmp_path: Path) -> None:
    """Archives, copies and `touch` set mtime to anything; what is changed now has another ctime all the same."""
    client = daemon.connect()
    path = checkpoints.write_random(tmp_path / "future.safetensors", 6, MIB)
    os.utime(path, (4e9, 4e9))
    checkpoints.rest(path)
    assert [read(client, path) for _ in range(2)] == [6 * MIB, 0]
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x55")
    os.utime(path, (4e9, 4e9))
    assert read(client, path) == 6 * MIB, "a change shows"


def test_damaged_index_is_set_aside(daemon: Daemon, rested: tuple[Path, Path]) -> None:
    a, b = rested
    client = daemon.connect()
    read(client, a)
    index = daemon.folder / "state" / FILE_NAME
    with contextlib.closing(sqlite3.connect(index)) as database:
        assert database.execute("SELECT count(*) FROM files").fetchone() == (1,)
    assert index.stat().st_mode & 0o777 == 0o600
    daemon.stop()
    index.write_bytes(b"this is not a database " * 1000)
    daemon.start()
    assert read(client, a) == 6 * MIB  # another daemon's blobs: nothing is known
    assert index.with_name(f"{FILE_NAME}.damaged").read_bytes().startswith(b"this is not")
    assert "digest index is damaged" in daemon.logged()
    read(client, b)
    drop(daemon, client, "b")
    assert read(client, b) == 2 * MIB  # begun anew, and of use


def test_index_that_cannot_be_written_costs_only_reading(
    start_daemon: Callable[..., Daemon], rested: tuple[Path, Path], tmp_path: Path
) -> None:
    (tmp_path / "state" / FILE_NAME).mkdir(parents=True)
    daemon = start_daemon(state_dir=tmp_path / "state")
    a, b = rested
    client = daemon.connect()
    read(client, a)
    read(client, b)
    drop(daemon, client, "b")
    assert read(client, b) == 6 * MIB
    check(client, b)


@contextlib.contextmanager
def mapped(path: Path) -> Iterator[mmap.mmap]:
    """A shared, writable map whose last page has been written before: later writes there leave no trace."""
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as shared:
        shared[-1] = shared[-1]
        checkpoints.rest(path)
        yield shared


def test_residual_risk_a_write_through_a_shared_map_leaves_no_trace(daemon: Daemon, tmp_path: Path) -> None:
    """Documented in docs/security.md: such a write changes neither size nor times, so only `--verify` sees it."""
    a, _ = two(tmp_path)
    client = daemon.connect()
    old = checkpoints.random_bytes(("a", 5), MIB)
    new = old[:-1] + bytes([old[-1] ^ 1])
    with mapped(a) as shared:
        digest = client.load(a, name="a").content_digest
        before = a.stat()
        shared[-1] = new[-1]
        after = a.stat()
        if (before.st_mtime_ns, before.st_ctime_ns) != (after.st_mtime_ns, after.st_ctime_ns):
            pytest.skip("the kernel wrote the page back meanwhile, so this write did leave a trace")
        # The answer is the old content: right by all that the file says of itself.
        report = client.load_report(a)
        assert report is not None
        assert (report.read_bytes, report.content_digest) == (0, digest)
        with client.attach(a) as attachment:
            assert attachment.buffer("t5") == old
        # Read again, it is found, and from then on the file means what it says now.
        verified = client.load_report(a, verify=True)
        assert verified is not None
        assert (verified.read_bytes, verified.unique_bytes) == (6 * MIB, MIB)
        assert verified.content_digest != digest
        with client.attach(a) as attachment:
            assert attachment.content_digest == verified.content_digest
            assert attachment.buffer("t5") == new


def test_a_state_folder_that_cannot_be_used_is_said_once(start_daemon: Callable[..., Daemon], tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    daemon = start_daemon(state_dir=tmp_path / "file" / "state")
    client = daemon.connect()
    for name in "abc":
        path = checkpoints.write_random(tmp_path / f"{name}.safetensors", 1, MIB, seed=name)
        checkpoints.rest(path)
        client.load(path)
    index = client.stats().digest_index
    assert index is not None
    assert (index.path, index.problem) == (f"{tmp_path}/file/state/digests-v1.sqlite3", "Not a directory")
    assert index.failures > 3
    (line,) = [line for line in daemon.logged().splitlines() if "digest index" in line]
    assert line.endswith(f"{index.path} cannot be used: Not a directory; loads go on, and read more")
    assert f"digest index {index.path} cannot be used: Not a directory;" in daemon.command("stats").stdout


@pytest.mark.parametrize("how", ["cut", "emptied", "written over", "removed"])
def test_whatever_happens_to_its_files_the_daemon_serves_on(
    how: str, start_daemon: Callable[..., Daemon], rested: tuple[Path, Path]
) -> None:
    """It is a cache: each of its files, those that sqlite puts beside it too, costs speed at most."""
    daemon = start_daemon()
    client = daemon.connect()
    a, b = rested
    state = daemon.folder / "state"
    for suffix in ("", "-journal", "-wal", "-shm"):
        path = state / f"{FILE_NAME}{suffix}"
        for file in (a, b):
            read(client, file)
            if how == "removed":
                path.unlink(missing_ok=True)
            else:
                path.touch()
                with path.open("r+b") as damaged:
                    size = os.fstat(damaged.fileno()).st_size
                    if how == "written over":
                        damaged.write(os.urandom(max(size, 4096)))
                    else:
                        damaged.truncate(size // 2 if how == "cut" else 0)
        for file in (a, b):
            check(client, file)
            drop(daemon, client, file.stem)
        eventually(lambda: client.stats().blobs == 0, what="the bytes are gone")
        assert read(client, a) == 6 * MIB
        check(client, a)
        drop(daemon, client, a.stem)
    assert daemon.process is not None
    assert daemon.process.poll() is None
