"""Where the daemon listens."""

from __future__ import annotations

import os
from pathlib import Path

SYSTEM_SOCKET = Path("/run/weightd/weightd.sock")


def candidates(explicit: str | os.PathLike[str] | None = None) -> list[Path]:
    """Socket paths in the order in which they count: given, WEIGHTD_SOCKET, the user's, the system's.

    A path that is given, or stands in WEIGHTD_SOCKET, is the only one.
    """
    chosen = explicit or os.environ.get("WEIGHTD_SOCKET")
    if chosen:
        return [Path(chosen)]
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    return [*([Path(runtime) / "weightd" / "weightd.sock"] if runtime else []), SYSTEM_SOCKET]


def find_socket(explicit: str | os.PathLike[str] | None = None) -> Path:
    """The first of the candidates that exists, else the first that this user may not look for, else the first."""
    paths = candidates(explicit)
    found = [_is_there(path) for path in paths]
    return paths[found.index(True) if True in found else found.index(None) if None in found else 0]


def _is_there(path: Path) -> bool | None:
    """None where a folder on the way keeps this user out: there may well be a daemon, and it says so when asked."""
    try:
        path.stat()
    except PermissionError:
        return None
    except (OSError, ValueError):
        return False
    return True


def handles_path(socket: Path) -> Path:
    """The handle socket lies beside the control socket."""
    return socket.with_name(f"{socket.name}.handles")
