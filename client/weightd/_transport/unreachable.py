"""Find out why a daemon cannot be reached, from the kernel's error and the files at the path, and make an error of it.

Three causes want three remedies: no daemon is there (start one), one is there and busy (try again), or this user may
not reach it (get permission). Only the first two may be got round, by waiting (`when_reachable`) or loading privately.
"""

from __future__ import annotations

import errno
import grp
import os
import pwd
import socket
import stat
import time
from typing import TYPE_CHECKING, TypeVar

from weightd._limits import limit_error
from weightd.errors import DaemonBusyError, DaemonUnreachableError, PermissionDeniedError, WeightdError

from .address import handles_path

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

T = TypeVar("T")
_SOCKET_PATH_BYTES = 107
_PROBE_SECONDS = 1.0
_RETRY_SECONDS = 0.2
_OTHER = "its mode lets you in, so something else forbids it, such as SELinux or AppArmor"


def when_reachable(call: Callable[[], T], *, wait: bool) -> T:
    """What `call` returns; with `wait` as soon as a daemon answers. Threads that do not wait are not held up."""
    while True:
        try:
            return call()
        except DaemonUnreachableError:
            if not wait:
                raise
            time.sleep(_RETRY_SECONDS)


def unreachable(control: Path, error: OSError, timeout: float) -> WeightdError:
    """The error for an attempt to reach the daemon at `control` that ended in `error` within `timeout` seconds.

    Returns DaemonUnreachableError, DaemonBusyError, PermissionDeniedError or ResourceLimitError.
    """
    if isinstance(error, PermissionError):
        return PermissionDeniedError(f"you may not reach the weightd daemon at {control}: {barrier(control) or _OTHER}")
    if isinstance(error, TimeoutError | BlockingIOError):
        return DaemonBusyError(
            f"the weightd daemon at {control} does not answer within {timeout:g} s; try again, or see its log"
        )
    if limit := limit_error(error, f"connecting to {control}"):
        return limit
    if isinstance(error, ConnectionResetError | BrokenPipeError) or error.errno in (errno.EBADF, errno.ENOTCONN):
        return DaemonUnreachableError(
            f"the weightd daemon at {control} closed the connection; see its log, or start it anew with `weightd serve`"
        )
    return DaemonUnreachableError(
        f"no weightd daemon at {control}: {_absence(control, error)}; "
        "start one with `weightd serve`, or set WEIGHTD_SOCKET"
    )


def probe(control: Path, timeout: float) -> WeightdError | None:
    """Why nobody can connect to the control socket, in the words of `unreachable`; None where one can."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as attempt:
            attempt.settimeout(_PROBE_SECONDS)
            attempt.connect(str(control))
    except OSError as error:
        return unreachable(control, error, timeout)
    return None


def _absence(control: Path, error: OSError) -> str:
    """What is there instead of a daemon."""
    handles = handles_path(control)
    length = len(os.fsencode(handles))
    if length > _SOCKET_PATH_BYTES:
        return f"its path has {length} bytes with `.handles`, and a socket's has at most {_SOCKET_PATH_BYTES}"
    there = _kind(control)
    if there not in ("", "socket"):
        return f"it is a {there}, not a socket"
    if isinstance(error, FileNotFoundError):
        return f"its handle socket {handles.name} is missing beside it" if there else "there is no such socket"
    if isinstance(error, ConnectionRefusedError):
        return "nobody listens there"
    if error.errno == errno.EPROTOTYPE:
        return f"{handles.name} is a socket of another program"
    return error.strerror or str(error)


def _kind(path: Path) -> str:
    try:
        mode = path.stat().st_mode
    except OSError:
        return ""
    return {stat.S_IFSOCK: "socket", stat.S_IFDIR: "folder", stat.S_IFREG: "file"}.get(stat.S_IFMT(mode), "device")


def barrier(control: Path) -> str:
    """The first thing on the way that keeps this user out: who may pass, and what this one can do about it.

    Empty if no mode on the way does.
    """
    steps = [(folder, "enter", os.X_OK) for folder in reversed(control.absolute().parents)]
    steps += [(path, "connect to", os.W_OK) for path in (handles_path(control), control)]
    for path, verb, needed in steps:
        if not os.access(path, needed, effective_ids=True):
            try:
                status = path.stat()
            except FileNotFoundError:  # no permission is missing here
                continue
            except OSError:
                return f"you may not {verb} {path}; ask whoever runs it"
            return _who_may(status, needed, f"{verb} {path}")
    return ""


def _who_may(status: os.stat_result, needed: int, act: str) -> str:
    me, owner, group = user_name(os.geteuid()), user_name(status.st_uid), group_name(status.st_gid)
    if status.st_uid == os.geteuid():
        return f"its mode keeps even you, its owner, from it: to {act}, `chmod u+rwx`"
    if not status.st_mode & needed << 3:
        return f"only user {owner} may {act}; ask {owner} to let a group in (`socket_mode`), or set WEIGHTD_SOCKET"
    allowed = f"only user {owner} and group {group} may {act}"
    if me in _members(status.st_gid):
        return f"{allowed}; {me} is in group {group}, but this process is not: log in again"
    return f"{allowed}; to join it, root types `usermod -aG {group} {me}`, and you log in again"


def user_name(number: int) -> str:
    """The name of a user, or the number where it has none."""
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return str(number)


def group_name(number: int) -> str:
    """The name of a group, or the number where it has none."""
    try:
        return grp.getgrgid(number).gr_name
    except KeyError:
        return str(number)


def _members(group: int) -> set[str]:
    """Names of who is in a group by its entry, or because it is the group of one's login: of this user's, that is."""
    try:
        listed = set(grp.getgrgid(group).gr_mem)
    except KeyError:
        listed = set()
    try:
        login = pwd.getpwuid(os.geteuid())
    except KeyError:
        return listed
    return listed | {login.pw_name} if login.pw_gid == group else listed
