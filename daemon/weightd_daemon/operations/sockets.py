"""The daemon's sockets: their folder, their creation, and the check that they still belong to this daemon."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import logging
import os
import re
import socket
import stat
import time
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from weightd._transport.address import check_folder, handles_path, is_own
from weightd.errors import PermissionDeniedError
from weightd_daemon.config.toml_file import TemporaryConfigError

from .serving_lock import AlreadyRunningError, DaemonInstanceLock

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

log = logging.getLogger(__name__)

LOOK_SECONDS = 5.0
"""Between two looks whether the sockets still are there."""

_MOST_FAILURES = 12
"""So many looks in a row that could not mend what was removed; then the daemon ends."""
_PROBES = 10
_PROBE_PAUSE_SECONDS = 0.1

_Identity = tuple[int, int]


class _Control(Protocol):
    """What serves calls: binds to a path, which must be free, and then serves there, too. Errors: OSError."""

    def bind(self, path: Path) -> None: ...
    async def serve(self) -> None: ...


class DaemonSockets:
    """Creates and watches the daemon's control socket, its handle socket, and the locks that go with them."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.lock = DaemonInstanceLock(path)
        self._folder = -1
        self._mode = 0o600
        self._control: _Control
        self._serve_handles: Callable[[socket.socket], None]
        self._mine: dict[Path, _Identity] = {}
        self._watching: asyncio.Task[None] | None = None

    async def open(self, mode: int, control: _Control, serve_handles: Callable[[socket.socket], None]) -> None:
        """Make both sockets, of a mode, and serve at them. Errors: OSError."""
        self._mode, self._control, self._serve_handles = mode, control, serve_handles
        await self._open_control()
        await self._open_handles()  # after it: a client connects to this one first, and may call as soon as it has

    def change_mode(self, mode: int) -> None:
        """Give both sockets another mode."""
        self._mode = mode
        for path in self._mine:
            path.chmod(mode)

    def watch(self, on_lost: Callable[[Exception], None]) -> None:
        """Look every few seconds whether the sockets are there, and make those anew that were removed.

        `on_lost` hears AlreadyRunningError if another process has their place, and TemporaryConfigError if they cannot
        be made for a minute; then nobody looks any more.
        """
        self._watching = asyncio.get_running_loop().create_task(self._watch(on_lost))

    async def stop_watching(self) -> None:
        """Stop looking."""
        if self._watching is not None:
            self._watching.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watching

    async def look(self) -> None:
        """Look once, and mend what was removed. Errors: AlreadyRunningError, OSError."""
        if not self.lock.is_whole():
            self._make_folder()
            self.lock.renew()
            log.warning("the lock of socket %s was removed; it is locked anew", self._path)
        self.lock.touch()
        missing = [path for path, mine in self._mine.items() if not _is_there(path, mine)]
        for path in missing:
            await (self._open_control() if path == self._path else self._open_handles())
            log.warning("socket %s was removed; it is made anew", path)

    async def _watch(self, on_lost: Callable[[Exception], None]) -> None:
        failures = 0
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            try:
                await self.look()
                failures = 0
            except AlreadyRunningError as error:
                return on_lost(error)
            except OSError as error:  # want of descriptors, for example: that is no reason to end at once
                failures += 1
                if failures == _MOST_FAILURES:
                    return on_lost(cannot_be_made(self._path, error))
                log.warning("socket %s or its lock was removed and cannot be made: %s; trying again", self._path, error)

    async def _open_control(self) -> None:
        # gRPC removes what lies at the path that it bound to, when it begins and again when it ends, whosever that is.
        # So it gets a path of its own, which is no longer than that of the handle socket; and nobody can connect before
        # the mode is right. The umask is that of all threads: what these make meanwhile must stay usable by this user.
        made = self._path.with_name(f"{self._path.name}.{os.getpid()}")
        with umask(0o077):
            self._control.bind(made)
        try:
            await self._control.serve()
            made.chmod(self._mode)
            mine = identity(made)
            made.rename(self._path)
        except BaseException:
            made.unlink(missing_ok=True)
            raise
        self._mine[self._path] = mine

    async def _open_handles(self) -> None:
        path = handles_path(self._path)
        self._serve_handles(listen(path, self._mode))
        self._mine[path] = identity(path)

    def _claim(self) -> None:
        """Have the folder, the locks and a free place. Errors: AlreadyRunningError, TemporaryConfigError."""
        try:
            self._make_folder()
            self.lock.acquire()
            for path in (self._path, handles_path(self._path)):
                _remove_stale(path)
            _remove_unfinished(self._path)
        except PermissionDeniedError as error:
            raise AlreadyRunningError(f"socket {self._path}: {error}") from error
        except OSError as error:
            raise TemporaryConfigError.of(error, f"socket {self._path}") or AlreadyRunningError(
                f"socket {self._path}: cannot be made: {error.strerror}; choose another with --socket"
            ) from error

    def _give_up(self) -> None:
        """Remove the sockets that still are this daemon's, and give the locks up."""
        for path, mine in self._mine.items():
            remove_own(path, mine)
        self.lock.close()
        if self._folder >= 0:
            os.close(self._folder)

    def _make_folder(self) -> None:
        """Make the folder if it is missing, and lock the user's own in /tmp. Errors: PermissionDeniedError, OSError."""
        if not is_own(self._path):
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            return
        folder = _own_folder(self._path)
        if self._folder >= 0:
            os.close(self._folder)
        self._folder = folder


