"""Sockets and locks that are removed or taken while a daemon serves, and sockets that are another's at its end."""

from __future__ import annotations

import os
import signal
import socket as sockets
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import weightd
from support import checkpoints
from support.content import content
from support.daemon import PATIENCE, Daemon, environment, eventually
from support.launch import launcher
from support.leash import leashed
from weightd._transport.address import handles_path

StartDaemon = Callable[..., Daemon]
SIZE = 1 << 16
SOON, NEVER = 0.05, 3600.0
"""Seconds between two looks after the sockets."""


def both(daemon: Daemon) -> list[Path]:
    return [daemon.socket, handles_path(daemon.socket)]


def locks(daemon: Daemon) -> list[Path]:
    return [daemon.socket.with_name(f"{daemon.socket.name}{end}") for end in (".serving", ".lock")]


def loaded(daemon: Daemon, folder: Path, name: str) -> weightd.Client:
    """A client of a daemon that has a checkpoint."""
    client = daemon.connect()
    client.load(checkpoints.write_random(folder / f"{name}.safetensors", 1, SIZE, seed=name), name=name)
    return client


def has(client: weightd.Client, name: str) -> bool:
    with client.attach(name) as attachment:
        return content(attachment, "t0") == checkpoints.random_bytes((name, 0), SIZE)


