"""The address of the daemon: the rule by which the daemon listens and clients look for it."""

from __future__ import annotations

import os
import socket as sockets
import stat
import struct
from pathlib import Path
from urllib.parse import quote

from weightd.errors import InvalidReferenceError, PermissionDeniedError

SYSTEM_SOCKET = Path("/run/weightd/weightd.sock")
RUNTIME_FOLDERS = Path("/run/user")
TEMPORARY = Path("/tmp")  # noqa: S108  # others may write there: check_folder looks at what is ours
_CREDENTIALS = struct.Struct("iII")


def serving_socket() -> Path:
    """Where a daemon listens that is not told: below XDG_RUNTIME_DIR, at the system's place, or at the user's own."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime:
        return _below(Path(runtime))
    return SYSTEM_SOCKET if _may_fill(SYSTEM_SOCKET.parent) else _own()[0]


def candidates(explicit: str | os.PathLike[str] | None = None) -> list[Path]:
    """Socket paths in the order in which clients look: given, WEIGHTD_SOCKET, the user's, the system's, the user's own.

    A path that is given, or stands in WEIGHTD_SOCKET, is the only one.
    """
    chosen = explicit or os.environ.get("WEIGHTD_SOCKET")
    if chosen:
        return [Path(chosen)]
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    return [_below(Path(runtime)), SYSTEM_SOCKET] if runtime else [SYSTEM_SOCKET, *_own()]


def find_socket(explicit: str | os.PathLike[str] | None = None) -> Path:
    """The first of the candidates that exists, else one that is hidden from us, else where a daemon would listen.

    Errors: PermissionDeniedError (somebody else has the user's own folder), InvalidReferenceError (see check_path).
    """
    paths, hidden = candidates(explicit), None
    for path in paths:
        check_path(path)
        check_folder(path)
        try:
            path.stat()
        except PermissionError:
            hidden = hidden or path
        except OSError:
            continue
        else:
            return path
    return hidden or (paths[0] if len(paths) == 1 else serving_socket())


def handles_path(socket: Path) -> Path:
    """The handle socket lies beside the control socket."""
    return socket.with_name(f"{socket.name}.handles")


def grpc_target(socket: Path) -> str:
    """What gRPC calls a socket. It reads a URI: "%" begins a code there, and "?" and "#" end the path."""
    path = os.fsencode(socket)
    return f"unix:{quote(b'/' + path.lstrip(b'/') if path.startswith(b'/') else path)}"


def check_path(socket: Path) -> None:
    """Refuse a path that names no file, or that gRPC cannot be told. Errors: InvalidReferenceError."""
    if not socket.name:
        raise InvalidReferenceError(f"socket {socket}: names no file; give the path of a socket")
    if "," in str(socket):
        raise InvalidReferenceError(
            f"socket {socket}: has a comma, which ends an address for gRPC; choose another path"
        )


def is_own(socket: Path) -> bool:
    """Whether a socket lies in this user's folder in /tmp, where others may have been before."""
    return socket.parent == _own_folder()


def check_folder(socket: Path) -> None:
    """Refuse the user's folder in /tmp if it is somebody else's, or others may enter it; it may be missing.

    Errors: PermissionDeniedError.
    """
    folder = socket.parent
    if not is_own(socket):
        return
    try:
        problem = _problem(folder.lstat()) or _problem_above(folder.parent.stat())
    except FileNotFoundError:
        return
    except OSError as error:
        problem = f"cannot be looked at: {error.strerror}"
    if problem:
        raise PermissionDeniedError(
            f"{folder}: {problem}, so a socket in it may be anybody's; have it removed, or set WEIGHTD_SOCKET"
        )


def check_peer(connection: sockets.socket, socket: Path) -> None:
    """Refuse a daemon at the user's own address that is another user's. Errors: PermissionDeniedError."""
    if not is_own(socket):
        return
    _, uid = listener_of(connection)
    if uid != os.geteuid():
        raise PermissionDeniedError(f"socket {socket}: who listens there is uid {uid}, and not you; it is not used")


def listener_of(connection: sockets.socket) -> tuple[int, int]:
    """The process id and the uid of whoever listens at the other end; the id is 0 if it is of another PID namespace."""
    credentials = connection.getsockopt(sockets.SOL_SOCKET, sockets.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, _ = _CREDENTIALS.unpack(credentials)
    return pid, uid


def _own() -> list[Path]:
    """Sockets that are this user's without XDG_RUNTIME_DIR; a daemon takes the first."""
    folder = RUNTIME_FOLDERS / str(os.geteuid())
    try:
        runtime = [] if _problem(folder.lstat()) else [_below(folder)]
    except OSError:
        runtime = []
    return [*runtime, _own_folder() / SYSTEM_SOCKET.name]


def _own_folder() -> Path:
    return TEMPORARY / f"weightd-{os.geteuid()}"


def _below(runtime: Path) -> Path:
    return runtime / "weightd" / SYSTEM_SOCKET.name


def _problem(folder: os.stat_result) -> str:
    """Why a folder is not this user's alone, as lstat sees it; empty where it is."""
    if not stat.S_ISDIR(folder.st_mode):
        return "is a symlink" if stat.S_ISLNK(folder.st_mode) else "is no folder"
    if folder.st_uid != os.geteuid():
        return f"belongs to uid {folder.st_uid}"
    mode = stat.S_IMODE(folder.st_mode)
    return f"lets others in (mode {mode:04o})" if mode & 0o077 else ""


def _problem_above(folder: os.stat_result) -> str:
    """Why others could exchange what lies in a folder."""
    writable = folder.st_mode & 0o022 and not folder.st_mode & stat.S_ISVTX
    return "lies where others may rename it" if writable or folder.st_uid not in (0, os.geteuid()) else ""


def _may_fill(folder: Path) -> bool:
    """Whether this process may make files in a folder, or the folder."""
    return os.access(folder if folder.exists() else folder.parent, os.W_OK | os.X_OK)