@contextlib.contextmanager
def locked(path: Path) -> Iterator[DaemonSockets]:
    """Have a socket path until the end, when its sockets are removed.

    Errors: AlreadyRunningError, TemporaryConfigError.
    """
    sockets = DaemonSockets(path)
    try:
        sockets._claim()
        yield sockets
    finally:
        sockets._give_up()


def cannot_be_made(path: Path, error: OSError) -> TemporaryConfigError:
    """The error for a socket that cannot be made now."""
    what = f"socket {path}"
    return TemporaryConfigError.of(error, what) or TemporaryConfigError(f"{what}: {error.strerror}")


def listen(path: Path, mode: int) -> socket.socket:
    """A listening, non-blocking SOCK_SEQPACKET socket with that mode, at a path that is free. Errors: OSError."""
    # It gets its place when its mode is right: who waits for a daemon takes "you may not", if for a moment, for an
    # answer. Until then its name is no longer than that of a handle socket, and none that gRPC may remove.
    made = path.with_name(f"{path.stem}~{os.getpid()}")
    made.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
    try:
        os.fchmod(listener.fileno(), mode)  # what it is bound with, less the umask
        listener.bind(str(made))
        made.chmod(mode)
        listener.listen(128)
        path.hardlink_to(made)  # a rename would replace what has come to lie there
    except BaseException:
        listener.close()
        raise
    finally:
        made.unlink(missing_ok=True)
    return listener


@contextlib.contextmanager
def umask(mask: int) -> Iterator[None]:
    """Make files with fewer rights meanwhile."""
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def identity(path: Path) -> _Identity:
    """What tells the file at a path from others that may come to lie there. Errors: OSError."""
    status = path.lstat()
    return status.st_dev, status.st_ino


def remove_own(path: Path, mine: _Identity) -> None:
    """Remove a socket unless another lies there by now."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        if identity(path) == mine:
            path.unlink()


def _is_there(path: Path, mine: _Identity) -> bool:
    """Whether a socket of ours is where it was made. Errors: AlreadyRunningError (another is), OSError."""
    try:
        if identity(path) == mine:
            return True
    except (FileNotFoundError, NotADirectoryError):
        return False
    raise AlreadyRunningError(f"socket {path}: another process has put its own in its place; this daemon ends")


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


def _remove_stale(path: Path) -> None:
    """Remove the socket that a daemon which died has left. Errors: AlreadyRunningError (not that), OSError."""
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise AlreadyRunningError(
                f"{path} is there and is not a socket; move it away, or choose another with --socket"
            )
    except FileNotFoundError:
        return
    for _ in range(_PROBES):  # a process that is ending may give its lock up before its sockets
        if not _is_listened(path):
            break
        time.sleep(_PROBE_PAUSE_SECONDS)
    else:
        raise AlreadyRunningError(
            f"socket {path}: a process listens there that does not have its lock: was the lock file removed? "
            "Stop that process, or choose another with --socket"
        )
    path.unlink(missing_ok=True)


def _remove_unfinished(path: Path) -> None:
    """Remove sockets that daemons of this path had bound, and had not put in their place, when they were killed.

    The caller has the lock. What lies there is only taken for such a socket if it belongs to this user, its process is
    gone, and nobody listens. Nothing depends on it: what cannot be removed stays.
    """
    named = re.compile(re.escape(path.name) + r"[.~]([1-9][0-9]*)")
    with contextlib.suppress(OSError):
        for found in list(path.parent.iterdir()):
            match = named.fullmatch(found.name)
            if match is None or (Path("/proc") / match[1]).exists():
                continue
            with contextlib.suppress(OSError):
                status = found.lstat()
                if stat.S_ISSOCK(status.st_mode) and status.st_uid == os.geteuid() and not _is_listened(found):
                    found.unlink()
                    log.info("socket %s was left by a process that was killed; it is removed", found)


def _is_listened(path: Path) -> bool:
    """Whether somebody listens at a socket; also one that this process may not connect to counts."""
    for kind in (socket.SOCK_STREAM, socket.SOCK_SEQPACKET):
        with socket.socket(socket.AF_UNIX, kind | socket.SOCK_NONBLOCK) as probe:
            code = probe.connect_ex(str(path))
        if code != errno.EPROTOTYPE:
            return code not in (errno.ECONNREFUSED, errno.ENOENT)
    return True
