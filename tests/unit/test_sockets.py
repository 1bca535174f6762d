"""The files of a socket path while a daemon serves: what it looks after, mends, and leaves to others."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import socket as sockets
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from weightd._transport import address
from weightd._transport.address import handles_path
from weightd_daemon.config.toml_file import TemporaryConfigError
from weightd_daemon.operations import sockets as module
from weightd_daemon.operations.serving_lock import AlreadyRunningError
from weightd_daemon.operations.sockets import DaemonSockets, identity, listen, locked, remove_own


class Control:
    """Binds as gRPC does: over whatever lies there."""

    def __init__(self) -> None:
        self.listeners: list[sockets.socket] = []
        self.refuse = 0

    def bind(self, path: Path) -> None:
        if self.refuse:
            self.refuse -= 1
            raise OSError(24, "Too many open files")
        path.unlink(missing_ok=True)
        self.listeners.append(sockets.socket(sockets.AF_UNIX, sockets.SOCK_STREAM))
        self.listeners[-1].bind(str(path))
        self.listeners[-1].listen()

    async def serve(self) -> None:
        pass

    def close(self) -> None:
        for listener in self.listeners:
            listener.close()


@pytest.fixture
def control() -> Iterator[Control]:
    made = Control()
    yield made
    made.close()


@contextlib.contextmanager
def served(path: Path, control: Control) -> Iterator[DaemonSockets]:
    """Sockets that are open."""
    with locked(path) as made:
        asyncio.run(made.open(0o640, control, control.listeners.append))
        yield made


def is_reached(path: Path) -> bool:
    with sockets.socket(sockets.AF_UNIX, sockets.SOCK_STREAM) as one:
        return one.connect_ex(str(path)) == 0


@pytest.mark.parametrize("remove", [Path.unlink, lambda path: shutil.rmtree(path.parent)], ids=["socket", "folder"])
@pytest.mark.parametrize("own", [False, True], ids=["given", "in /tmp"])
def test_what_was_removed_is_there_again(
    short_path: Path, control: Control, remove: Callable[[Path], None], own: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    short_path.chmod(0o1777)
    monkeypatch.setattr(address, "TEMPORARY", short_path)
    path = (address._own_folder() if own else short_path / "folder") / "w.sock"
    with served(path, control) as made:
        asyncio.run(made.look())
        before = identity(path)
        assert is_reached(path)
        remove(path)
        asyncio.run(made.look())
        assert is_reached(path)
        assert identity(path) != before
        assert {one.stat().st_mode & 0o777 for one in (path, handles_path(path))} == {0o640}
        assert made.lock.is_whole()
        assert made.lock.writers >= 0
        made.change_mode(0o600)
        assert {one.stat().st_mode & 0o777 for one in (path, handles_path(path))} == {0o600}
    assert sorted(one.name for one in path.parent.iterdir()) == ["w.sock.lock", "w.sock.serving"]


@pytest.mark.parametrize("which", [0, 1])
def test_what_is_anothers_is_left(short_path: Path, control: Control, which: int) -> None:
    path = short_path / "w.sock"
    place = (path, handles_path(path))[which]
    with served(path, control) as made:
        place.unlink()
        place.write_text("another's")
        with pytest.raises(AlreadyRunningError, match=f"socket {place}: another process has put its own in its place"):
            asyncio.run(made.look())
    assert place.read_text() == "another's"


def test_a_start_takes_nothing_from_one_who_listens(short_path: Path, control: Control) -> None:
    path = short_path / "w.sock"
    control.bind(path)
    before = identity(path)
    with pytest.raises(AlreadyRunningError, match=r"a process listens there that does not have its lock"), locked(path):
        pass
    assert identity(path) == before
    control.close()
    with locked(path):
        assert not path.exists(), "it was left by one that has ended"


def dead() -> int:
    """The number of a process that has ended."""
    with subprocess.Popen(["true"]) as process:
        process.wait()
    return process.pid


def bound(path: Path, *, listens: bool = False) -> sockets.socket:
    made = sockets.socket(sockets.AF_UNIX, sockets.SOCK_SEQPACKET)
    made.bind(str(path))
    if listens:
        made.listen()
    return made


def test_what_a_killed_start_left_beside_the_sockets_is_removed(short_path: Path) -> None:
    path, gone = short_path / "w.sock", dead()
    for mark in ("~", "."):
        bound(short_path / f"w.sock{mark}{gone}").close()
    with locked(path):
        assert sorted(one.name for one in short_path.iterdir()) == ["w.sock.lock", "w.sock.serving"]


def test_what_may_be_anothers_stays_beside_the_sockets(short_path: Path) -> None:
    path, gone = short_path / "w.sock", dead()
    kept = {short_path / name for name in (f"w.sock~{os.getppid()}", f"v.sock~{gone}", f"w.sock~{gone}x", "w.sock~0")}
    for name in kept:
        bound(name).close()
    listens, file, foreign = (short_path / f"w.sock{end}" for end in (f"~{gone}", f".{gone}", f"~{dead()}"))
    file.write_text("no socket")
    if os.geteuid() == 0:
        bound(foreign).close()
        os.chown(foreign, 1, -1)
        kept.add(foreign)
    with bound(listens, listens=True), locked(path):
        assert {listens, file, *kept} <= {*short_path.iterdir()}


def test_only_ones_own_is_removed(tmp_path: Path) -> None:
    file = tmp_path / "file"
    remove_own(file, (1, 1))
    file.write_text("")
    mine = identity(file)
    other = tmp_path / "other"
    other.write_text("")
    other.rename(file)
    remove_own(file, mine)
    assert file.exists()
    remove_own(file, identity(file))
    assert not file.exists()


@pytest.mark.parametrize("refusals", [2, 100])
def test_what_cannot_be_made_now_is_tried_again_for_a_while(
    short_path: Path, control: Control, refusals: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "LOOK_SECONDS", 0.001)
    path = short_path / "w.sock"
    told: list[Exception] = []

    async def run(made: DaemonSockets) -> None:
        done = asyncio.Event()
        made.watch(lambda error: (told.append(error), done.set()))
        control.refuse = refusals
        path.unlink()
        async with asyncio.timeout(60):
            while not (path.exists() or done.is_set()):  # noqa: ASYNC110  # nobody tells of a file that comes
                await asyncio.sleep(0.001)
        await made.stop_watching()

    caplog.set_level(logging.WARNING)
    with served(path, control) as made:
        asyncio.run(run(made))
    assert "cannot be made: [Errno 24] Too many open files; trying again" in caplog.text
    assert [type(error) for error in told] == ([] if refusals == 2 else [TemporaryConfigError])


def test_what_other_threads_make_meanwhile_stays_usable(short_path: Path, control: Control) -> None:
    """The umask is that of the whole process: a folder that another thread makes must not lose its x."""
    bind = control.bind
    modes: list[int] = []

    def make_and_bind(path: Path) -> None:
        folder = short_path / "of another thread"
        thread = threading.Thread(target=folder.mkdir)
        thread.start()
        thread.join()
        modes.append(folder.stat().st_mode & 0o777)
        bind(path)

    control.bind = make_and_bind  # type: ignore[method-assign]  # looks before it binds
    with served(short_path / "w.sock", control):
        pass
    assert [mode & 0o700 for mode in modes] == [0o700]


@pytest.mark.parametrize("mode", [0o600, 0o660, 0o666])
@pytest.mark.parametrize("mask", [0, 0o077])
def test_a_listener_has_its_mode_from_the_first_and_leaves_the_umask_alone(
    short_path: Path, mode: int, mask: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, seen = short_path / "w.sock.handles", list[tuple[bool, int]]()
    chmod = Path.chmod

    def look_and_change(made: Path, mode: int) -> None:
        now = os.umask(mask)
        os.umask(now)
        seen.append((path.exists(), now))
        assert made.stat().st_mode & 0o777 & ~mode == 0, "never more than is wanted"
        chmod(made, mode)

    monkeypatch.setattr(Path, "chmod", look_and_change)
    before = os.umask(mask)
    try:
        with listen(path, mode), sockets.socket(sockets.AF_UNIX, sockets.SOCK_SEQPACKET) as client:
            assert path.stat().st_mode & 0o777 == mode
            client.connect(str(path))
    finally:
        os.umask(before)
    assert seen == [(False, mask)]
    assert [file.name for file in short_path.iterdir()] == ["w.sock.handles"]


def test_a_listener_takes_nobodys_place(short_path: Path) -> None:
    path = short_path / "w.sock.handles"
    path.write_text("another's")
    with pytest.raises(FileExistsError):
        listen(path, 0o600)
    assert [file.read_text() for file in short_path.iterdir()] == ["another's"]
