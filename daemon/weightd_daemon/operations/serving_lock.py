"""The locks of a socket path: which daemon serves it, and which processes may still write to memory shared there.

"Serves" is a lock of the daemon's process alone: no child inherits it, and it is the only one that refuses a start.
"May still write" and "holds memory" belong to open files that loaders and holders inherit (decision 0028). So a loader
that cannot die keeps no daemon from starting; what it may still write to stays aside until it has ended.

All of them lie in one file, at a byte each. A second file is locked as daemons before this one lock it and let their
loaders inherit the lock: so neither starts beside the other.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import struct
import time
from pathlib import Path
from typing import Final

from .lock_holders import end, holders, holds, kernel_name, may_be_seen, uses_gpu

log = logging.getLogger(__name__)

_WRITERS_SECONDS = 1.0
"""How long the start waits for loaders of a daemon that died: they are killed, and end at once unless they hang."""
_HOLDERS_SECONDS = 5.0
"""How long the start waits for holders of its memory, and for locks of which nobody can tell whose they are."""
_PAUSE_SECONDS = 0.02
_KILL_SECONDS = 0.2
_SCAN_SECONDS = 0.3
"""Between two looks for whom to kill, and the longest that one takes: there may be very many processes."""

_FLOCK: Final = struct.Struct("hhqqi4x")
_SERVES, _WRITES, _HOLDS = 0, 1, 2
"""The bytes of the lock file."""


class AlreadyRunningError(Exception):
    """The daemon cannot have its socket, or no longer has it: another daemon serves it, or it cannot be made."""


class DaemonInstanceLock:
    """Locks that admit one running daemon per socket path, until `close`. `writers` and `holders` are to be inherited.

    The lock of a process ends when it closes any descriptor of the file: nothing else here may open it.
    """

    def __init__(self, socket: Path) -> None:
        self._socket = socket
        self._file = socket.with_name(f"{socket.name}.serving")
        self._older_file = socket.with_name(f"{socket.name}.lock")
        self.writers = self.holders = self._older = -1
        self._has_older = False
        self._unseen = False
        """Whether a process that may still write has its lock on a file that was removed: its end cannot be seen."""

    def acquire(self) -> None:
        """Take the locks; end what a daemon that died has left, and wait for it. Errors: AlreadyRunningError, OSError.

        A process that does not end in time is no error, unless it holds memory: see `is_written_by_others`.
        """
        try:
            self.writers = self._open()
            self._older = os.open(self._older_file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            self.holders = os.open(self._file, os.O_RDWR | os.O_CLOEXEC)
            _lock(self.writers, _WRITES)
            _lock(self.holders, _HOLDS)
            self._end_those_before()
            self._sign()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Give the locks up; children that inherited some keep them."""
        for descriptor in (self.holders, self._older, self.writers):
            if descriptor >= 0:
                os.close(descriptor)
        self.writers = self.holders = self._older = -1

    def is_written_by_others(self) -> bool:
        """Whether a process of a daemon before may still write to memory. Once it is False, it stays that."""
        return self._unseen or _is_held(self.writers, _WRITES) or not self._acquire_older()

    def end_others(self) -> None:
        """Kill the processes of a daemon before that may still write, however long it takes to find them."""
        files = self._files()
        for pid in holders(files):
            end(pid, files)

    def is_whole(self) -> bool:
        """Whether both files still are those that are locked."""
        return _is_at(self._file, self.writers) and _is_at(self._older_file, self._older)

    def renew(self) -> None:
        """Lock new files in the place of those that were removed. Errors: AlreadyRunningError (another has), OSError.

        The descriptors stay the same numbers. Children that live have the old file, which no daemon will look at. If a
        process of a daemon before may still write, `is_written_by_others` stays True.
        """
        self._unseen = self.is_written_by_others()
        if not _is_at(self._file, self.writers):
            fresh = os.open(self._file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                held = os.open(self._file, os.O_RDWR | os.O_CLOEXEC)
            except OSError:
                os.close(fresh)
                raise
            _replace(self.writers, fresh)
            _replace(self.holders, held)
            self._serve(self.writers)
            _lock(self.writers, _WRITES)
            _lock(self.holders, _HOLDS)
        if not _is_at(self._older_file, self._older):
            _replace(self._older, os.open(self._older_file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
            self._has_older = False
            if not self._acquire_older():
                raise AlreadyRunningError(f"socket {self._socket}: another process has locked {self._older_file}")
            self._sign()
        if not self.is_whole():
            raise AlreadyRunningError(f"socket {self._socket}: its lock is removed again and again")

    def touch(self) -> None:
        """Keep the files young: what cleans folders up goes by their age."""
        for descriptor in (self.writers, self._older):
            with contextlib.suppress(OSError):  # on a file system that has become read-only nobody cleans up either
                os.utime(descriptor)

    def _open(self) -> int:
        """The lock file, with the lock that says who serves. Errors: AlreadyRunningError, OSError."""
        while True:
            descriptor = os.open(self._file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                self._serve(descriptor)
                if _is_at(self._file, descriptor):
                    return descriptor
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)  # it was removed between the two calls

    def _serve(self, descriptor: int) -> None:
        while True:
            try:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, _SERVES)
            except (BlockingIOError, PermissionError):  # EAGAIN or EACCES, says POSIX
                wanted = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, _SERVES, 1, 0)
                kind, _, _, _, pid = _FLOCK.unpack(fcntl.fcntl(descriptor, fcntl.F_GETLK, wanted))
                if kind != fcntl.F_UNLCK:
                    raise self._served(pid if pid > 0 else None) from None
            else:
                return

    def _served(self, pid: int | None) -> AlreadyRunningError:
        return AlreadyRunningError(
            f"socket {self._socket}: another daemon (pid {pid or 'unknown'}) serves it; "
            "stop it, or choose another with --socket"
        )

    def _acquire_older(self) -> bool:
        """Have the lock that daemons before this one ask for, unless a process of one of them still has it."""
        if not self._has_older:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(self._older, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._has_older = True
        return self._has_older

    def _sign(self) -> None:
        """Say in the older file who serves: a daemon before this one reads it when it is refused."""
        os.ftruncate(self._older, 0)
        os.pwrite(self._older, f"{os.getpid()} {_namespace()}".encode(), 0)

    # -- those that a daemon before has left -------------------------------------------------------------------------

    def _end_those_before(self) -> None:
        """Wait until no process of a daemon before has a lock, and kill it meanwhile. Errors: AlreadyRunningError."""
        begun = time.monotonic()
        look_at, left = begun + 2 * _PAUSE_SECONDS, []
        while (holds_memory := _is_held(self.holders, _HOLDS)) or self.is_written_by_others():
            waited = time.monotonic() - begun
            daemon = None if self._acquire_older() else self._older_daemon()
            if daemon == 0:
                if waited > _HOLDERS_SECONDS:
                    raise self._served(None)
            elif daemon is not None:
                raise self._served(daemon)
            elif time.monotonic() > look_at:  # most have ended by then: the kernel kills children of a dead daemon
                files = self._files()
                left = holders(files, _SCAN_SECONDS)
                for pid in left:
                    end(pid, files)
                look_at = time.monotonic() + _KILL_SECONDS
                holds_memory = holds_memory or any(not self._has_older and uses_gpu(pid) for pid in left)
                if waited > _HOLDERS_SECONDS and holds_memory:
                    raise AlreadyRunningError(
                        f"socket {self._socket}: a process of the daemon that died{_named(left)} holds GPU memory and "
                        "does not end, it may hang in the driver; end it, or choose another with --socket"
                    )
                if waited > _WRITERS_SECONDS and not holds_memory:
                    log.warning("a loader of the daemon before%s does not end: memory that no checkpoint has is not "
                                "used until it has ended", _named(left))  # fmt: skip
                    return
            time.sleep(_PAUSE_SECONDS)

    def _older_daemon(self) -> int | None:
        """The daemon of an older version that has its lock; 0 if nobody can tell, None if only its children do."""
        said, _, namespace = os.pread(self._older, 100, 0).decode(errors="replace").strip().partition(" ")
        if not said.isdigit() or namespace not in ("", _namespace()):
            return 0
        pid = int(said)
        return pid if holds(pid, self._files()) or not may_be_seen(pid) else None

    def _files(self) -> dict[str, str]:
        """The two files, for `holders`. Without a kernel that names them none: then nobody is killed."""
        found = {kernel_name(self.writers): self._file.name}
        # Any lock of ours will do to learn how the kernel names the file.
        _lock(self._older, _SERVES)
        found[kernel_name(self._older)] = self._older_file.name
        return {name: file for name, file in found.items() if name is not None}


def _lock(descriptor: int, byte: int) -> None:
    """Put a shared lock of the open file on a byte."""
    fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, byte, 1, 0))


def _is_held(descriptor: int, byte: int) -> bool:
    """Whether another open file than this one has a lock on a byte."""
    wanted = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
    return bool(_FLOCK.unpack(fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, wanted))[0] != fcntl.F_UNLCK)


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether a path leads to the file of a descriptor."""
    try:
        return os.path.samestat(path.lstat(), os.fstat(descriptor))
    except OSError:
        return False


def _replace(descriptor: int, other: int) -> None:
    """Let a descriptor be another file, and close the other's own number."""
    os.dup2(other, descriptor, inheritable=False)
    os.close(other)


def _named(pids: list[int]) -> str:
    return f" (pid {', '.join(map(str, pids))})" if pids else ""


def _namespace() -> str:
    """Our PID namespace; a process id means something only within one."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""
