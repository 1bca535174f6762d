"""How a driver or a worker of Ray reaches the catalogue of its cluster."""

from __future__ import annotations

import os
import socket
import time
from typing import TYPE_CHECKING, Any, Final

import ray
import ray.exceptions

from weightd import __version__
from weightd._references.files import show
from weightd.errors import DaemonBusyError, DaemonUnreachableError, InvalidReferenceError, WeightdError
from weightd_fleet.agent.addresses import parse_address
from weightd_fleet.service.fleet_service import AGENT_PORT, AgentAccess

from .ray_catalogue import NAME, NAMESPACE, QUICK, SLOW_GROUP, CatalogueSettings, start

if TYPE_CHECKING:
    from collections.abc import Callable

_PORT: Final = "WEIGHTD_FLEET_PORT"
_TLS_DIR: Final = "WEIGHTD_FLEET_TLS_DIR"
_PAUSE: Final = 0.05
_REACH_SECONDS: Final = 10.0
_ANSWER_SECONDS: Final = 60.0
"""How long a question may take that needs no transfer: the catalogue may have to be started, or to be restarted."""


class RayCatalogueHandle:
    """A catalogue, as one process asks it. `leave` ends what `connect_catalogue` began."""

    def __init__(self, actor: Any, leave: Callable[[], None]) -> None:
        self._actor = actor
        self.leave = leave

    def ask(self, question: str, *given: Any) -> Any:
        """The answer to a question. Errors: those of the question, DaemonUnreachableError, DaemonBusyError."""
        if question in QUICK:
            return self._got(self._actor.ask.remote(question, *given), _ANSWER_SECONDS)
        return self._got(self._actor.work.options(concurrency_group=SLOW_GROUP).remote(question, *given), None)

    def settings(self) -> CatalogueSettings:
        """How it was started. Errors: as `ask`."""
        found: CatalogueSettings = self._got(self._actor.settings.remote(), _ANSWER_SECONDS)
        return found

    def _got(self, answer: Any, seconds: float | None) -> Any:
        try:
            return ray.get(answer, timeout=seconds)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, WeightdError):
                raise error.cause from None
            raise
        except ray.exceptions.GetTimeoutError:
            raise DaemonBusyError(f"the fleet's catalogue does not answer within {seconds} s; try again") from None
        except ray.exceptions.RayError as error:
            raise DaemonUnreachableError(
                f"the fleet's catalogue cannot be asked: {str(error).splitlines()[0]}; connect again"
            ) from error


def connect_catalogue(
    address: str | None, *, port: int | None = None, tls_dir: str | None = None, start_it: bool = True
) -> RayCatalogueHandle:
    """The catalogue of a cluster, started if it does not run and `start_it`. `weightd.fleet.connect` says the rest."""
    settings = _wanted(port, tls_dir) if start_it else None  # what is wrong with them needs no cluster
    leave = _join(address)
    try:
        handle = RayCatalogueHandle(_actor(settings), leave)
        _check(handle.settings(), port, tls_dir)
    except BaseException:
        leave()
        raise
    return handle


def restart_catalogue(address: str | None, *, port: int | None, tls_dir: str | None) -> RayCatalogueHandle:
    """A catalogue with these settings in the place of the one that runs, if any.

    Errors: DaemonUnreachableError, InvalidReferenceError (see `_wanted`); then the one that runs goes on.
    """
    settings = _wanted(port, tls_dir)  # before the one that runs is ended
    leave = _join(address)
    try:
        _stop()
        handle = RayCatalogueHandle(start(settings), leave)
        handle.settings()
    except BaseException:
        leave()
        raise
    return handle


def _stop() -> None:
    """End the catalogue that runs, if any. Errors: DaemonBusyError."""
    deadline = time.monotonic() + _ANSWER_SECONDS
    while time.monotonic() < deadline:
        try:
            ray.kill(ray.get_actor(NAME, namespace=NAMESPACE), no_restart=True)
        except ValueError:  # its name is free
            return
        time.sleep(_PAUSE)
    raise DaemonBusyError(f"the fleet's catalogue does not end within {_ANSWER_SECONDS} s; try again")


def _wanted(port: int | None, tls_dir: str | None) -> CatalogueSettings:
    """The settings for a catalogue. Errors: InvalidReferenceError (no port, or a relative path)."""
    said = os.environ.get(_PORT, "")
    if port is None and said and not (said.isdecimal() and 0 < int(said) < 65536):
        raise InvalidReferenceError(f"{_PORT}={said[:80]}: must be a port, from 1 to 65535")
    port = port if port is not None else int(said or AGENT_PORT)
    tls_dir = tls_dir if tls_dir is not None else os.environ.get(_TLS_DIR, "")
    if tls_dir and not os.path.isabs(tls_dir):
        raise InvalidReferenceError(
            f"{show(tls_dir)}: is relative, and the catalogue runs in another folder, on the cluster's head; give an "
            f"absolute path in --tls-dir or {_TLS_DIR}"
        )
    return CatalogueSettings(AgentAccess(port, tls_dir), __version__)


def _check(running: CatalogueSettings, port: int | None, tls_dir: str | None) -> None:
    """Errors: InvalidReferenceError (the catalogue runs with other settings, or is of another version)."""
    differs = [
        f"{what} {runs!r}, not {wanted!r}"
        for what, runs, wanted in (
            ("port", running.access.port, port),
            ("TLS directory", running.access.tls_dir, tls_dir),
            ("weightd", running.version, __version__),
        )
        if wanted is not None and runs != wanted
    ]
    if differs:
        raise InvalidReferenceError(
            f"the fleet's catalogue runs with {'; '.join(differs)}: restart it with `weightd fleet catalogue`"
        )


def _actor(settings: CatalogueSettings | None) -> Any:
    """The catalogue, which is started with the settings where there are any. Errors: DaemonUnreachableError."""
    if settings is not None:
        return start(settings)
    try:
        return ray.get_actor(NAME, namespace=NAMESPACE)
    except ValueError:
        raise DaemonUnreachableError(
            "no catalogue runs in this cluster; start it with `weightd fleet catalogue`"
        ) from None


def _join(address: str | None) -> Callable[[], None]:
    """Be a driver of a cluster, unless this process is one or a worker. Returns what undoes it.

    Errors: DaemonUnreachableError.
    """
    if ray.is_initialized():
        return lambda: None
    address = address or os.environ.get("RAY_ADDRESS") or "auto"
    host = _reachable_host(address)
    # On the head Ray may take another of the machine's addresses, and then waits for a node there.
    options = {"_node_ip_address": host} if host and _is_here(host) else {}
    try:
        ray.init(address, log_to_driver=False, logging_level="error", **options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        why = " ".join(str(error).split())[:300]
        raise DaemonUnreachableError(f"{address}: no Ray cluster can be reached: {why}; give --address") from error
    return ray.shutdown  # type: ignore[no-any-return]  # ray is not typed


def _reachable_host(address: str) -> str:
    """The host of an address of HOST:PORT, if somebody listens there; "" for other forms, which Ray knows.

    Ray itself tries for minutes. Errors: DaemonUnreachableError.
    """
    try:
        host, port = parse_address(address)
    except InvalidReferenceError:
        return ""
    try:
        socket.create_connection((host, port), _REACH_SECONDS).close()
    except OSError as error:
        why = error.strerror or error
        raise DaemonUnreachableError(f"{address}: no Ray cluster there: {why}; give --address") from error
    return host


def _is_here(host: str) -> bool:
    """Whether a host is an IP address of this machine."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind((host, 0))
    except OSError:
        return False
    return True
