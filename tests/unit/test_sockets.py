"""The files of a socket path while a daemon serves: what it looks after, mends, and leaves to others."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
import socket as sockets
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from weightd._transport import address
from weightd._transport.address import handles_path
from weightd_daemon.config.toml_file import TemporaryConfigError
from weightd_daemon.operations import sockets as module
from weightd_daemon.operations.serving_lock import AlreadyRunningError
from weightd_daemon.operations.sockets import DaemonSockets, identity, locked, remove_own


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
