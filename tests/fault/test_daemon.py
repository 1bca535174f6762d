"""Daemons that die, stop or cannot start: clients go on, the next daemon on the path starts, nothing is overwritten."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

import weightd
from support import checkpoints
from support.backends import EVERY, Backend
from support.background import background
from support.content import content
from support.daemon import Daemon, environment, eventually
from support.launch import launcher
from support.loader import STOP, state, wait_stopped
from support.worker import Worker

StartDaemon = Callable[..., Daemon]
Spawn = Callable[[Daemon], Worker]
MIB = 1 << 20

everywhere = pytest.mark.backends(*EVERY, swept="cuda_ipc")


def gone(pid: int) -> bool:
    return state(pid) in ("", "Z")


def marked(folder: Path) -> Path:
    """A checkpoint at which a stopping loader stops."""
    return checkpoints.write(folder / "marked.safetensors", {"t": ("U8", (2 * MIB,), STOP.ljust(2 * MIB, b"x"))})


def handles(daemon: Daemon) -> Path:
    return daemon.socket.with_name(f"{daemon.socket.name}.handles")


def test_attached_clients_outlive_a_killed_daemon(daemon: Daemon, tmp_path: Path, spawn: Spawn) -> None:
    path = checkpoints.write_random(tmp_path / "m.safetensors", 8, MIB, seed="m")
    client = daemon.connect()
    client.load(path, name="m")
    worker = spawn(daemon)
    worker.run(
        "import weightd\nclient = weightd.connect(timeout=60)\n"
        "attachment = client.attach('m')\nkept = attachment.buffer('t7')"
    )
    attachment = client.attach("m")
    (loader,) = daemon.loaders()
    daemon.kill()
    assert daemon.socket.exists()
    eventually(lambda: gone(loader), what="the loader dies with its daemon")
    for i in range(8):
        assert attachment.buffer(f"t{i}") == checkpoints.random_bytes(("m", i), MIB)
    with pytest.raises(weightd.DaemonUnreachableError, match=r"nobody listens there.*weightd serve"):
        client.stats()

    daemon.start()  # over the sockets that the killed one left
    assert client.stats().checkpoints == 0  # the same client, on a new connection
    client.load(checkpoints.write_random(tmp_path / "other.safetensors", 8, MIB, seed="other"), name="m")
    worker.run("attachment.close()\nimport hashlib\nresult = hashlib.sha256(kept).hexdigest()")
    assert attachment.buffer("t7") == checkpoints.random_bytes(("m", 7), MIB)
    attachment.close()
    source = "with client.attach('m') as again: result = bytes(again.buffer('t7')) != bytes(kept)"
    assert worker.run(source) is True


@everywhere
def test_killed_in_mid_load(start_daemon: StartDaemon, backend: Backend, tmp_path: Path) -> None:
    daemon = start_daemon(argv=launcher(loader="stopping"))
    client = daemon.connect()
    future = background(client.load_report, marked(tmp_path))
    (loader,) = wait_stopped(daemon)
    daemon.kill()
    with pytest.raises(weightd.DaemonUnreachableError):
        future.result(60)
    # Even a stopped loader dies; as long as it lived it would hold the lock.
    eventually(lambda: gone(loader), what="the loader dies with its daemon")
    eventually(lambda: not backend.device_bytes(), what="the memory of the load is the device's again")
    daemon.start()
    assert client.checkpoints() == []


@pytest.mark.backends("host", "cuda_vmm")  # where memory outlives the daemon
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_clean_stop(daemon: Daemon, tmp_path: Path, number: signal.Signals, code: int) -> None:
    client = daemon.connect()
    client.load(checkpoints.write_random(tmp_path / "m.safetensors", 2, 5000, seed="m"), name="m")
    attachment = client.attach("m")
    (loader,) = daemon.loaders()
    assert daemon.process is not None
    daemon.process.send_signal(number)
    assert daemon.process.wait(60) == code
    assert not daemon.socket.exists()
    assert not handles(daemon).exists()
    assert gone(loader)
    assert content(attachment, "t1") == checkpoints.random_bytes(("m", 1), 5000)
    attachment.close()
    with pytest.raises(weightd.DaemonUnreachableError, match="there is no such socket"):
        client.stats()


@everywhere
def test_stop_under_load(start_daemon: StartDaemon, tmp_path: Path) -> None:
    daemon = start_daemon(argv=launcher(loader="stopping"))
    future = background(daemon.connect().load_report, marked(tmp_path))
    (loader,) = wait_stopped(daemon)
    assert daemon.stop() == 0, "it does not wait for a loader that has stopped"
    with pytest.raises((weightd.LeaseLostError, weightd.DaemonUnreachableError), match="daemon"):
        future.result(60)
    assert gone(loader)
    assert not daemon.socket.exists()
    assert not handles(daemon).exists()


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


@pytest.mark.parametrize("mask", [0, 0o077, 0o022])
@pytest.mark.parametrize("mode", ["0600", "0660"])
def test_socket_modes_are_set_not_inherited(start_daemon: StartDaemon, mask: int, mode: str) -> None:
    with umask(mask):
        daemon = start_daemon(socket_mode=mode)
    for path in (daemon.socket, handles(daemon)):
        assert oct(stat.S_IMODE(path.stat().st_mode)) == oct(int(mode, 8)), path
    daemon.connect().stats()


@pytest.mark.parametrize("suffix", ["", ".handles"])
def test_a_file_in_the_way_stays(daemon: Daemon, suffix: str) -> None:
    assert daemon.stop() == 0
    blocked = daemon.socket.with_name(daemon.socket.name + suffix)
    blocked.write_text("precious")
    with pytest.raises(AssertionError, match=f"{blocked} is there and is not a socket; move it away"):
        daemon.start()
    assert daemon.process is not None
    assert daemon.process.returncode == 1
    assert blocked.read_text() == "precious"
    blocked.unlink()
    daemon.start()


def serve(socket: Path, *flags: str, through: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    """Run a daemon that is not expected to come up."""
    command = [*through, sys.executable, "-m", "weightd_daemon", "serve", f"--socket={socket}", *flags]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=60, check=False)


def test_a_second_daemon_says_who_is_first(daemon: Daemon, tmp_path: Path) -> None:
    second = serve(daemon.socket, f"--state-dir={tmp_path}")
    assert (second.returncode, second.stdout) == (1, "")
    assert f"another daemon (pid {daemon.pid}) serves it" in second.stderr
    assert len(second.stderr.splitlines()) == 1
    assert daemon.connect().version().pid == daemon.pid


@pytest.mark.parametrize(
    ("socket", "flags", "fragment"),
    [
        ("x" * 120, [], "over 107 bytes; choose a shorter one"),
        ("w.sock", ["--budget=lots"], "--budget"),
        ("w.sock", ["--socket-mode=888"], "must be an octal mode"),
        ("w.sock", ["--max-connections=0"], "must be at least 1"),
        ("w.sock", ["--isolation=none"], "must be one of shared, uid"),
    ],
)
def test_settings_that_cannot_be(tmp_path: Path, socket: str, flags: list[str], fragment: str) -> None:
    refused = serve(tmp_path / socket, *flags)
    assert (refused.returncode, refused.stdout) == (78, "")
    assert fragment in refused.stderr
    assert len(refused.stderr.splitlines()) == 1


def test_a_socket_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused = serve(tmp_path / "file" / "w.sock", f"--state-dir={tmp_path}")
    assert refused.returncode == 1
    assert "cannot be made" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1


def test_a_start_without_descriptors_is_to_be_tried_again(tmp_path: Path) -> None:
    """Whatever the start is at when it finds none: one line, and the exit code at which systemd tries again."""
    for most in (5, 6, 8, 12, 18):
        limited = ("sh", "-c", f'ulimit -n {most} && exec "$@"', "sh")
        refused = serve(tmp_path / "w.sock", f"--state-dir={tmp_path}", through=limited)
        assert (refused.returncode, refused.stdout) == (75, ""), refused.stderr
        assert f"(RLIMIT_NOFILE is {most}); raise the daemon's `ulimit -n`" in refused.stderr
        assert len(refused.stderr.splitlines()) == 1


STARVED = """
import contextlib, importlib, os, resource, sys
from weightd_daemon import __main__ as command
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
place, room, *rest = sys.argv[1:]
owner, name = importlib.import_module(place.rpartition(".")[0]), place.rpartition(".")[2]
call = getattr(owner, name)
def starved(*arguments, **more):
    held = []
    with contextlib.suppress(OSError):
        while True:
            held.append(os.dup(2))
    for number in held[len(held) - int(room):]:
        os.close(number)
    return call(*arguments, **more)
