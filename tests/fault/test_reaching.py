"""A daemon that cannot be reached: each cause has its own sentence, error and exit code, and its own `fallback`."""

from __future__ import annotations

import grp
import json
import os
import pwd
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import weightd
import weightd.torch
from support import checkpoints
from support.daemon import Daemon, environment, eventually
from support.users import needs_root
from support.wire import Peer
from weightd._proto.v1 import handles_pb2

StartDaemon = Callable[..., Daemon]


@pytest.fixture
def folder(short_path: Path) -> Path:
    """A folder that every user may enter."""
    short_path.chmod(0o755)
    return short_path


def failure(path: Path, timeout: float = 5.0) -> tuple[int, str]:
    """The exit code and the message of an attempt to connect."""
    with pytest.raises(weightd.WeightdError) as caught:
        weightd.connect(path, timeout=timeout)
    return caught.value.exit_code, str(caught.value)


def listening(path: Path, backlog: int = 8) -> socket.socket:
    """A socket that somebody listens on and nobody accepts from."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(str(path))
    listener.listen(backlog)
    return listener


# -- 69: there is no daemon --------------------------------------------------------------------------------------------


def nothing(path: Path) -> None:
    """No file at all."""


def no_folder(path: Path) -> None:
    path.parent.rmdir()


def parent_is_a_file(path: Path) -> None:
    path.parent.rmdir()
    path.parent.write_text("")


def a_file(path: Path) -> None:
    path.write_text("")
    Path(f"{path}.handles").write_text("")


def a_folder(path: Path) -> None:
    path.mkdir()


def left_behind(path: Path) -> None:
    for name in (path, f"{path}.handles"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as gone:
            gone.bind(str(name))


def only_one_of_two(path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as gone:
        gone.bind(str(path))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (nothing, "there is no such socket"),
        (no_folder, "there is no such socket"),
        (parent_is_a_file, "Not a directory"),
        (a_file, "it is a file, not a socket"),
        (a_folder, "it is a folder, not a socket"),
        (left_behind, "nobody listens there"),
        (only_one_of_two, "its handle socket w.sock.handles is missing beside it"),
    ],
)
def test_no_daemon_is_69_and_says_what_is_there(folder: Path, make: Callable[[Path], None], words: str) -> None:
    path = folder / "d" / "w.sock"
    path.parent.mkdir()
    make(path)
    code, message = failure(path)
    assert (code, message.count("\n")) == (69, 0)
    assert message.startswith(f"no weightd daemon at {path}: {words}")
    assert "`weightd serve`" in message


def test_a_socket_of_another_program(folder: Path) -> None:
    path = folder / "w.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as other:
        other.bind(f"{path}.handles")
        other.listen()
        code, message = failure(path)
    assert (code, "w.sock.handles is a socket of another program" in message) == (69, True)


def test_a_path_that_no_socket_can_have(tmp_path: Path) -> None:
    path = tmp_path / ("w" * 120)
    code, message = failure(path)
    assert code == 69
    assert f"its path has {len(os.fsencode(path)) + 8} bytes with `.handles`, and a socket's has at most 107" in message


# -- 75: there is one, and it does not answer --------------------------------------------------------------------------


def test_a_full_daemon_is_75_and_says_so(start_daemon: StartDaemon) -> None:
    daemon = start_daemon(max_connections=2)
    peers = [Peer(daemon.socket) for _ in range(2)]
    for _ in range(20):  # whether the question or the refusal comes first is up to the scheduler
        code, message = failure(daemon.socket)
        assert code == 75
        assert "max_connections = 2" in message
        assert "weightd serve" not in message
    done = daemon.command("ls", check=False)
    assert (done.returncode, done.stderr.count("\n"), "max_connections" in done.stderr) == (75, 1, True)
    for peer in peers:
        peer.close()
    eventually(lambda: can_connect(daemon.socket), what="there is room again")


def can_connect(path: Path) -> bool:
    try:
        weightd.connect(path).close()
    except weightd.DaemonUnreachableError:
        return False
    return True


def test_who_waits_gets_the_next_free_place(start_daemon: StartDaemon, tmp_path: Path) -> None:
    daemon = start_daemon(max_connections=1)
    with Peer(daemon.socket):
        failure(daemon.socket)
        thread = threading.Thread(target=lambda: weightd.connect(daemon.socket, fallback="wait").close())
        thread.start()
        eventually(lambda: daemon.logged().count("connection refused") > 1, what="it has asked")
        assert thread.is_alive()
    thread.join(10)
    assert not thread.is_alive()


def test_a_daemon_that_does_not_answer_is_75(daemon: Daemon) -> None:
    client = daemon.connect(timeout=0.2)
    client.ping()
    os.kill(daemon.pid, signal.SIGSTOP)
    try:
        for attempt in (lambda: weightd.connect(daemon.socket, timeout=0.2), client.stats):
            with pytest.raises(weightd.DaemonBusyError, match=r"does not answer within 0\.2 s") as caught:
                attempt()
            assert caught.value.exit_code == 75
            assert str(daemon.socket) in str(caught.value)
            assert "weightd serve" not in str(caught.value)
    finally:
        os.kill(daemon.pid, signal.SIGCONT)


def test_who_finds_a_full_backlog_waits_its_time(folder: Path) -> None:
    """The kernel refuses at once where too many wait to be accepted; that is a daemon, and one that may be quick."""
    path = folder / "w.sock"
    with listening(Path(f"{path}.handles"), backlog=0) as listener:
        waiting = [socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(1)]
        waiting[0].connect(f"{path}.handles")
        code, message = failure(path, timeout=0.2)
        assert (code, "does not answer within 0.2 s" in message) == (75, True)

        def answer() -> None:
            for peer in (listener.accept()[0], listener.accept()[0]):
                with peer:
                    if peer.recv(65536):
                        reply = handles_pb2.HandleReply(hello=handles_pb2.HelloReply(protocol=1, token="t"))
                        peer.send(reply.SerializeToString())
                        peer.recv(65536)

        thread = threading.Thread(target=answer)
        connecting = threading.Thread(target=lambda: weightd.connect(path, timeout=20).close())
        connecting.start()
        eventually(lambda: connecting.is_alive(), what="it waits")
        waiting[0].close()
        thread.start()
        thread.join(20)
        connecting.join(20)
        assert not connecting.is_alive()


# -- 76: there is something else ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"\xff" * 40, "does not speak weightd's protocol"),
        (b"", "closed the connection"),
        (handles_pb2.HandleReply(detach=handles_pb2.DetachReply()).SerializeToString(), "does not speak weightd's"),
    ],
)
def test_something_that_is_no_daemon(folder: Path, answer: bytes, words: str) -> None:
    path = folder / "w.sock"
    with listening(Path(f"{path}.handles")) as listener:

        def serve() -> None:
            with listener.accept()[0] as peer:
                peer.recv(65536)
                peer.send(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        code, message = failure(path)
        thread.join(10)
    assert words in message
    assert str(path) in message
    assert code == (76 if answer else 69)


def test_another_protocol_is_76(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weightd._transport.handle_socket.PROTOCOL", 2)
    code, message = failure(daemon.socket)
    assert code == 76
    assert "this client speaks protocol 2, the daemon 1" in message


# -- 77: there is one, and you may not reach it ------------------------------------------------------------------------

AS_USER = """
import json, os, sys
import grpc, weightd, weightd._transport.rpc, weightd.torch, weightd.cli.app, safetensors
from pathlib import Path
# Imported before the step down: others may perhaps not read this interpreter or these sources.
grpc.insecure_channel("unix:/nowhere").close()
uid, gid, arguments = json.loads(sys.argv[1])
weightd.cli.app.run(["ls", "--socket", "/nonexistent/w.sock"])
os.setgroups([]); os.setgid(gid); os.setuid(uid)
os.environ.update({"XDG_RUNTIME_DIR": arguments["runtime"]} if "runtime" in arguments else {})
weightd._transport.address.SYSTEM_SOCKET = Path(arguments["system"])
def attempt(call):
    try:
        call()
    except weightd.WeightdError as error:
        return [type(error).__name__, error.exit_code, str(error)]
    return None
