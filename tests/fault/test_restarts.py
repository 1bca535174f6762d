"""A daemon that is killed leaves loaders that do not die by themselves, or cannot: the next one starts all the same."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support import checkpoints
from support.background import background
from support.content import content
from support.daemon import Daemon, environment, eventually
from support.fuse import HangingFile, hanging_file
from support.launch import launcher
from support.leash import leashed
from support.loader import state, wait_stopped
from support.manager import Manager

StartDaemon = Callable[..., Daemon]
MIB = 1 << 20
SIZE = 8 * MIB


@pytest.fixture
def manager(short_path: Path) -> Iterator[Manager]:
    """A service manager, which forgets everything at the end."""
    manager = Manager(short_path / "notify")
    yield manager
    manager.close()


def is_gone(pid: int) -> bool:
    return state(pid) in ("", "Z")


def saved(folder: Path, seed: str, count: int = 1, shared: dict[int, object] | None = None) -> Path:
    return checkpoints.write_random(folder / f"{seed}.safetensors", count, SIZE, seed, shared)


def with_a_hole(daemon: Daemon, folder: Path) -> None:
    """Load "kept", of one tensor, into a segment in which the next tensor of that size finds room."""
    with daemon.connect() as loading:  # while it is connected, what it has loaded waits for its attach
        loading.load(saved(folder, "gone", 2), name="gone")
        loading.load(saved(folder, "kept", 1, {0: ("gone", 0)}), name="kept")
    client = daemon.connect()
    eventually(lambda: not client.leases(), what="nothing waits")
    client.remove("gone")
    eventually(lambda: client.stats().devices[0].used_bytes == SIZE, what="the hole has no memory")


def begin_to_hang(daemon: Daemon, hanging: HangingFile) -> int:
    """Load the hanging file, in a process of its own that is killed then. Returns the loader that waits for a read."""
    command = hanging.command([sys.executable, "-m", "weightd", "load", str(hanging.path)])
    client = subprocess.Popen(leashed(command), env=environment(daemon.socket), stderr=subprocess.PIPE)
    try:
        waiting: list[int] = []

        def hangs() -> bool:
            assert client.poll() is None, client.stderr and client.stderr.read()
            waiting[:] = [pid for pid in daemon.loaders() if waits_for_fuse(pid)]
            return bool(waiting)

        hanging.wait_until_it_hangs()
        eventually(hangs, what="a loader that waits for a read")
        eventually(lambda: daemon.allocates(SIZE + 1), what="it has written something")
    finally:
        client.kill()
        client.wait(60)
        if client.stderr:
            client.stderr.close()
    return waiting[0]


def waits_for_fuse(pid: int) -> bool:
    """Whether a thread of a process waits for the answer of a FUSE server."""
    try:
        threads = os.listdir(f"/proc/{pid}/task")
        return any("request_wait" in Path(f"/proc/{pid}/task/{thread}/wchan").read_text() for thread in threads)
    except OSError:
        return False


def restarted(daemon: Daemon) -> float:
    """Kill a daemon with SIGKILL and start it again. Returns the seconds that the start took."""
    daemon.kill()
    begun = time.monotonic()
    daemon.start()
    return time.monotonic() - begun


def test_beside_a_loader_that_cannot_die(start_daemon: StartDaemon, manager: Manager, tmp_path: Path) -> None:
    """Its memory is neither used nor given back, until it has ended."""
    with hanging_file(tmp_path / "mount", saved(tmp_path, "hanging"), SIZE // 2) as hanging:
        daemon = start_daemon(manager=manager, pool="0", reader_threads=1)
        with_a_hole(daemon, tmp_path)
        usual = restarted(daemon)
        client = daemon.connect()
        loader = begin_to_hang(daemon, hanging)
        assert client.stats().devices[0].segments == 1, "the loader's memory is in the hole"

        seconds = restarted(daemon)
        print(f"restarted in {usual:.1f} s, beside a loader that cannot die in {seconds:.1f} s")
        assert seconds < max(3.0, 2 * usual + 1.5)
        assert waits_for_fuse(loader)
        assert f"a loader of the daemon before (pid {loader}) does not end" in daemon.logged()
        client = daemon.connect()
        with client.attach("kept") as attachment:
            assert content(attachment, "t0") == checkpoints.random_bytes(("gone", 0), SIZE)
        aside = client.stats().devices[0].used_bytes - SIZE
        assert aside > 0, "what the loader wrote is there"
        client.load(saved(tmp_path, "more"), name="more")
        assert client.stats().devices[0].segments == 2, "the hole is not used"
        client.verify()

        restarted(daemon)  # and the one after that sees the same
        assert waits_for_fuse(loader)
        client = daemon.connect()
        assert {name for one in client.checkpoints() for name in one.names} == {"kept", "more"}
        assert client.stats().devices[0].used_bytes == 2 * SIZE + aside

        hanging.abort()
        eventually(lambda: not waits_for_fuse(loader), what="the loader ends")
        eventually(lambda: "memory is used again segments=" in daemon.logged(), what="the memory is used again")
        eventually(lambda: client.stats().devices[0].used_bytes == 2 * SIZE, what="unused pages have gone back")
        client.load(saved(tmp_path, "last"), name="last")
        assert client.stats().devices[0].segments == 2, "the hole is used"
        with client.attach("last") as attachment, client.attach("kept") as kept:
            assert content(attachment, "t0") == checkpoints.random_bytes(("last", 0), SIZE)
            assert content(kept, "t0") == checkpoints.random_bytes(("gone", 0), SIZE)


def test_a_loader_that_was_stopped_before_it_could_die_with_its_daemon_is_killed(
    start_daemon: StartDaemon, manager: Manager, tmp_path: Path
) -> None:
    daemon = start_daemon(manager=manager)
    daemon.connect().load(saved(tmp_path, "kept"), name="kept")
    daemon.kill()
    usual, daemon.argv = daemon.argv, launcher(loader="unborn")
    daemon.start()
    background(daemon.connect().load_report, saved(tmp_path, "other"))
    (loader,) = wait_stopped(daemon)
    daemon.kill()
    assert state(loader) == "T", "the kernel does not kill it"
    daemon.argv = usual
    daemon.start()
    eventually(lambda: is_gone(loader), what="the next daemon kills it")
    assert "does not end" not in daemon.logged()
    with daemon.connect().attach("kept") as attachment:
        assert content(attachment, "t0") == checkpoints.random_bytes(("kept", 0), SIZE)


def test_a_stop_beside_a_loader_that_cannot_die(start_daemon: StartDaemon, manager: Manager, tmp_path: Path) -> None:
    with hanging_file(tmp_path / "mount", saved(tmp_path, "hanging"), SIZE // 2) as hanging:
        daemon = start_daemon(manager=manager, reader_threads=1)
        daemon.connect().load(saved(tmp_path, "kept"), name="kept")
        loader = begin_to_hang(daemon, hanging)
        assert daemon.stop() == 0
        assert waits_for_fuse(loader)
        assert not daemon.socket.exists()
        daemon.start()
        with daemon.connect().attach("kept") as attachment:
            assert content(attachment, "t0") == checkpoints.random_bytes(("kept", 0), SIZE)
        hanging.abort()
        eventually(lambda: not waits_for_fuse(loader), what="the loader ends")


@pytest.mark.backends("cuda_ipc", double_only=True)
def test_a_holder_that_lives_on_is_killed_and_waited_for(start_daemon: StartDaemon) -> None:
    daemon = start_daemon()
    (holder,) = daemon.holders()
    os.kill(holder, signal.SIGSTOP)
    daemon.kill()
    daemon.start()
    eventually(lambda: is_gone(holder), what="the holder ends")
    assert len(daemon.holders()) == 1
