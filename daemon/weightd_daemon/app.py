"""The composition root: makes every part, starts them in order, stops them in reverse. Only here are they named."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import resource
import signal
import socket
import stat
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from weightd._address import handles_path
from weightd.errors import DeviceError

from .config import ConfigError, Settings, means, parse_size
from .core.catalog import Catalog
from .core.events import Event, Sealed
from .core.lease import Leases
from .core.memory import DeviceMemory
from .core.store import Store
from .devices.cuda_choice import open_gpus
from .devices.cuda_ipc import Holding
from .devices.host import HostDevice
from .devices.reclaimer import Reclaimer
from .edges.attaching import Attacher
from .edges.connections import Connections
from .edges.digest_index import DigestIndex
from .edges.handle_server import HandleServer
from .edges.leases import Manifests
from .edges.parts import Parts
from .edges.service import ControlPlane
from .edges.survival import Survival
from .edges.systemd import ServiceManager, kept_descriptors
from .loader.loads import Loads
from .loader.process import DEFAULT_ARGV

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from .devices.device import Device

log = logging.getLogger(__name__)

_POOL_SHARE = 8
_POOL_LIMIT = 2 << 30
_STOP_GRACE = 1.0
_CHILD_END_SECONDS = 5.0


class AlreadyServedError(Exception):
    """Another daemon has this socket."""


class Daemon:
    """One daemon. `run` serves until it is told to stop. `loader_argv` is how loaders are started."""

    def __init__(self, settings: Settings, loader_argv: Sequence[str] = DEFAULT_ARGV) -> None:
        self._settings = settings
        self._socket = Path(settings.socket)
        self._loader_argv = loader_argv
        self._manager = ServiceManager(os.environ)
        self._given = kept_descriptors(os.environ)
        self._stop = asyncio.Event()
        self._signal = signal.SIGTERM

    async def run(self) -> int:
        """Serve until SIGTERM or SIGINT. Returns the exit code. Errors: AlreadyServedError."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._told_to_stop, number)
        _raise_descriptor_limit()
        async with contextlib.AsyncExitStack() as stack:
            # Taken before anything is bound and given up after everything has stopped: a second gRPC server would
            # take over a live socket without a word.
            lock = stack.enter_context(_locked(self._socket))
            await self._serve(stack, lock)
            await self._stop.wait()
            log.info("stopping signal=%s", self._signal.name)
        return 130 if self._signal is signal.SIGINT else 0

    async def _serve(self, stack: contextlib.AsyncExitStack, lock: int) -> None:
        settings = self._settings

        def on_lost(uuid: str, reason: str) -> None:
            log.warning("device lost device=%s: %s", uuid, reason)
            store.lose(uuid, reason)
            loads.lose(uuid, DeviceError(f"device {uuid}: {reason}; load it again"))

        devices: dict[str, Device] = {}
        budgets: dict[str, int] = {}
        holding = Holding(asyncio.get_running_loop(), on_lost, inherited=(lock,))
        for device, names in _open(settings, holding):
            stack.callback(device.close)
            devices[device.uuid] = device
            budgets[device.uuid] = _budget(settings, device, names)
        manifests = Manifests(before_lock=lambda number: survival.reserve(number))
        stack.callback(manifests.close)

        def on_event(event: Event) -> None:
            key = event.checkpoint.key
            if isinstance(event, Sealed):
                survival.sealed(key, event.manifest)
            else:
                manifests.remove(key)
                if event.reason == "removed":
                    catalog.forget(event.checkpoint)
                survival.evicted(key)
                log.info("evicted content=%s device=%s reason=%s", key.content_digest[:19], key.device, event.reason)

        store = Store(leases=Leases(manifests.is_locked), on_event=on_event)
        catalog = Catalog(store, changed=lambda: survival.flip())
        survival = Survival(
            manager=self._manager, given=self._given, store=store, catalog=catalog, devices=devices,
            manifests=manifests, now=time.time,
        )  # fmt: skip
        stack.callback(survival.close)
        reclaimers = {uuid: Reclaimer(device, partial(survival.released, uuid)) for uuid, device in devices.items()}
        for uuid, device in devices.items():
            reclaimer = reclaimers[uuid]
            stack.push_async_callback(reclaimer.finish)
            store.memories[uuid] = DeviceMemory(
                budget=budgets[uuid], page=device.page, sparse=device.sparse,
                pool_limit=_pool(settings, budgets[uuid]) if device.sparse else 0,
                create=device.create, on_reclaim=reclaimer.kick, available=device.available,
            )  # fmt: skip
            reclaimer.watch(store.memories[uuid])
        await survival.begin()
        default_device = _default(devices)
        index = DigestIndex(Path(settings.state_dir))
        stack.push_async_callback(index.close)
        connections = Connections(isolated=settings.isolation == "uid", admins=settings.admin_uids)
        loads = Loads(
            store=store, catalog=catalog, devices=devices, reclaimers=reclaimers, index=index,
            prepare=survival.prepare, now=time.time, lock=lock,
            threads=settings.reader_threads or min(4, os.cpu_count() or 1), at_once=settings.max_loads,
            argv=self._loader_argv,
        )  # fmt: skip
        stack.push_async_callback(loads.close)
        attacher = Attacher(
            store=store, catalog=catalog, loads=loads, manifests=manifests, connections=connections,
            devices=devices, default_device=default_device, now=time.time,
        )  # fmt: skip
        handles = HandleServer(connections=connections, attacher=attacher, max_connections=settings.max_connections)
        control = ControlPlane(
            Parts(store, catalog, loads, connections, devices, default_device, time.time, started=time.time())
        )
        mode = int(settings.socket_mode, 8)
        handles.start(_listen(stack, handles_path(self._socket), mode))
        stack.callback(handles.stop)
        with _umask(0o177):  # until its mode is set, only this user may connect
            await control.start(str(self._socket))
        stack.push_async_callback(control.stop, _STOP_GRACE)
        stack.callback(loads.cancel_all)  # first of all, so that waiters hear why before their calls are cut
        self._socket.chmod(mode)
        await control.ready()
        served = [f"{_called(device)}, budget {budgets[uuid] / 2**30:.2f} GiB" for uuid, device in devices.items()]
        for device in devices.values():
            log.info("serving device=%s kind=%s budget=%d", device.uuid, device.kind, budgets[device.uuid])
            if device.note:
                log.warning("device %s is %s", device.uuid, device.note)
        log.info("ready socket=%s pid=%d", self._socket, os.getpid())
        print(f"weightd is ready on {self._socket}: {'; '.join(served)}", flush=True)  # noqa: T201  # the contract

    def _told_to_stop(self, number: signal.Signals) -> None:
        self._signal = number
        self._stop.set()