"""
REACH = "print(json.dumps([attempt(weightd.connect), weightd.cli.app.run(['ls'])]))"


def as_user(path: Path, source: str, gid: int | None = None, **arguments: str) -> Any:
    """What `source` prints as JSON, run by the user `bin`, for whom the system's daemon is at `path`."""
    user = pwd.getpwnam("bin")
    told = json.dumps([user.pw_uid, user.pw_gid if gid is None else gid, {"system": str(path), **arguments}])
    without = {key: value for key, value in environment().items() if key != "XDG_RUNTIME_DIR"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", AS_USER + source, told],
        capture_output=True, text=True, timeout=60, check=False, env=without,
    )  # fmt: skip
    assert done.stdout, done.stderr
    assert "Traceback" not in done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def guarded(folder: Path) -> Iterator[Path]:
    """The system's daemon as systemd runs it: its folder lets a group in, and its sockets too."""
    group = grp.getgrnam("daemon")
    path = folder / "weightd" / "w.sock"
    path.parent.mkdir()
    with listening(Path(f"{path}.handles")), listening(path):
        for name, mode in ((f"{path}.handles", 0o660), (path, 0o660), (path.parent, 0o750)):
            os.chown(name, 0, group.gr_gid)
            os.chmod(name, mode)
        yield path


@needs_root
@pytest.mark.parametrize("runtime", [{}, {"runtime": "/nonexistent"}], ids=["no runtime folder", "an empty one"])
def test_a_folder_for_a_group_is_77_and_names_it(guarded: Path, runtime: dict[str, str]) -> None:
    error, code = as_user(guarded, REACH, **runtime)
    assert error[:2] == ["PermissionDeniedError", 77]
    assert code == 77
    assert error[2].startswith(f"you may not reach the weightd daemon at {guarded}: only user root and group daemon")
    assert f"enter {guarded.parent};" in error[2]
    assert "`usermod -aG daemon bin`" in error[2]
    assert "weightd serve" not in error[2]


