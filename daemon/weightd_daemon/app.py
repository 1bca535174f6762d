"""The composition root: makes every part, starts them in order, stops them in reverse. Only here are they named."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from weightd.errors import DeviceError

from . import logs
from .api.context import Parts
from .api.grpc_server import ControlPlane
from .config.toml_file import ConfigError, TemporaryError
from .core.catalog import Catalog
from .core.events import DeviceLost, Event, Evicted, Sealed
from .core.lease import Leases
from .core.memory import DeviceMemory
from .core.store import Store
from .devices.budgets import budget_of, called, check_budgets, default_device, device_meant, open_served, pool_of
from .devices.cuda_ipc import Holding
from .devices.reclaimer import Reclaimer
from .handles.attach import Attacher
from .handles.handle_server import HandleServer
from .handles.lease_files import LeaseFiles
from .handles.lease_locks import LeaseLocks, Manifests
from .handles.lease_sweep import LeaseSweep
from .handles.peers import Connections
from .loads.fair_queue import Turns
from .loads.loader_process import DEFAULT_ARGV
from .loads.loads import Loads
from .monitoring.event_log import EventLog
from .monitoring.event_stream import Journal
from .monitoring.listeners import Listeners
from .monitoring.statistics import Statistics
from .operations.drain import Drain
from .operations.notify import Announcer, status_line
from .operations.preload import Preloader
from .operations.quarantine import thaw_when_unwritten
from .operations.reload import Reloading
from .operations.serving_lock import AlreadyServedError
from .operations.sockets import Sockets, cannot_be_made, identity, locked, remove_own
from .persistence.descriptor_store import Survival
from .persistence.digest_index import DigestIndex
from .persistence.service_manager import ServiceManager, kept_descriptors

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from .config.settings import Loaded, Settings
    from .devices.device import Device
    from .monitoring.metrics import Metrics
    from .operations.reload import Change

__all__ = ["AlreadyServedError", "Daemon"]

log = logging.getLogger(__name__)

_STOP_GRACE = 1.0


class Daemon:
    """One daemon. `run` serves until it is told to stop.

    `read` reads the settings again, and `loader_argv` is how loaders are started.
    """

    def __init__(
        self, settings: Settings, read: Callable[[], Loaded], loader_argv: Sequence[str] = DEFAULT_ARGV
    ) -> None:
        self._settings = settings
        self._read = read
        self._socket = Path(settings.socket)
        self._loader_argv = loader_argv
        self._manager = ServiceManager(os.environ)  # takes the variables away, before any child could inherit them
        self._announcer = Announcer(self._manager)
        self._given = kept_descriptors(os.environ)
        self._stop = asyncio.Event()
        self._hangup = asyncio.Event()
        self._signal = signal.SIGTERM
        self._lost: Exception | None = None
        self._up = False

    async def run(self) -> int:
        """Serve until SIGTERM or SIGINT. Returns the exit code. Errors: ConfigError, AlreadyServedError, OSError."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._told_to_stop, number)
        loop.add_signal_handler(signal.SIGHUP, self._hangup.set)
        self._announcer.start()
        async with contextlib.AsyncExitStack() as stack:
            # Taken before anything is bound and given up after everything has stopped: a second gRPC server would
            # take over a live socket without a word.
            sockets = stack.enter_context(locked(self._socket))
            await self._serve(stack, sockets)
            self._up = True
            await self._stop.wait()
            self._announcer.stop()
            self._up = False
            if self._lost is None:
                log.info("stopping signal=%s", self._signal.name)
            else:
                log.error("stopping: %s", self._lost)
        if self._lost is not None:
            raise self._lost
        return 130 if self._signal is signal.SIGINT else 0

    async def _serve(self, stack: contextlib.AsyncExitStack, sockets: Sockets) -> None:
        settings = self._settings
        listeners = Listeners()
        tell = listeners.tell

        def on_lost(uuid: str, reason: str) -> None:
            log.warning("device lost device=%s: %s", uuid, reason)
            tell(DeviceLost(uuid, reason))
            store.lose(uuid, reason)
            loads.lose(uuid, DeviceError(f"device {uuid}: {reason}; load it again"))

        devices: dict[str, Device] = {}
        names: dict[str, Sequence[str]] = {}
        budgets: dict[str, int] = {}
        holding = Holding(asyncio.get_running_loop(), on_lost, inherited=(sockets.lock.holders,))
        for device, called_so in open_served(settings, holding):
            stack.callback(device.close)
            devices[device.uuid], names[device.uuid] = device, called_so
            budgets[device.uuid] = budget_of(settings, device, called_so)
        manifests = Manifests(before_lock=lambda number: survival.reserve(number))
        stack.callback(manifests.close)
        lease_files = LeaseFiles(
            keeps=lambda: survival.keeps, keep=lambda name, descriptor: survival.keep(name, descriptor),
            drop=lambda name: survival.drop(name),
        )  # fmt: skip
        stack.callback(lease_files.close)
        locks = LeaseLocks(manifests, lease_files)

        def on_event(event: Event) -> None:
            if isinstance(event, Sealed):
                survival.sealed(event.checkpoint.key, event.manifest)
            tell(event)
            if isinstance(event, Evicted):
                key = event.checkpoint.key
                manifests.remove(key)
                if event.load:
                    loads.evicted(event)  # which says what it was called
                catalog.forget(event.checkpoint, chosen=event.reason == "removed")
                survival.evicted(key)

        store = Store(leases=Leases(locks.is_locked, tell, locks.forget), on_event=on_event)
        limits = settings.limits
        catalog = Catalog(store, limits, changed=lambda: survival.changed(), on_event=tell)
        journal = Journal(store=store, catalog=catalog, now=time.time)
        listeners.add(journal)
        listeners.add(EventLog(journal.encode))
        survival = Survival(
            manager=self._manager, given=self._given, store=store, catalog=catalog, devices=devices,
            manifests=manifests, lease_files=lease_files, now=time.time,
        )  # fmt: skip
        stack.callback(survival.close)
        aside = sockets.lock.is_written_by_others()
        reclaimers = {uuid: Reclaimer(device, partial(survival.released, uuid)) for uuid, device in devices.items()}
        for uuid, device in devices.items():
            reclaimer = reclaimers[uuid]
            stack.push_async_callback(reclaimer.finish)
            store.memories[uuid] = DeviceMemory(
                budget=budgets[uuid], page=device.page, sparse=device.sparse,
                pool_limit=pool_of(settings, device, budgets[uuid]),
                create=device.create, on_reclaim=reclaimer.kick, available=device.available,
                before_use=survival.flip,
            )  # fmt: skip
            reclaimer.watch(store.memories[uuid])
            store.memories[uuid].quarantine = aside
        await survival.begin()
        sweep = LeaseSweep(store.leases, lease_files)
        stack.push_async_callback(sweep.close)
        sweep.begin()
        if aside:
            thawing = asyncio.get_running_loop().create_task(thaw_when_unwritten(sockets.lock, store.memories, devices))
            stack.callback(thawing.cancel)
        default = default_device(devices)
        index = DigestIndex(Path(settings.state_dir))
        stack.push_async_callback(index.close)
        index.begin()
        connections = Connections(isolated=settings.isolation == "uid", admins=settings.admin_uids)
        turns = Turns(settings.max_loads, settings.loads_of_one)
        loads = Loads(
            store=store, catalog=catalog, devices=devices, reclaimers=reclaimers, index=index,
            prepare=survival.prepare, now=time.time, on_event=tell, lock=sockets.lock.writers, threads=settings.threads,
            turns=turns, limits=limits,
            argv=self._loader_argv,
        )  # fmt: skip
        stack.push_async_callback(loads.close)
        preloader = Preloader(
            loads=loads, catalog=catalog, who=connections.user(os.geteuid()), roots=settings.model_roots,
            place=lambda said: device_meant(said, names, default, settings.devices), tell=self._manager.tell,
            listed=settings.preload,
        )  # fmt: skip
        drain = Drain(store=store, loads=loads, on_event=tell, resumed=preloader.begin)
        stack.push_async_callback(drain.close)
        attacher = Attacher(
            store=store, catalog=catalog, loads=loads, manifests=manifests, locks=locks, connections=connections,
            devices=devices, default_device=default, limits=limits, now=time.time,
        )  # fmt: skip
        statistics = Statistics(store, loads, connections, devices, drain, index)
        parts = Parts(
            store, catalog, loads, connections, devices, default,
            now=time.time, journal=journal, drain=drain, statistics=statistics,
        )  # fmt: skip
        metrics = await self._monitor(stack, statistics)
        if metrics is not None:
            listeners.add(metrics)
        handles = HandleServer(
            connections=connections, attacher=attacher, max_connections=settings.max_connections,
            on_attach=metrics.attached if metrics else _uncounted,
        )  # fmt: skip
        stack.callback(handles.stop)
        control = ControlPlane(parts, metrics.called if metrics else _uncounted, before_answer=survival.flip)
        stack.push_async_callback(control.stop, _STOP_GRACE)
        try:
            await sockets.open(int(settings.socket_mode, 8), control, handles.start)
        except OSError as error:
            raise cannot_be_made(self._socket, error) from error
        stack.push_async_callback(sockets.stop_watching)
        stack.callback(loads.cancel_all)  # first of all, so that waiters hear why before their calls are cut
        stack.push_async_callback(preloader.close)
        preloader.check(settings.preload)
        preloader.begin(only_awaited=True)
        await preloader.awaited(self._stop)
        if self._stop.is_set():
            return
        await control.ready()
        served = [f"{called(device)}, budget {budgets[uuid] / 2**30:.2f} GiB" for uuid, device in devices.items()]
        for device in devices.values():
            log.info("serving device=%s kind=%s budget=%d", device.uuid, device.kind, budgets[device.uuid])
            if device.note:
                log.warning("device %s is %s", device.uuid, device.note)
        self._announcer.ready(lambda: status_line(store))
        sockets.watch(self._lost_socket)
        log.info("ready socket=%s pid=%d", self._socket, os.getpid())
        print(f"weightd is ready on {self._socket}: {'; '.join(served)}", flush=True)  # noqa: T201  # the contract
        preloader.begin()

        def change_budgets(new: Settings) -> None:
            for uuid, memory in store.memories.items():
                budget = budget_of(new, devices[uuid], names[uuid])
                memory.resize(budget, pool_of(new, devices[uuid], budget))

        def change_loads(new: Settings) -> None:
            turns.resize(new.max_loads, new.loads_of_one)
            loads.threads = new.threads

        def change_roots(new: Settings) -> None:
            preloader.roots, preloader.listed = new.model_roots, new.preload

        def change_sockets(new: Settings) -> None:
            sockets.change_mode(int(new.socket_mode, 8))
            if isinstance(settings.metrics_address, Path):
                settings.metrics_address.chmod(int(new.socket_mode, 8))

        def change_limits(new: Settings) -> None:
            limits.take_over(new.limits)
            handles.max_connections = new.max_connections

        changes: dict[Change, str] = {
            change_budgets: "budget pool",
            change_loads: "max_loads max_user_loads reader_threads",
            change_roots: "model_roots preload",
            change_sockets: "socket_mode",
            change_limits: "max_connections max_user_leases max_user_bytes max_user_offers max_user_names",
            logs.change: "log_level log_format",
            lambda new: connections.change_admins(new.admin_uids): "admins",
        }
        reloading = Reloading(
            settings,
            self._read,
            [lambda new: check_budgets(new, devices, names, store.memories), lambda new: preloader.check(new.preload)],
            {name: change for change, keys in changes.items() for name in keys.split()},
            lambda _: preloader.begin(),
            self._announcer.reloading,
        )
        task = asyncio.get_running_loop().create_task(reloading.serve(self._hangup))
        stack.callback(task.cancel)

    async def _monitor(self, stack: contextlib.AsyncExitStack, statistics: Statistics) -> Metrics | None:
        """Serve the pages for monitors, if they are wanted. Errors: ConfigError, TemporaryError, AlreadyServedError."""
        settings, address = self._settings, self._settings.metrics_address
        if address is None:
            return None
        try:
            from .monitoring.endpoints import listen, pages
            from .monitoring.metrics import Metrics
        except ModuleNotFoundError as error:
            if error.name != "prometheus_client":
                raise
            raise ConfigError(
                f"metrics = {settings.metrics!r}: needs prometheus-client, which is not installed: "
                "pip install '.[metrics]' in weightd's checkout"
            ) from error
        metrics = Metrics(statistics)
        server = pages(metrics, statistics, lambda: self._up)
        try:
            listener = listen(address, int(settings.socket_mode, 8))
        except OSError as error:
            raise TemporaryError.of(error, f"metrics {settings.metrics}") or AlreadyServedError(
                f"metrics {settings.metrics}: cannot be served there: {error.strerror}; choose another with --metrics"
            ) from error
        if isinstance(address, Path):
            stack.callback(remove_own, address, identity(address))
        stack.push_async_callback(server.stop)
        await server.start(listener)
        log.info("monitors read at %s", settings.metrics)
        return metrics

    def _told_to_stop(self, number: signal.Signals) -> None:
        self._signal = number
        self._stop.set()

    def _lost_socket(self, error: Exception) -> None:
        self._lost = error
        self._stop.set()


def _uncounted(*_: object) -> None:
    """Where nobody counts."""
