"""The pages for monitors: /metrics, /healthz and /readyz, on a loopback port or a Unix socket."""

from __future__ import annotations

import errno
import os
import socket
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING

from .http import MonitoringPage, MonitoringServer
from .metrics import CONTENT_TYPE

if TYPE_CHECKING:
    from collections.abc import Callable

    from .metrics import Metrics
    from .statistics import Statistics


def pages(metrics: Metrics, statistics: Statistics, is_up: Callable[[], bool]) -> MonitoringServer:
    """The three pages. `is_up` says whether the daemon has started and does not stop."""

    def ready() -> MonitoringPage:
        if not is_up():
            return MonitoringPage(HTTPStatus.SERVICE_UNAVAILABLE, b"starting or stopping\n")
        if statistics.drain.state != "serving":
            held = statistics.store.leases.held()
            return MonitoringPage(
                HTTPStatus.SERVICE_UNAVAILABLE, f"{statistics.drain.state}, leases held: {held}\n".encode()
            )
        return MonitoringPage(HTTPStatus.OK, b"ready\n")

    async def counted() -> MonitoringPage:
        await statistics.refresh()
        if metrics.is_cut_off:
            return MonitoringPage(HTTPStatus.INTERNAL_SERVER_ERROR, b"counting has failed; the daemon's log says why\n")
        return MonitoringPage(HTTPStatus.OK, metrics.page(), CONTENT_TYPE)

    return MonitoringServer(
        {
            "/metrics": counted,
            "/healthz": lambda: MonitoringPage(HTTPStatus.OK, b"ok\n"),
            "/readyz": ready,
        }
    )


def listen(address: tuple[str, int] | Path, mode: int) -> socket.socket:
    """A listening socket, a Unix socket with this mode. Errors: OSError (EADDRINUSE: somebody serves it)."""
    if not isinstance(address, Path):
        return socket.create_server(address, family=socket.AF_INET6 if ":" in address[0] else socket.AF_INET)
    _remove_stale(address)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        os.fchmod(listener.fileno(), mode)  # what it is bound with, less the umask: never more than is wanted
        listener.bind(str(address))
        address.chmod(mode)
        listener.listen()
    except BaseException:
        listener.close()
        raise
    return listener


def _remove_stale(path: Path) -> None:
    """Make place, unless somebody listens there, or it is no socket: both are errors of `connect` or `bind`."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except FileNotFoundError:
            return
        except ConnectionRefusedError:
            if path.is_socket():
                path.unlink()
            return
    raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