def _open(settings: Settings, holding: Holding) -> Iterator[tuple[Device, tuple[str, ...]]]:
    """Open what is to be served, with what settings may call it. Errors: ConfigError."""
    served: list[tuple[str, ...]] = []
    if {"host", "auto"} & {*settings.devices}:
        served += [("host",)]
        yield HostDevice(), ("host",)
    for gpu in open_gpus(settings.devices, settings.transport, holding):
        served += [gpu.names]
        yield gpu
    for said in settings.budget_devices:
        meant = [names[0] for names in served if any(means(said, name) for name in names)]
        if not meant:
            raise ConfigError(f"budget = {settings.budget!r}: {said} is not served")
        if len(meant) > 1 and said != "cuda":
            raise ConfigError(
                f"budget = {settings.budget!r}: {said} means more than one of {', '.join(meant)}; say more of it"
            )


def _default(devices: Mapping[str, Device]) -> str:
    """Where a load goes that says nothing: the only GPU, or the only device; "" where it has to say."""
    gpus = [uuid for uuid, device in devices.items() if device.kind != "host"]
    candidates = gpus or list(devices)
    return candidates[0] if len(candidates) == 1 else ""


def _called(device: Device) -> str:
    return device.name if device.kind == "host" else f"{device.name} ({device.uuid})"


def _budget(settings: Settings, device: Device, names: Sequence[str]) -> int:
    """Bytes that a device may use. Errors: ConfigError.

    A GPU that "auto" has found, and that none is said for, gets at most all that it has: it may be new to the machine.
    """
    said, capacity = settings.budget_for(names), device.capacity()
    share = device.default_share if said is None else said
    size = int(capacity * share) if isinstance(share, float) else share
    found = "cuda" in names and "auto" in settings.devices
    if size > capacity and found and not settings.budget_is_for(names):
        log.info("budget of %s: %d bytes is all that it has, of the %d said", device.uuid, capacity, size)
        size = capacity
    if not device.page <= size <= capacity:
        raise ConfigError(
            f"budget = {settings.budget!r}: that of {device.uuid} must be from {device.page} bytes "
            f"to {capacity / 2**30:.1f} GiB here"
        )
    return size // device.page * device.page


def _pool(settings: Settings, budget: int) -> int:
    """Freed bytes that stay with host memory."""
    return min(budget, parse_size(settings.pool)) if settings.pool else min(budget // _POOL_SHARE, _POOL_LIMIT)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[int]:
    """Hold the lock of a socket path; loaders and holders inherit it. Errors: AlreadyServedError."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(path.with_name(f"{path.name}.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise AlreadyServedError(
            f"socket {path}: cannot be made: {error.strerror}; choose another with --socket"
        ) from error
    try:
        _take_lock(lock, path)
        os.ftruncate(lock, 0)
        os.pwrite(lock, str(os.getpid()).encode(), 0)
        for stale in (path, handles_path(path)):
            _remove_socket(stale)
        yield lock
        for stale in (path, handles_path(path)):
            _remove_socket(stale)
    finally:
        os.close(lock)


def _take_lock(lock: int, path: Path) -> None:
    """Lock, waiting a little for the children of a daemon that has died: they hold its lock until they are gone."""
    deadline = time.monotonic() + _CHILD_END_SECONDS
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(lock, 20, 0).decode(errors="replace").strip()
            if holder.isdigit() and not Path(f"/proc/{holder}").exists():
                if time.monotonic() < deadline:
                    time.sleep(0.02)
                    continue
                raise AlreadyServedError(
                    f"socket {path}: a process of the daemon that died (pid {holder}) does not end, "
                    "it may hang in a read or in the driver; end it, or choose another socket with --socket"
                ) from None
            raise AlreadyServedError(
                f"socket {path}: another daemon (pid {holder or 'unknown'}) serves it; "
                "stop it, or choose another with --socket"
            ) from None
        return


def _remove_socket(path: Path) -> None:
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise AlreadyServedError(
                f"{path} is there and is not a socket; move it away, or choose another with --socket"
            )
        path.unlink()
    except FileNotFoundError:
        pass


def _listen(stack: contextlib.AsyncExitStack, path: Path, mode: int) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
    stack.callback(listener.close)
    with _umask(0o177):
        listener.bind(str(path))
    path.chmod(mode)
    listener.listen(128)
    return listener


@contextlib.contextmanager
def _umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def _raise_descriptor_limit() -> None:
    """Every segment is two descriptors; take all that the system allows."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
