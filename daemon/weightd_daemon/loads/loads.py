"""All loads: shares one flight among waiters for the same files, assigns loaders, and cleans up after failures."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from itertools import count
from typing import TYPE_CHECKING

from weightd._limits import DAEMON, limit_error
from weightd.errors import DeviceError, InUseError, LeaseLostError, ServerError, WeightdError
from weightd.types import SourceFile
from weightd_daemon.core.checkpoint import CheckpointKey
from weightd_daemon.core.events import LoadAnswered, LoadBegun
from weightd_daemon.core.loading import StoreTransaction
from weightd_daemon.loader.source import rested
from weightd_daemon.turns import LoopTurn

from .composing import LoadFromResident
from .fair_queue import LoadQueue
from .flight import InFlightLoad
from .instances import LoadedInstanceIndex
from .loader_pool import LoadProcessPool
from .loader_process import DEFAULT_ARGV
from .quota import LoadQuota
from .reading import LoadFromFiles
from .request import LoadComposition, LoadOutcome, LoadRequest, Prepare
from .verification import LoadVerifications

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from weightd_daemon.core.catalog import Catalog
    from weightd_daemon.core.checkpoint import Checkpoint
    from weightd_daemon.core.events import CheckpointEvicted, Event
    from weightd_daemon.core.limits import UserLimits
    from weightd_daemon.core.store import ContentStore
    from weightd_daemon.devices.device import Device
    from weightd_daemon.devices.reclaimer import DeviceReclaimer

    from .work import LoadWork

log = logging.getLogger(__name__)

MAX_UNFINISHED = 32
"""Loads that one connection may have under way, each with a descriptor of its intake."""
COMPOSING = 2
"""Compositions that are executed at a time, one of each user; the others wait as they came."""
MAX_COMPOSITIONS = 4
"""Compositions that one user may have under way, each with a list of tensors of up to 8 MiB."""

_STOPPING = "the daemon is stopping; load again when it is back"
_UNFINISHED = "the load ended unfinished; load again"

_Key = tuple[str, str, int | None, tuple[SourceFile, ...]]


class Loads:
    """Starts, joins and cancels loads. Every loader inherits `lock`, which says that it may still write."""

    def __init__(
        self,
        *,
        store: ContentStore,
        catalog: Catalog,
        devices: dict[str, Device],
        reclaimers: dict[str, DeviceReclaimer],
        index: LoadedInstanceIndex,
        prepare: Prepare,
        now: Callable[[], float],
        on_event: Callable[[Event], None],
        open_manifest: Callable[[CheckpointKey], int],
        lock: int,
        threads: int,
        fair_queue: LoadQueue,
        limits: UserLimits,
        argv: Sequence[str] = DEFAULT_ARGV,
    ) -> None:
        self._store = store
        self._catalog = catalog
        self._devices = devices
        self._reclaimers = reclaimers
        self._index = index
        self._prepare = prepare
        self._now = now
        self._on_event = on_event
        self._open_manifest = open_manifest
        self.threads = threads
        """With how many threads the next load reads."""
        self._fair_queue = fair_queue
        self._compositions = LoadQueue(COMPOSING, 1)
        """Of its own: a composition takes a moment, and would wait in the other behind loads that take minutes."""
        self._quota = LoadQuota(store, limits)
        self._pool = LoadProcessPool(argv, [lock])
        self._closing = False
        self._numbers = count(1)
        self._flights: dict[_Key, InFlightLoad] = {}
        self._all: set[InFlightLoad] = set()
        self.verifications = LoadVerifications(
            store=store, devices=devices, pool=self._pool, fair_queue=fair_queue, quota=self._quota, now=now
        )
        self._background: set[asyncio.Task[None]] = set()

    @property
    def under_way(self) -> list[InFlightLoad]:
        """Loads that have not ended."""
        return [load for load in self._all if not load.done.done()]

    def find_resident(self, request: LoadRequest) -> Checkpoint | None:
        """The checkpoint that was loaded from exactly these files, if they have not changed since."""
        if request.verify:
            return None
        return self._store.index.loaded_from((request.device, request.who.domain), request.sources)

    def name_and_pin(self, request: LoadRequest, checkpoint: Checkpoint) -> str:
        """Give a resident checkpoint the name and the pin that a request asks for. Returns the name given.

        Errors: PermissionDeniedError, InvalidReferenceError (name), CapacityError (a limit of the user); then it has
        neither, and no name has moved.
        """
        who, name, digest = request.who, request.name, checkpoint.key.content_digest
        if name:
            try:
                self._catalog.check(who, name, digest)
            except WeightdError:
                if not request.name_is_default:
                    raise
                name = ""
        if request.pin:
            self._catalog.pin_loaded(who, checkpoint)
        if name:
            self._catalog.set(who, name, digest, request.peer, is_default=request.name_is_default)
        self._store.use(checkpoint, self._now())
        return name

    def answer(self, request: LoadRequest, checkpoint: Checkpoint) -> str:
        """Answer a load from memory with a resident checkpoint. Returns the name given. Errors: as `name_and_pin`."""
        name = self.name_and_pin(request, checkpoint)
        self.lease_for(request, checkpoint)
        self._on_event(LoadAnswered(checkpoint, request.peer, name))
        return name

    def evicted(self, event: CheckpointEvicted) -> None:
        """A checkpoint had to go for a load, which says so in the end."""
        gone = event.checkpoint
        for load in self._all:
            if load.number == event.load:
                load.went(gone.key.domain, self._catalog.name(gone) or gone.key.content_digest)

    def untaken(self, uid: int | None) -> int:
        """Intakes that a user's loads hold until they have their turn."""
        mine = (load for load in self.under_way if load.request.who.uid == uid and not load.composes)
        return sum(not load.loader_there.is_set() for load in mine)

    def lease_for(self, request: LoadRequest, checkpoint: Checkpoint) -> None:
        """Lease a checkpoint for a waiter until it has attached or left; not for who may not attach, at its limit."""
        waiting = self._store.leases.waiting_of(request.peer.connection)
        kept = any(lease.checkpoint == checkpoint.key for lease in waiting)
        if not request.detached and not kept and self._quota.may_lease(request.who):
            self._store.leases.begin(checkpoint.key, request.peer, self._now(), waiting=True)

    def start(self, request: LoadRequest, intake: int) -> tuple[InFlightLoad, int, bool]:
        """Begin a load or join one of the same files by the same owner.

        Returns the load, the number of this waiter, and whether the client has to feed its descriptors. `intake` is the
        loader's end of the client's offer; a load that begins takes it over. Errors: DrainingError, LeaseLostError (the
        daemon stops), InUseError (too many of this connection).
        """
        self._check_may_begin(request)
        key = (request.device, request.who.domain, request.who.uid, request.sources)
        load = self._flights.get(key)
        joins = load is not None and not load.done.done() and (load.request.verify or not request.verify)
        if load is None or not joins:
            load = InFlightLoad(request, intake, self._now(), self._store.revision)
            self._all.add(load)
            now_ns = int(self._now() * 1e9)
            if all(rested(source.identity, now_ns) for source in request.sources):  # else equal ones may differ
                self._flights[key] = load
            load.task = asyncio.get_running_loop().create_task(self._run(load, self._reading(load), self._fair_queue))
            load.task.add_done_callback(lambda _: self._forget(key, load))
        waiter = next(self._numbers)
        load.join(waiter, request)
        return load, waiter, not joins

    def compose(self, request: LoadRequest, composition: LoadComposition) -> tuple[InFlightLoad, int]:
        """Begin a load of resident tensors. Returns the load and the number of its waiter.

        Its sources are leased from now on, and it has its name and pin in the step that seals it. Errors:
        DrainingError, LeaseLostError (the daemon stops), InUseError (too many of this user), NotFoundError (a source),
        CapacityError (leases), DeviceError.
        """
        self._check_may_begin(request)
        mine = [load for load in self.under_way if load.composes and load.request.who.uid == request.who.uid]
        if len(mine) >= MAX_COMPOSITIONS:
            raise InUseError(f"this user has {MAX_COMPOSITIONS} compositions under way; wait until one is done")
        load = InFlightLoad(request, -1, self._now(), self._store.revision, composes=True)
        who = request.who
        sources = {CheckpointKey(request.device, who.domain, digest) for digest, _ in composition.sources}

        def on_sealed(checkpoint: Checkpoint) -> None:
            self.name_and_pin(request, checkpoint)
            for lease in self._store.leases.waiting_of(request.peer.connection):
                if lease.checkpoint in sources:  # loaded for this, and not to be attached
                    self._store.leases.end(lease.number)
            self._sealed(load, checkpoint)

        work = LoadFromResident(
            load=load, composition=composition, store=self._store, quota=self._quota, prepare=self._prepare,
            open_manifest=self._open_manifest, now=self._now,
            admit=lambda *figures: self._quota.admit(load, self.under_way, *figures),
            before_seal=lambda digest: self._catalog.check(who, request.name, digest) if request.name else None,
            on_sealed=on_sealed,
        )  # fmt: skip
        self._all.add(load)
        load.task = asyncio.get_running_loop().create_task(self._run(load, work, self._compositions))
        load.task.add_done_callback(lambda _: work.release())
        load.task.add_done_callback(lambda _: self._ended(load))
        waiter = next(self._numbers)
        load.join(waiter, request)
        return load, waiter

    def leave(self, load: InFlightLoad, waiter: int) -> None:
        """A waiter is gone. The last one takes the load with it, unless the load is detached."""
        load.leave(waiter)
        if not load.done.done() and not load.detached and not load.waiters:
            load.abandoned = True
            load.cancel(LeaseLostError("the load was cancelled: nobody waits for it any more"))

    def disconnected(self, connection: int) -> None:
        """A connection is gone, and with it those who waited on it."""
        for load, waiter in self._waiters_of(connection):
            if not load.waiters[waiter].detached:
                self.leave(load, waiter)

    def lose(self, device: str, error: DeviceError) -> None:
        """The memory of a device is gone: every load on it ends with this error, and nothing there is verified."""
        self.verifications.lose(device)
        for load in self.under_way:
            if load.request.device == device:
                load.cancel(error)

    def end_all(self, error: WeightdError) -> None:
        """Every load under way ends with this error, and its waiters are told."""
        for load in self.under_way:
            load.cancel(error)

    def cancel_all(self) -> None:
        """The daemon is stopping: every load ends, and its waiters are told."""
        self._closing = True
        self.end_all(LeaseLostError(_STOPPING))

    async def close(self) -> None:
        """Cancel everything and wait for the loaders to be gone; a loader that cannot die is left to the kernel."""
        self.cancel_all()
        await self._pool.close()
        await self.verifications.close()
        for task in [*self._background, *(load.task for load in self._all)]:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    # -- inside ----------------------------------------------------------------------------------------------------

    def _waiters_of(self, connection: int) -> list[tuple[InFlightLoad, int]]:
        return [
            (load, waiter)
            for load in self.under_way
            for waiter, request in load.waiters.items()
            if request.peer.connection == connection
        ]

    def _check_may_begin(self, request: LoadRequest) -> None:
        if self._closing:
            raise LeaseLostError(_STOPPING)
        self._store.leases.admit()
        if len(self._waiters_of(request.peer.connection)) >= MAX_UNFINISHED:
            raise InUseError(f"this connection has {MAX_UNFINISHED} loads under way; wait until one is done")

    def _ended(self, load: InFlightLoad) -> None:
        load.close_intake()  # a task that is cancelled before its first step never ran
        load.fail(LeaseLostError(_UNFINISHED))
        self._all.discard(load)

    def _forget(self, key: _Key, load: InFlightLoad) -> None:
        self._ended(load)
        if self._flights.get(key) is load:
            del self._flights[key]

    def _reading(self, load: InFlightLoad) -> LoadFromFiles:
        return LoadFromFiles(
            load=load, store=self._store, devices=self._devices, reclaimers=self._reclaimers, index=self._index,
            prepare=self._prepare, now=self._now, threads=self.threads, pool=self._pool,
            admit=lambda *figures: self._quota.admit(load, self.under_way, *figures),
            on_sealed=lambda checkpoint: self._sealed(load, checkpoint),
        )  # fmt: skip

    def _sealed(self, load: InFlightLoad, checkpoint: Checkpoint) -> None:
        load.announced = 0
        checkpoint.reference = checkpoint.reference or load.request.reference
        # Law 4: each waiter gets its lease in this very step, before anything else runs that might evict.
        for waiting in load.waiters.values():
            self.lease_for(waiting, checkpoint)
        self._catalog.changed()

    async def _run(self, load: InFlightLoad, work: LoadWork, queue: LoadQueue) -> None:
        request = load.request
        loading: StoreTransaction | None = None
        begun: LoadBegun | None = None
        clock = asyncio.get_running_loop().time  # wall time may be stepped meanwhile
        began = clock()
        try:
            loading = StoreTransaction(
                self._store, request.device, request.who.domain, request.who.uid, request.peer, request.name
            )
            load.number = loading.number
            self._store.revision.move()
            begun = LoadBegun(loading.number, request.peer, request.device, request.who.domain, request.name)
            self._on_event(begun)
            async with queue.turn(request.who.uid):
                checkpoint, outcome = await work.run(loading)
                self._finish(load, checkpoint, outcome)
        except WeightdError as error:
            load.fail(error)
        except asyncio.CancelledError:
            pass  # by `leave` or `close`, which have told the waiters
        except Exception as error:  # a bug must fail its load, not hang its waiters
            limit = limit_error(error, "loading", DAEMON) if isinstance(error, OSError) else None
            if limit is None:
                log.exception("load failed by a bug")
            load.fail(limit or ServerError("the load failed by a bug in the daemon; its log has the details"))
        finally:
            load.close_intake()
            load.fail(LeaseLostError(_UNFINISHED))  # whatever ended it, nobody waits without end
            if loading is not None and begun is not None:
                task = asyncio.get_running_loop().create_task(_tidy(work, loading))
                self._background.add(task)
                task.add_done_callback(self._background.discard)
                self._on_event(load.ended(begun, clock() - began))

    def _finish(self, load: InFlightLoad, checkpoint: Checkpoint, outcome: LoadOutcome) -> None:
        for request in load.waiters.values():
            if request.detached and not load.composes:  # which has its name since it was sealed
                try:
                    self.name_and_pin(request, checkpoint)
                except WeightdError as error:
                    log.warning("detached load stays without its name %s: %s", request.name, error.message)
        load.succeed(checkpoint, outcome._replace(evicted=tuple(load.evicted), evicted_others=load.evicted_others))


async def _tidy(work: LoadWork, loading: StoreTransaction) -> None:
    """End a load little by little, once nothing of its memory is open elsewhere."""
    await work.let_go(loading)
    turn = LoopTurn()
    for _ in loading.ending():
        if turn.is_over:
            await turn.next()
    await work.forget()