setattr(owner, name, starved)
sys.exit(command.main(rest))
"""
"""Starts a daemon to which something, as a driver, leaves `room` descriptors when it comes to `place`.

It has no state folder: the thread of the digest index would open and close files meanwhile.
"""


@pytest.mark.parametrize(
    ("place", "room", "what"),
    [
        ("app.locked", 0, "socket"),
        ("monitoring.endpoints.listen", 0, "metrics"),
        ("app.HandleServer", 0, "starting gRPC"),
        ("app.HandleServer", 4, "starting gRPC"),
        ("operations.sockets.listen", 0, "socket"),
    ],
)
def test_a_start_that_runs_out_of_descriptors_on_its_way(place: str, room: int, what: str, short_path: Path) -> None:
    refused = subprocess.run(
        [sys.executable, "-c", STARVED, f"weightd_daemon.{place}", str(room), "serve", "--device=host",
         f"--socket={short_path / 'w.sock'}", "--state-dir=/dev/null/none", f"--metrics={short_path / 'm.sock'}",
         "--log-level=error"],
        capture_output=True, text=True, timeout=60, env=environment(), check=False,
    )  # fmt: skip
    assert (refused.returncode, refused.stdout) == (75, ""), refused.stderr
    (line,) = refused.stderr.splitlines()
    assert line.startswith(f"weightd: {what}")
    assert line.endswith("(RLIMIT_NOFILE is 64); raise the daemon's `ulimit -n` (LimitNOFILE= of its unit)")


def test_next_daemon_does_not_use_the_index(daemon: Daemon, tmp_path: Path) -> None:
    """What the index says of blobs ends with the daemon that held them, whatever numbers the next one gives."""
    path = checkpoints.write_random(tmp_path / "m.safetensors", 2, MIB)
    checkpoints.rest(path)
    daemon.connect().load(path)
    daemon.kill()
    daemon.start()
    client = daemon.connect()
    other = checkpoints.write_random(tmp_path / "other.safetensors", 2, MIB, seed="other")
    client.load(other)
    report = client.load_report(path)
    assert report is not None
    assert (report.read_bytes, report.unique_bytes) == (2 * MIB, 2 * MIB)
    with client.attach(path) as attachment:
        assert attachment.buffer("t1") == checkpoints.random_bytes((0, 1), MIB)
