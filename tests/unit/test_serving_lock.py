"""The locks of a socket path: who is refused, who is killed, who is left alone, and what older daemons make of it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from support.daemon import PATIENCE, environment
from support.leash import leashed
from weightd_daemon.operations import lock_holders, serving_lock
from weightd_daemon.operations.serving_lock import AlreadyRunningError, DaemonInstanceLock

# Each says its pid, and then that of a child where it has one; then it waits.
HEAD = """
import fcntl, os, signal, subprocess, sys, time
from pathlib import Path
socket = Path(sys.argv[1])
CHILD = [sys.executable, "-c", "import signal, time; [signal.signal(n, signal.SIG_IGN) for n in (1, 2, 15)]; "
         "print('up', flush=True); time.sleep(600)"]
def child(*descriptors):
    process = subprocess.Popen(CHILD, pass_fds=descriptors, stdout=subprocess.PIPE, text=True)
    process.stdout.readline()
    return process.pid
def take():
    from weightd_daemon.operations.serving_lock import DaemonInstanceLock
    lock = DaemonInstanceLock(socket)
    lock.acquire()
    return lock
def take_as_before(said):
    lock = os.open(f"{socket}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.pwrite(lock, said.encode(), 0)
    return lock
NAMESPACE = os.readlink("/proc/self/ns/pid")
"""
TAIL = "\nprint(os.getpid(), found, flush=True)\ntime.sleep(600)"


class Others:
    """Processes of a test; those that live are killed at its end."""

    def __init__(self, socket: Path) -> None:
        self.socket = socket
        self._processes: list[subprocess.Popen[str]] = []
        self._children: list[int] = []

    def run(self, source: str) -> tuple[subprocess.Popen[str], int]:
        """A process that runs `source`, and what that has `found`: the pid of a child, which it ends by the end."""
        process = subprocess.Popen(
            leashed([sys.executable, "-c", HEAD + source + TAIL, str(self.socket)]),
            stdout=subprocess.PIPE, text=True, env=environment(),
        )  # fmt: skip
        self._processes.append(process)
        assert process.stdout is not None
        pid, found = map(int, process.stdout.readline().split())
        assert pid == process.pid
        if found:
            self._children.append(os.pidfd_open(found))
        return process, found

    def left_by(self, source: str) -> int:
        """The child of a process that has been killed; a pidfd of it."""
        process, _ = self.run(source)
        process.kill()
        process.wait(PATIENCE)
        return self._children[-1]

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait(PATIENCE)
            assert process.stdout is not None
            process.stdout.close()
        for child in self._children:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(child, signal.SIGKILL)
            os.close(child)


@pytest.fixture
def others(tmp_path: Path) -> Iterator[Others]:
    made = Others(tmp_path / "w.sock")
    yield made
    made.close()


@pytest.fixture
def lock(others: Others) -> Iterator[DaemonInstanceLock]:
    made = DaemonInstanceLock(others.socket)
    yield made
    made.close()
    links = [Path(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")]
    left = [os.readlink(link) for link in links if link.is_symlink()]
    assert not [path for path in left if "w.sock." in path], "descriptors are left open"


def has_ended(child: int, seconds: float = 0.0) -> bool:
    return bool(select.select([child], [], [], seconds)[0])


WRITER = "found = child(take().writers)"
HOLDER = "found = child(take().holders)"
OLDER = "found = child(take_as_before(f'{os.getpid()} {NAMESPACE}'))"
# A child between fork and exec, which has every descriptor of its parent.
FORKED = """
lock = take()
found = os.fork()
if not found:
    time.sleep(600)
"""


@pytest.mark.parametrize("left", [WRITER, HOLDER, FORKED, OLDER])
def test_what_a_daemon_that_died_has_left_is_killed(others: Others, lock: DaemonInstanceLock, left: str) -> None:
    child = others.left_by(left)
    assert not has_ended(child), "the test's child lives on by itself"
    lock.acquire()
    assert has_ended(child, PATIENCE)
    assert not lock.is_written_by_others()


def test_a_stranger_is_left_alone(others: Others, lock: DaemonInstanceLock) -> None:
    """Also one that has the files open, or the lock of another file of that name."""
    elsewhere = others.socket.parent / "elsewhere"
    elsewhere.mkdir()
    reader = others.left_by("files = [open(f'{socket}{end}', 'a+') for end in ('.lock', '.serving')]\n"
                            "found = child(*(file.fileno() for file in files))")  # fmt: skip
    namesake = others.left_by("socket = socket.parent / 'elsewhere' / socket.name\n" + WRITER)
    child = others.left_by(WRITER)
    lock.acquire()
    assert has_ended(child, PATIENCE)
    assert not has_ended(reader)
    assert not has_ended(namesake)


@pytest.mark.parametrize("source", ["lock = take(); found = 0", WRITER])
def test_a_daemon_that_serves_refuses_every_start(others: Others, lock: DaemonInstanceLock, source: str) -> None:
    daemon, _ = others.run(source)
    with pytest.raises(AlreadyRunningError, match=rf"another daemon \(pid {daemon.pid}\) serves it; stop it"):
        lock.acquire()
    assert daemon.poll() is None
    with others.socket.with_name("w.sock.lock").open("a+") as older, pytest.raises(BlockingIOError):
        fcntl.flock(older, fcntl.LOCK_EX | fcntl.LOCK_NB)  # as a daemon before this one takes it


def test_a_daemon_of_an_older_version_that_serves_refuses_the_start(others: Others, lock: DaemonInstanceLock) -> None:
    daemon, _ = others.run(OLDER)
    with pytest.raises(AlreadyRunningError, match=rf"another daemon \(pid {daemon.pid}\) serves it; stop it"):
        lock.acquire()
    assert daemon.poll() is None


@pytest.mark.parametrize("said", ["1 pid:[1]", "", "words"])
def test_one_that_cannot_be_known_is_not_killed(
    others: Others, lock: DaemonInstanceLock, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An older daemon in another PID namespace, or one that has not said yet who it is."""
    monkeypatch.setattr(serving_lock, "_HOLDERS_SECONDS", 0.5)
    daemon, _ = others.run(f"found = 0; lock = take_as_before({said!r})")
    with pytest.raises(AlreadyRunningError, match=r"another daemon \(pid unknown\) serves it"):
        lock.acquire()
    assert daemon.poll() is None


@pytest.fixture
def nobody_dies(monkeypatch: pytest.MonkeyPatch) -> None:
    """What hangs in the kernel does not end though it is killed."""
    monkeypatch.setattr(serving_lock, "end", lambda *_: None)


@pytest.mark.usefixtures("nobody_dies")
@pytest.mark.parametrize("left", [WRITER, OLDER])
def test_a_loader_that_does_not_die_is_waited_for_a_second_and_then_only_watched(
    others: Others,
    lock: DaemonInstanceLock,
    left: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(serving_lock, "_WRITERS_SECONDS", 0.2)
    process, pid = others.run(left)
    process.kill()
    process.wait(PATIENCE)
    lock.acquire()
    assert f"a loader of the daemon before (pid {pid}) does not end" in caplog.text
    assert lock.is_written_by_others()
    os.kill(pid, signal.SIGKILL)
    until(lambda: not lock.is_written_by_others())


def test_who_is_not_found_in_time_is_killed_later(
    others: Others, lock: DaemonInstanceLock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving_lock, "_WRITERS_SECONDS", 0.2)
    child = others.left_by(WRITER)
    with monkeypatch.context() as patch:
        patch.setattr(serving_lock, "holders", lambda *_: [])
        lock.acquire()
    assert lock.is_written_by_others()
    assert not has_ended(child)
    lock.end_others()
    until(lambda: not lock.is_written_by_others())


@pytest.mark.usefixtures("nobody_dies")
def test_a_holder_that_does_not_die_refuses_the_start(
    others: Others, lock: DaemonInstanceLock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving_lock, "_HOLDERS_SECONDS", 0.3)
    process, pid = others.run(HOLDER)
    process.kill()
    process.wait(PATIENCE)
    with pytest.raises(AlreadyRunningError, match=rf"\(pid {pid}\) holds GPU memory and does not end"):
        lock.acquire()


def test_a_lock_that_was_removed_is_noticed_and_taken_anew(others: Others, lock: DaemonInstanceLock) -> None:
    lock.acquire()
    before = lock.writers, lock.holders
    for end in (".serving", ".lock"):
        assert lock.is_whole()
        others.socket.with_name(f"w.sock{end}").unlink()
        assert not lock.is_whole()
        lock.renew()
    assert (lock.writers, lock.holders) == before, "children inherit the new ones by the numbers of the old"
    assert lock.is_whole()
    with pytest.raises(AssertionError, match="refused"):
        refused(others)
    assert not lock.is_written_by_others()


@pytest.mark.usefixtures("nobody_dies")
@pytest.mark.parametrize("left", [WRITER, OLDER])
def test_a_loader_that_does_not_die_stays_in_sight_when_the_locks_are_removed(
    others: Others, lock: DaemonInstanceLock, left: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its lock is on a file that nobody can find any more: what it may write to stays aside."""
    monkeypatch.setattr(serving_lock, "_WRITERS_SECONDS", 0.2)
    others.left_by(left)
    lock.acquire()
    for end in (".serving", ".lock"):
        others.socket.with_name(f"w.sock{end}").unlink()
    lock.renew()
    assert lock.is_written_by_others()


def test_a_lock_that_could_not_be_renewed_is_renewed_the_next_time(
    others: Others, lock: DaemonInstanceLock, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock.acquire()
    others.socket.with_name("w.sock.serving").unlink()
    opened = 0

    def second_fails(*arguments: Any) -> int:
        nonlocal opened
        opened += 1
        if opened == 2:
            raise OSError(errno.EMFILE, "Too many open files")
        return os_open(*arguments)

    os_open = os.open
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", second_fails)
        with pytest.raises(OSError, match="Too many open files"):
            lock.renew()
    assert not lock.is_whole(), "so that it is tried again"
    lock.renew()
    with pytest.raises(AssertionError, match="refused"):
        refused(others)


def refused(others: Others) -> None:
    """Fail with what another process is told that wants to serve."""
    source = f"{HEAD}\ntry: take()\nexcept Exception as error: print(f'refused: {{error}}')"
    command = [sys.executable, "-c", source, str(others.socket)]
    said = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=60, check=True).stdout
    if said:
        raise AssertionError(said)


def test_a_lock_that_another_has_taken_is_lost(others: Others, lock: DaemonInstanceLock) -> None:
    lock.acquire()
    for end in (".serving", ".lock"):
        others.socket.with_name(f"w.sock{end}").unlink()
    other, _ = others.run("lock = take(); found = 0")
    with pytest.raises(AlreadyRunningError, match=rf"another daemon \(pid {other.pid}\) serves it"):
        lock.renew()


def test_lock_files_do_not_grow_old(others: Others, lock: DaemonInstanceLock) -> None:
    lock.acquire()
    files = [others.socket.with_name(f"w.sock{end}") for end in (".serving", ".lock")]
    for file in files:
        os.utime(file, (1, 1))
    lock.touch()
    assert all(file.stat().st_mtime > 1 for file in files)


def test_a_process_that_is_found_is_one_that_has_the_lock(others: Others, lock: DaemonInstanceLock) -> None:
    lock.acquire()
    name = lock_holders.kernel_name(lock.writers)
    assert name is not None
    files = {name: "w.sock.serving"}
    assert lock_holders.holders(files) == [], "this process does not count"
    assert lock_holders.holds(os.getpid(), files)
    assert not lock_holders.holds(os.getpid(), {name: "other"})
    assert not lock_holders.holds(1 << 22, files)
    assert not lock_holders.uses_gpu(os.getpid())


def until(check: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not check():
        assert time.monotonic() < deadline
        time.sleep(0.01)