@needs_root
def test_a_socket_for_a_group_is_77_and_names_it(guarded: Path) -> None:
    guarded.parent.chmod(0o755)
    error, _ = as_user(guarded, REACH)
    assert error[:2] == ["PermissionDeniedError", 77]
    assert f"only user root and group daemon may connect to {guarded}.handles;" in error[2]
    assert "`usermod -aG daemon bin`" in error[2]


@needs_root
def test_the_control_socket_alone_may_be_closed(start_daemon: StartDaemon) -> None:
    daemon = start_daemon(socket_mode="0666")
    daemon.folder.chmod(0o755)
    daemon.socket.chmod(0o600)
    kind, code, message = as_user(daemon.socket, "print(json.dumps(attempt(lambda: weightd.connect().stats())))")
    assert (kind, code) == ("PermissionDeniedError", 77)
    assert f"only user root may connect to {daemon.socket};" in message


@needs_root
def test_who_joined_the_group_after_the_login_is_told_so(guarded: Path) -> None:
    """bin's own group is bin; a process that runs without it has been started before it was let in."""
    os.chown(guarded.parent, 0, grp.getgrnam("bin").gr_gid)
    error, _ = as_user(guarded, REACH, gid=grp.getgrnam("nogroup").gr_gid)
    assert "bin is in group bin, but this process is not: log in again" in error[2]
    assert "usermod" not in error[2]


@needs_root
def test_what_only_its_owner_may_reach(guarded: Path) -> None:
    guarded.parent.chmod(0o700)
    error, code = as_user(guarded, REACH)
    assert (error[1], code) == (77, 77)
    assert f"only user root may enter {guarded.parent}; ask root to let a group in (`socket_mode`)" in error[2]
    assert "usermod" not in error[2]


@needs_root
def test_a_runtime_folder_of_somebody_else_hides_no_daemon_that_may_be_reached(start_daemon: StartDaemon) -> None:
    daemon = start_daemon(socket_mode="0666")
    daemon.folder.chmod(0o755)
    (daemon.folder / "theirs" / "weightd").mkdir(parents=True)
    (daemon.folder / "theirs").chmod(0o700)
    assert as_user(daemon.socket, REACH, runtime=str(daemon.folder / "theirs"))[0] is None


@needs_root
def test_nothing_is_loaded_privately_beside_a_daemon_that_may_not_be_reached(guarded: Path, folder: Path) -> None:
    path = checkpoints.write_random(folder / "m.safetensors", 1, 300)
    source = f"""
loads = [lambda said=said: weightd.torch.load_file({str(path)!r}, fallback=said) for said in ("error", "wait", "local")]
print(json.dumps([attempt(call) for call in (*loads, lambda: weightd.connect(fallback="wait"))]))"""
    for error in as_user(guarded, source):
        assert error[:2] == ["PermissionDeniedError", 77]


def test_what_is_loaded_privately_beside_a_full_daemon_is_said(
    start_daemon: StartDaemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon = start_daemon(max_connections=1)
    monkeypatch.setenv("WEIGHTD_SOCKET", str(daemon.socket))
    path = checkpoints.write_random(tmp_path / "m.safetensors", 1, 300)
    with Peer(daemon.socket), pytest.warns(RuntimeWarning, match=r"loaded privately.*max_connections"):
        assert list(weightd.torch.load_file(path, fallback="local")) == ["t0"]


# -- while it starts ---------------------------------------------------------------------------------------------------

WATCHED = """
import sys
from pathlib import Path
def watch(event, arguments):
    if event == "os.link" and str(arguments[1]).endswith(".handles"):
        mode = Path(arguments[0]).stat().st_mode & 0o777
        control = Path(str(arguments[1]).removesuffix(".handles"))
        sys.stderr.write(f"control socket first: {control.exists()}, mode {mode:o}\\n")
    if event == "os.chmod" and str(arguments[0]).endswith(".handles"):
        sys.stderr.write("the mode of the handle socket comes later\\n")
sys.addaudithook(watch)
from weightd_daemon.__main__ import main
sys.exit(main())
"""


def test_the_handle_socket_comes_last_and_as_it_is_to_be(start_daemon: StartDaemon) -> None:
    """Who waits connects as soon as it is there, must be able to call then, and takes "you may not" for an answer."""
    daemon = start_daemon(argv=[sys.executable, "-c", WATCHED], socket_mode="0660")
    assert daemon.logged().count("control socket first: True, mode 660\n") == 1
    assert "comes later" not in daemon.logged()
    assert daemon.socket.with_name("w.sock.handles").stat().st_mode & 0o777 == 0o660
