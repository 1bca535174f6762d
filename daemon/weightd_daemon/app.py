"""The composition root: creates all parts, starts them in order, and stops them in reverse order."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from weightd._sizes import size

from . import heap, logs, turns
from .api.context import GrpcServiceContext
from .api.grpc_server import GrpcServer
from .bookkeeping import DaemonBooks, open_books
from .config.settings import SettingsInForce
from .core.store import ContentStore
from .devices.budgets import called, check_budgets, device_meant, resize
from .devices.cuda_ipc import CudaHolderContext
from .devices.served import Devices
from .handles.attach import AttachHandler
from .handles.connections import HandleSocketConnections
from .handles.handle_server import HandleServer
from .inspection.sharing_upkeep import SharingUpkeep
from .loads.fair_queue import LoadQueue
from .loads.loader_process import DEFAULT_ARGV
from .loads.loads import Loads
from .log_line import Line
from .monitoring.listeners import EventListeners
from .monitoring.page_server import serve_pages
from .monitoring.statistics import Statistics
from .operations.drain import DrainOperation
from .operations.forget import DeviceForgetting
from .operations.model_roots import on_thread
from .operations.notify import ServiceManagerNotifier, status_line
from .operations.preload import PreloadOperation
from .operations.quarantine import thaw_when_unwritten
from .operations.reload import ReloadOperation
from .operations.serving_lock import AlreadyRunningError
from .operations.sockets import DaemonSockets, cannot_be_made, locked
from .persistence.digest_index import PersistentDigestIndex
from .persistence.given import GivenDescriptors
from .persistence.service_manager import ServiceManagerStore, stored_descriptors
from .residency import Residency

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from .config.settings import LoadedSettings, Settings
    from .monitoring.metrics import Metrics
    from .operations.reload import Change

__all__ = ["AlreadyRunningError", "Daemon"]

log = logging.getLogger(__name__)

_STOP_GRACE = 1.0


class _Work(NamedTuple):
    """What loads, and how many at once."""

    loads: Loads
    fair_queue: LoadQueue
    digests: PersistentDigestIndex


class _Services(NamedTuple):
    """What answers calls, what attaches, and what loads by itself."""

    parts: GrpcServiceContext
    attacher: AttachHandler
    preloader: PreloadOperation


class Daemon:
    """One daemon. `run` serves until it is told to stop.

    `read` reads the settings again, and `loader_argv` is how loaders are started.
    """

    def __init__(
        self, loaded: LoadedSettings, read: Callable[[], LoadedSettings], loader_argv: Sequence[str] = DEFAULT_ARGV
    ) -> None:
        self._settings = settings = loaded.settings
        self._in_force = SettingsInForce(loaded)
        self._read = read
        self._socket = Path(settings.socket)
        self._loader_argv = loader_argv
        self._manager = ServiceManagerStore(os.environ)  # takes the variables away, before any child could inherit them
        self._notifier = ServiceManagerNotifier(self._manager)
        self._given = stored_descriptors(os.environ)
        self._stop = asyncio.Event()
        self._hangup = asyncio.Event()
        self._signal = signal.SIGTERM
        self._lost: Exception | None = None
        self._up = False

    async def run(self) -> int:
        """Serve until SIGTERM or SIGINT. Returns the exit code. Errors: ConfigError, AlreadyRunningError, OSError."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._told_to_stop, number)
        loop.add_signal_handler(signal.SIGHUP, self._hangup.set)
        self._notifier.start()
        async with contextlib.AsyncExitStack() as stack:
            # Taken before anything is bound and given up after everything has stopped: a second gRPC server would
            # take over a live socket without a word.
            sockets = stack.enter_context(locked(self._socket))
            await self._serve(stack, sockets)
            self._up = True
            await self._stop.wait()
            self._notifier.stop()
            self._up = False
            if self._lost is None:
                log.info(Line("stopping", {"signal": self._signal.name}))
            else:
                log.error(Line("stopping", because=self._lost))
        if self._lost is not None:
            raise self._lost
        return 130 if self._signal is signal.SIGINT else 0

    async def _serve(self, stack: contextlib.AsyncExitStack, sockets: DaemonSockets) -> None:
        listeners = EventListeners()
        residency = Residency(listeners.publish)
        given = GivenDescriptors(self._given)
        served = await self._open_devices(stack, residency, sockets.lock.holders, given)
        if self._stop.is_set():
            return
        books = open_books(stack, self._settings, self._manager, served, residency, listeners, given)
        work = self._prepare_loads(stack, served, books, listeners, sockets.lock.writers)
        residency.join(books.store, books.catalog, books.manifests, books.descriptor_store, work.loads)
        await self._adopt(stack, sockets, served, books)
        services = self._make_services(stack, served, books, work, listeners)
        metrics = await serve_pages(stack, self._settings, services.parts.statistics, lambda: self._up)
        if metrics is not None:
            listeners.add(metrics)
        heap.settle()
        turns.share_interpreter()
        control, handles = await self._open_sockets(stack, sockets, services, residency, metrics)
        stack.callback(work.loads.cancel_all)  # first of all, so that waiters hear why before their calls are cut
        preloader = services.preloader
        stack.push_async_callback(preloader.close)
        preloader.check(self._settings.preload)
        preloader.begin(only_awaited=True)
        await preloader.awaited(self._stop)
        if self._stop.is_set():
            return
        await control.ready()
        self._say_ready(served, books.store)
        sockets.watch(self._lost_socket)
        preloader.begin()
        books.absences.serve(came=preloader.begin)
        reloading = self._reloading(sockets, served, books, work, services, handles)
        task = asyncio.get_running_loop().create_task(reloading.serve(self._hangup))
        stack.callback(task.cancel)

    async def _open_devices(
        self, stack: contextlib.AsyncExitStack, residency: Residency, lock: int, given: GivenDescriptors
    ) -> Devices:
        """Open the devices, with regard to what is kept of which, or stop. Errors: ConfigError."""
        holding = CudaHolderContext(asyncio.get_running_loop(), residency.on_lost, inherited=(lock,))
        served = Devices(self._settings, holding)
        stack.callback(served.close)
        # On a thread: the loop goes on telling the manager that it starts, and a driver that hangs holds up no stop.
        opening = asyncio.ensure_future(on_thread(partial(served.open, given.kinds)))
        stopped = asyncio.ensure_future(self._stop.wait())
        await asyncio.wait([opening, stopped], return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        if opening.done():
            await opening
        else:
            opening.cancel()
        return served

    async def _adopt(
        self, stack: contextlib.AsyncExitStack, sockets: DaemonSockets, served: Devices, books: DaemonBooks
    ) -> None:
        """Take up what an earlier daemon has left; set aside what a process of it may still write to."""
        memories = books.store.memories
        quarantined = sockets.lock.is_written_by_others()
        for memory in memories.values():
            memory.quarantine = quarantined
        await books.descriptor_store.begin()
        await books.absences.begin()
        books.sweep.begin()
        if quarantined:
            hollow = {uuid: device.hollow for uuid, device in served.devices.items()}
            thawing = thaw_when_unwritten(sockets.lock, memories, hollow)
            stack.callback(asyncio.get_running_loop().create_task(thawing).cancel)

    def _prepare_loads(
        self,
        stack: contextlib.AsyncExitStack,
        served: Devices,
        books: DaemonBooks,
        listeners: EventListeners,
        lock: int,
    ) -> _Work:
        """Make what loads: nothing does so yet."""
        settings = self._settings
        index = PersistentDigestIndex(Path(settings.state_dir))
        stack.push_async_callback(index.close)
        index.begin()
        fair_queue = LoadQueue(settings.max_loads, settings.loads_of_one)
        loads = Loads(
            store=books.store, catalog=books.catalog, devices=served.devices, reclaimers=books.reclaimers, index=index,
            prepare=books.descriptor_store.prepare, now=time.time, on_event=listeners.publish,
            open_manifest=books.manifests.open, lock=lock, threads=settings.threads, fair_queue=fair_queue,
            limits=books.limits, argv=self._loader_argv,
        )  # fmt: skip
        stack.push_async_callback(loads.close)
        return _Work(loads, fair_queue, index)

    def _make_services(
        self,
        stack: contextlib.AsyncExitStack,
        served: Devices,
        books: DaemonBooks,
        work: _Work,
        listeners: EventListeners,
    ) -> _Services:
        """Make what answers calls and attaches: nobody can reach it yet."""
        settings, devices, default = self._settings, served.devices, served.default
        store, catalog, loads = books.store, books.catalog, work.loads
        connections = HandleSocketConnections(isolated=settings.isolation == "uid", admins=settings.admin_uids)
        preloader = PreloadOperation(
            loads=loads, catalog=catalog, who=connections.user(os.geteuid()), roots=settings.model_roots,
            place=lambda said: device_meant(said, served.names, default, settings.devices), notify=self._manager.notify,
            listed=settings.preload,
        )  # fmt: skip
        drain = DrainOperation(store=store, loads=loads, on_event=listeners.publish, resumed=preloader.begin)
        stack.push_async_callback(drain.close)
        attacher = AttachHandler(
            store=store, catalog=catalog, loads=loads, manifests=books.manifests, locks=books.locks,
            connections=connections, devices=devices, default_device=default, limits=books.limits, now=time.time,
        )  # fmt: skip
        sharing = SharingUpkeep(store.sharing)
        sharing.begin()
        stack.push_async_callback(sharing.close)
        statistics = Statistics(store, loads, connections, devices, drain, work.digests, sharing)
        forgetting = DeviceForgetting(
            store=store, loads=loads, absences=books.absences, reclaimers=books.reclaimers,
            settled=books.descriptor_store.settled,
        )  # fmt: skip
        parts = GrpcServiceContext(
            store, catalog, loads, connections, devices, default, now=time.time, event_stream=books.event_stream,
            drain=drain, statistics=statistics, absences=books.absences, forgetting=forgetting,
            sharing=sharing, manifests=books.manifests, locks=books.locks, in_force=self._in_force,
        )  # fmt: skip
        return _Services(parts, attacher, preloader)

    async def _open_sockets(
        self,
        stack: contextlib.AsyncExitStack,
        sockets: DaemonSockets,
        services: _Services,
        residency: Residency,
        metrics: Metrics | None,
    ) -> tuple[GrpcServer, HandleServer]:
        """Serve both sockets. Errors: TemporaryConfigError."""
        settings, parts = self._settings, services.parts
        handles = HandleServer(
            connections=parts.connections, attacher=services.attacher, max_connections=settings.max_connections,
            on_attach=metrics.attached if metrics else _uncounted,
        )  # fmt: skip
        stack.callback(handles.stop)
        on_call = metrics.called if metrics else _uncounted
        control = GrpcServer(parts, settings.max_connections, on_call, before_answer=residency.before_answer)
        stack.push_async_callback(control.stop, _STOP_GRACE)
        try:
            await sockets.open(int(settings.socket_mode, 8), control, handles.start)
        except OSError as error:
            raise cannot_be_made(self._socket, error) from error
        stack.push_async_callback(sockets.stop_watching)
        return control, handles

    def _say_ready(self, served: Devices, store: ContentStore) -> None:
        shown = []
        for uuid, device in served.devices.items():
            if uuid in served.absent:
                shown.append(f"{uuid} is absent")
                continue
            budget = store.memories[uuid].budget
            shown.append(f"{called(device)}, budget {size(budget)}")
            log.info(Line("serving", {"device": uuid, "kind": device.kind, "budget": budget}))
            if device.note:
                log.warning("device %s is %s", uuid, device.note)
        self._notifier.ready(lambda: status_line(store))
        log.info(Line("ready", {"socket": self._socket, "pid": os.getpid()}))
        print(f"weightd is ready on {self._socket}: {'; '.join(shown)}", flush=True)  # noqa: T201  # the contract

    def _reloading(
        self, sockets: DaemonSockets, served: Devices, books: DaemonBooks, work: _Work, services: _Services,
        handles: HandleServer,
    ) -> ReloadOperation:  # fmt: skip
        """What takes up the settings that can change while the daemon runs."""
        settings, store, preloader = self._settings, books.store, services.preloader

        def change_budgets(new: Settings) -> Iterator[None]:
            books.absences.settings = new  # at once: a device may take over between the steps that follow
            store.books.limit = resize(new, served.devices, served.names, store.memories, served.absent)
            return store.fit_books()

        def change_loads(new: Settings) -> None:
            work.fair_queue.resize(new.max_loads, new.loads_of_one)
            work.loads.threads = new.threads

        def change_roots(new: Settings) -> None:
            preloader.roots, preloader.listed = new.model_roots, new.preload

        def change_sockets(new: Settings) -> None:
            sockets.change_mode(int(new.socket_mode, 8))
            if isinstance(settings.metrics_address, Path):
                settings.metrics_address.chmod(int(new.socket_mode, 8))

        def change_limits(new: Settings) -> None:
            books.limits.copy_from(new.limits)
            handles.entrance.max_connections = new.max_connections

        def change_admins(new: Settings) -> None:
            services.parts.connections.change_admins(new.admin_uids)
            store.revision.move()  # what a user sees may be more now, or less

        def again(new: Settings) -> None:
            books.absences.hurry(new)
            preloader.begin()

        changes: dict[Change, str] = {
            change_budgets: "budget pool books",
            change_loads: "max_loads max_user_loads reader_threads",
            change_roots: "model_roots preload",
            change_sockets: "socket_mode",
            change_limits: "max_connections max_user_leases max_user_bytes max_user_offers max_user_names",
            logs.change: "log_level log_format",
            change_admins: "admins",
        }
        return ReloadOperation(
            self._in_force,
            self._read,
            [
                lambda new: check_budgets(new, served.devices, served.names, store.memories, served.absent),
                lambda new: preloader.check(new.preload),
            ],
            {name: change for change, keys in changes.items() for name in keys.split()},
            again,
            self._notifier.reloading,
        )

    def _told_to_stop(self, number: signal.Signals) -> None:
        self._signal = number
        self._stop.set()

    def _lost_socket(self, error: Exception) -> None:
        self._lost = error
        self._stop.set()


def _uncounted(*_: object) -> None:
    """Where nobody counts."""