@contextmanager
def second(daemon: Daemon) -> Iterator[subprocess.Popen[str]]:
    """Another daemon that is started on the path of one. It is killed at the end."""
    command = [sys.executable, "-m", "weightd_daemon", "serve", f"--socket={daemon.socket}", "--device=host",
               f"--state-dir={daemon.folder / 'second'}"]  # fmt: skip
    process = subprocess.Popen(
        leashed(command), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def refusal(daemon: Daemon) -> str:
    """What a second daemon says that does not come up."""
    with second(daemon) as process:
        said, error = process.communicate(timeout=PATIENCE)
        assert (process.returncode, said) == (1, "")
        return error


def is_ready(process: subprocess.Popen[str]) -> bool:
    assert process.stdout is not None
    return process.stdout.readline().startswith("weightd is ready")


@pytest.mark.parametrize("which", [[0, 1], [0], [1]], ids=["both", "control", "handles"])
def test_removed_sockets_are_made_anew(start_daemon: StartDaemon, tmp_path: Path, which: list[int]) -> None:
    daemon = start_daemon(argv=launcher(look=SOON), socket_mode="0660")
    client = loaded(daemon, tmp_path, "m")
    with client.attach("m") as attachment:
        for round_ in (1, 2):
            before = [path.stat().st_ino for path in both(daemon)]
            for number in which:
                both(daemon)[number].unlink()
            made = round_ * len(which)
            eventually(lambda: daemon.logged().count("; it is made anew") == made, what="new sockets")  # noqa: B023  # called here
            for number in (0, 1):
                assert (both(daemon)[number].stat().st_ino != before[number]) == (number in which)
            assert {path.stat().st_mode & 0o777 for path in both(daemon)} == {0o660}
            assert has(daemon.connect(), "m")
        assert client.version().pid == daemon.pid, "the old connection goes on"
        assert len(client.leases()) == 1
        assert content(attachment, "t0") == checkpoints.random_bytes(("m", 0), SIZE)
    assert f"socket {both(daemon)[which[0]]} was removed; it is made anew" in daemon.logged()
    assert not list(daemon.folder.glob(f"{daemon.socket.name}.[0-9]*"))
    daemon.baseline = daemon.descriptors()  # a gRPC server more for each time
    loaded(daemon, tmp_path, "other")
    assert refusal(daemon).startswith(f"weightd: socket {daemon.socket}: another daemon (pid {daemon.pid}) serves it")


@pytest.mark.parametrize("which", [0, 1])
def test_a_daemon_whose_socket_was_taken_ends_and_leaves_it(start_daemon: StartDaemon, which: int) -> None:
    daemon = start_daemon(argv=launcher(look=SOON))
    path = both(daemon)[which]
    with sockets.socket(sockets.AF_UNIX, sockets.SOCK_STREAM) as other:
        other.bind(str(daemon.folder / "other"))
        other.listen()
        os.rename(daemon.folder / "other", path)
        assert daemon.process is not None
        assert daemon.process.wait(PATIENCE) == 1
        assert f"weightd: socket {path}: another process has put its own in its place; this daemon ends\n" in (
            daemon.logged()
        )
        assert path.exists()
        assert not both(daemon)[1 - which].exists(), "its own is removed"


def test_removed_locks_are_taken_anew(start_daemon: StartDaemon, tmp_path: Path) -> None:
    daemon = start_daemon(argv=launcher(look=SOON))
    for path in locks(daemon):
        path.unlink()
        eventually(path.exists, what="the lock is there")
    eventually(lambda: "it is locked anew" in daemon.logged(), what="the log")
    assert f"another daemon (pid {daemon.pid}) serves it" in refusal(daemon)
    client = loaded(daemon, tmp_path, "m")  # by a loader that has the new lock
    daemon.kill()
    daemon.start()
    assert client.checkpoints() == []


def test_without_its_locks_a_daemon_is_known_by_its_socket(start_daemon: StartDaemon, tmp_path: Path) -> None:
    daemon = start_daemon(argv=launcher(look=NEVER))
    client = loaded(daemon, tmp_path, "m")
    for path in locks(daemon):
        path.unlink()
    assert f"socket {daemon.socket}: a process listens there that does not have its lock" in refusal(daemon)
    aside = daemon.folder / "aside"
    daemon.socket.rename(aside)
    assert f"socket {both(daemon)[1]}: a process listens there" in refusal(daemon)
    aside.rename(daemon.socket)
    assert has(client, "m")


@pytest.mark.parametrize("look", [NEVER, 2.0], ids=["told to stop", "by itself"])
def test_one_that_lost_all_its_files_to_another_ends_and_leaves_them(
    start_daemon: StartDaemon, tmp_path: Path, look: float
) -> None:
    """Whoever removes everything at once cannot be kept from starting another; the first does not harm it."""
    daemon = start_daemon(argv=launcher(look=look))
    assert daemon.process is not None
    # Stopped, so that it does not look between the two; its timer is over when it goes on.
    os.kill(daemon.pid, signal.SIGSTOP)
    for path in (*both(daemon), *locks(daemon)):
        path.unlink()
    with second(daemon) as other:
        assert is_ready(other)
        os.kill(daemon.pid, signal.SIGCONT)
        if look == NEVER:
            daemon.process.send_signal(signal.SIGTERM)
            assert daemon.process.wait(PATIENCE) == 0
        else:
            assert daemon.process.wait(PATIENCE) == 1
            assert f"another daemon (pid {other.pid}) serves it" in daemon.logged()
        client = loaded(daemon, tmp_path, "m")
        assert has(client, "m")
        assert client.version().pid == other.pid
        client.close()


def test_a_metrics_socket_of_another_is_left(start_daemon: StartDaemon, short_path: Path) -> None:
    path = short_path / "m.sock"
    daemon = start_daemon(metrics=str(path))
    path.unlink()
    path.write_text("another's")
    assert daemon.stop() == 0
    assert path.read_text() == "another's"


@pytest.mark.parametrize("place", ["hardlink_to", "rename"])
def test_what_a_start_leaves_that_is_killed_before_its_sockets_have_their_places_goes_with_the_next(
    start_daemon: StartDaemon, place: str
) -> None:
    daemon = start_daemon()
    assert daemon.stop() == 0
    killed = (
        "import os, pathlib, sys; from weightd_daemon.__main__ import main\n"
        f"pathlib.Path.{place} = lambda *_: os.kill(os.getpid(), 9)\n"
        f"main(['serve', '--socket={daemon.socket}', '--device=host', '--state-dir={daemon.folder / 'state'}'])"
    )
    run = subprocess.run([sys.executable, "-c", killed], env=environment(), check=False, timeout=PATIENCE)
    assert run.returncode == -signal.SIGKILL
    assert len(left_beside(daemon)) == 1
    daemon.start()
    assert left_beside(daemon) == []
    assert daemon.connect().version().pid == daemon.pid


def left_beside(daemon: Daemon) -> list[Path]:
    """Sockets that have not got their place."""
    return [*daemon.folder.glob(f"{daemon.socket.name}[.~][0-9]*")]
