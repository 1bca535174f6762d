"""Daemon and client meet at an address that nobody told them, and at paths with strange characters."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.daemon import environment
from support.users import ALICE, needs_root

UID = os.geteuid()
# The folders of the rule lie below the test's; the rest is the daemon and the command as they are.
_MOVED = """
import sys
from pathlib import Path
from weightd._transport import address
root = Path(sys.argv.pop(1))
address.SYSTEM_SOCKET = root / "system" / "missing" / "weightd.sock"
address.RUNTIME_FOLDERS, address.TEMPORARY = root / "user", root / "tmp"
if sys.argv[1] == "serve":
    from weightd_daemon.__main__ import main
    sys.exit(main(sys.argv[1:]))
from weightd.__main__ import main
sys.exit(main())
"""


@pytest.fixture
def root(short_path: Path) -> Path:
    """Where the system's folder cannot be made, and /tmp is anybody's."""
    (short_path / "system").write_text("")
    (short_path / "tmp").mkdir()
    (short_path / "tmp").chmod(0o1777)
    return short_path


def argv(root: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-c", _MOVED, str(root), *arguments]


def without_runtime(root: Path) -> dict[str, str]:
    variables = environment() | {"XDG_STATE_HOME": str(root / "state")}
    variables.pop("XDG_RUNTIME_DIR", None)
    return variables


def command(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        argv(root, *arguments),
        env=without_runtime(root), capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


@contextlib.contextmanager
def serving(argv: list[str], variables: dict[str, str], cwd: Path | None = None) -> Iterator[str]:
    """A daemon, until the end of the block; its line that says ready."""
    process = subprocess.Popen(
        [*argv, "--device=host", "--budget=64MiB"], env=variables, cwd=cwd, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        ready = process.stdout.readline()
        if not ready:
            raise AssertionError(process.communicate(timeout=20)[1])
        yield ready
        process.terminate()
        _, log = process.communicate(timeout=20)
        assert (process.returncode, "Traceback" in log) == (0, False), log
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=10)


def test_they_meet_in_the_users_own_folder_which_no_cleaner_takes(root: Path) -> None:
    folder = root / "tmp" / f"weightd-{UID}"
    assert command(root, "ping").returncode == 69
    with serving(argv(root, "serve"), without_runtime(root)) as ready:
        assert ready.startswith(f"weightd is ready on {folder}/weightd.sock: ")
        assert folder.stat().st_mode & 0o7777 == 0o700
        cleaner = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            with pytest.raises(BlockingIOError):  # as systemd-tmpfiles asks before it removes anything
                fcntl.flock(cleaner, fcntl.LOCK_EX | fcntl.LOCK_NB)
        finally:
            os.close(cleaner)
        done = command(root, "stats", "-q")
        assert (done.returncode, done.stderr) == (0, "")
    with serving(argv(root, "serve"), without_runtime(root)):  # again, in the folder that is there
        assert command(root, "ping").returncode == 0


def test_a_session_folder_that_is_ours_alone_comes_first(root: Path) -> None:
    session = root / "user" / str(UID)
    session.mkdir(mode=0o700, parents=True)
    with serving(argv(root, "serve"), without_runtime(root)) as ready:
        assert ready.startswith(f"weightd is ready on {session}/weightd/weightd.sock: ")
        assert command(root, "ping").returncode == 0
    assert not (root / "tmp" / f"weightd-{UID}").exists()


@pytest.mark.parametrize("squatter", ["link", "file", "mode", "owner"])
def test_neither_side_uses_a_squatted_folder(root: Path, squatter: str) -> None:
    folder, elsewhere = root / "tmp" / f"weightd-{UID}", root / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    if squatter == "link":
        folder.symlink_to(elsewhere)
    elif squatter == "file":
        folder.write_text("")
    else:
        folder.mkdir(mode=0o700)
        if squatter == "mode":
            folder.chmod(0o777)
        elif UID == 0:
            os.chown(folder, ALICE, ALICE)
        else:
            pytest.skip("only root can give a folder away")
    before = sorted(elsewhere.iterdir())
    for arguments, code in (("ping",), 77), (("serve", "--device=host"), 1):
        done = command(root, *arguments)
        assert done.returncode == code, done.stderr
        (line,) = [line for line in done.stderr.splitlines() if line.startswith("weightd: ")]
        assert f"{folder}: " in line
        assert "so a socket in it may be anybody's; have it removed, or set WEIGHTD_SOCKET" in line
        assert "Traceback" not in done.stderr
    assert sorted(elsewhere.iterdir()) == before


@needs_root
def test_the_client_hangs_up_on_another_users_daemon(root: Path) -> None:
    """A socket in the right folder that somebody else listens on, as if the folder had been theirs before."""
    folder = root / "tmp" / f"weightd-{UID}"
    folder.mkdir(mode=0o700)
    (folder / "weightd.sock").touch()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(folder / "weightd.sock.handles"))
        child = os.fork()
        if child == 0:  # who calls listen() is who the kernel names
            os.setresuid(ALICE, ALICE, ALICE)
            listener.listen()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        done = command(root, "ping")
        assert done.returncode == 77
        assert f"who listens there is uid {ALICE}, and not you; it is not used" in done.stderr
        with listener.accept()[0] as accepted:
            assert accepted.recv(100) == b""  # it was told nothing


@pytest.mark.parametrize(
    ("name", "absolute"), [("a%41", True), ("a#b", True), ("a?b", True), ("% é:x", True), ("unix:a%41#b?c", False)]
)
def test_paths_that_uris_would_read_otherwise(short_path: Path, name: str, absolute: bool) -> None:
    path = short_path / name / "w.sock" if absolute else Path(name) / "w.sock"
    daemon = [sys.executable, "-m", "weightd_daemon", "serve", f"--socket={path}", f"--state-dir={short_path}/state"]
    with serving(daemon, environment(), short_path):
        done = subprocess.run(
            [sys.executable, "-m", "weightd", "--socket", str(path), "stats", "-q"],
            env=environment(), cwd=short_path, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (0, "")
        assert (short_path / name / "w.sock").is_socket()


def test_a_comma_is_refused_by_both_sides(short_path: Path) -> None:
    path = short_path / "a,b.sock"
    for arguments, code in ((["weightd", "ping"], 2), (["weightd_daemon", "serve"], 78)):
        done = subprocess.run(
            [sys.executable, "-m", *arguments, "--socket", str(path)],
            env=environment(), capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == code
        assert f"socket {path}: has a comma" in done.stderr
        assert len(done.stderr.splitlines()) == 1
