"""The daemon's sockets: who has their path, the folder that they lie in, and how they are made."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import stat
import time
from pathlib import Path
from typing import TYPE_CHECKING

from weightd._transport.address import check_folder, handles_path, is_own
from weightd.errors import PermissionDeniedError
from weightd_daemon.config.toml_file import TemporaryError

if TYPE_CHECKING:
    from collections.abc import Iterator

_CHILD_END_SECONDS = 5.0


class AlreadyServedError(Exception):
    """The daemon cannot have its socket: another one has it, or it cannot be made."""


@contextlib.contextmanager
def locked(path: Path) -> Iterator[int]:
    """Hold the lock of a socket path; loaders and holders inherit it. Errors: AlreadyServedError, TemporaryError."""
    with contextlib.ExitStack() as stack:
        try:
            if is_own(path):
                stack.callback(os.close, _own_folder(path))
            else:
                path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = os.open(path.with_name(f"{path.name}.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except PermissionDeniedError as error:
            raise AlreadyServedError(f"socket {path}: {error}") from error
        except OSError as error:
            raise TemporaryError.of(error, f"socket {path}") or AlreadyServedError(
                f"socket {path}: cannot be made: {error.strerror}; choose another with --socket"
            ) from error
        stack.callback(os.close, lock)
        _take(lock, path)
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"{os.getpid()} {_namespace()}".encode(), 0)
        for stale in (path, handles_path(path)):
            _remove(stale)
        yield lock
        for stale in (path, handles_path(path)):
            _remove(stale)


def listen(path: Path, mode: int) -> socket.socket:
    """A listening, non-blocking SOCK_SEQPACKET socket with that mode. Errors: OSError."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
    try:
        with umask(
            0o777 & ~mode
        ):  # no chmod: who waits for a daemon takes "you may not", if for a moment, for an answer
            listener.bind(str(path))
        listener.listen(128)
    except BaseException:
        listener.close()
        raise
    return listener


@contextlib.contextmanager
def umask(mask: int) -> Iterator[None]:
    """Make files with fewer rights meanwhile."""
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def _own_folder(path: Path) -> int:
    """Make the user's folder in /tmp, and lock it. Returns the descriptor that holds the lock.

    Cleaners leave a folder alone that is locked so (systemd-tmpfiles asks for an exclusive lock, and does not wait).
    Errors: PermissionDeniedError (it is not ours alone), OSError.
    """
    with contextlib.suppress(FileExistsError):
        path.parent.mkdir(mode=0o700)
    check_folder(path)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(folder, fcntl.LOCK_SH)
    except BaseException:
        os.close(folder)
        raise
    return folder


def _namespace() -> str:
    """Our PID namespace; a process id means something only within one."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _take(lock: int, path: Path) -> None:
    """Lock, waiting a little for the children of a daemon that has died: they hold its lock until they are gone."""
    deadline = time.monotonic() + _CHILD_END_SECONDS
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder, _, namespace = os.pread(lock, 100, 0).decode(errors="replace").strip().partition(" ")
            known = holder.isdigit() and namespace in ("", _namespace())
            gone = known and not Path(f"/proc/{holder}").exists()
            if (gone or not known) and time.monotonic() < deadline:
                time.sleep(0.02)
                continue
            if gone:
                raise AlreadyServedError(
                    f"socket {path}: a process of the daemon that died (pid {holder}) does not end, "
                    "it may hang in a read or in the driver; end it, or choose another socket with --socket"
                ) from None
            raise AlreadyServedError(
                f"socket {path}: another daemon (pid {holder if known else 'unknown'}) serves it; "
                "stop it, or choose another with --socket"
            ) from None
        return


def _remove(path: Path) -> None:
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise AlreadyServedError(
                f"{path} is there and is not a socket; move it away, or choose another with --socket"
            )
        path.unlink()
    except FileNotFoundError:
        pass
