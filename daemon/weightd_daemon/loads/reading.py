"""A load of files: a loader process reads them, and a dialogue answers it from the store."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from weightd import _failpoints
from weightd.errors import LeaseLostError, WeightdError
from weightd_daemon import heap
from weightd_daemon.core.making_room import Evictor
from weightd_daemon.loader.channel import UNFIT
from weightd_daemon.log_line import Line

from .dialogue import LoadDialogue
from .loader_memory import LoaderMemory
from .loader_pool import LEAVE_SECONDS
from .loader_process import LoadProcess, LoadProcessDiedError
from .messages import load_job

if TYPE_CHECKING:
    from collections.abc import Callable

    from weightd_daemon.core.checkpoint import Checkpoint
    from weightd_daemon.core.loading import StoreTransaction
    from weightd_daemon.core.store import ContentStore
    from weightd_daemon.devices.device import Device
    from weightd_daemon.devices.reclaimer import DeviceReclaimer

    from .flight import InFlightLoad
    from .instances import LoadedInstanceIndex
    from .loader_pool import LoadProcessPool
    from .request import LoadOutcome, Prepare

log = logging.getLogger(__name__)


class LoadFromFiles:
    """Executes a load of files with a loader of the pool, and brings that home."""

    def __init__(
        self,
        *,
        load: InFlightLoad,
        store: ContentStore,
        devices: dict[str, Device],
        reclaimers: dict[str, DeviceReclaimer],
        index: LoadedInstanceIndex,
        prepare: Prepare,
        now: Callable[[], float],
        threads: int,
        pool: LoadProcessPool,
        admit: Callable[[int, int, int, str], None],
        on_sealed: Callable[[Checkpoint], None],
    ) -> None:
        self._load = load
        self._store = store
        self._devices = devices
        self._reclaimers = reclaimers
        self._index = index
        self._prepare = prepare
        self._now = now
        self._threads = threads
        self._pool = pool
        self._admit = admit
        self._on_sealed = on_sealed
        self._loader: LoadProcess | None = None
        self._usable = False
        """Whether the loader can serve another load."""
        self._steps: LoadDialogue | None = None

    async def run(self, loading: StoreTransaction) -> tuple[Checkpoint, LoadOutcome]:
        """Have a loader read the files, up to the seal. Errors: those of the file, CapacityError, LeaseLostError."""
        load, request = self._load, self._load.request
        device, reclaimer = self._devices[request.device], self._reclaimers[request.device]
        steps = self._steps = LoadDialogue(
            store=self._store, device=device, reclaimer=reclaimer, index=self._index, prepare=self._prepare,
            loading=loading, sources=request.sources, verify=request.verify, now=self._now, admit=self._admit,
            on_files=load.files_there.set, on_progress=load.report, on_sealed=self._on_sealed,
            make_room=LoaderMemory(
                room=Evictor(self._store, loading.place, loading.number, request.peer), device=device,
                memory=self._store.memories[request.device], reclaimer=reclaimer, pool=self._pool,
            ).make_room,
        )  # fmt: skip
        try:
            self._loader = loader = await self._pool.acquire()
            _failpoints.reach("load.job")
            await loader.send(load_job(request, device, self._threads))
            await loader.send_descriptor(load.intake)
            load.close_intake()
            load.loader_there.set()
            outcome = await steps.serve(loader)
        except WeightdError as error:
            self._usable = not isinstance(error, UNFIT)
            raise
        except LoadProcessDiedError:
            log.warning(Line("loader died", {"pid": self._loader.pid if self._loader else None}))
            raise LeaseLostError("the loader process of this load died; nothing was kept, load again") from None
        assert steps.checkpoint is not None  # serve returns when it is sealed
        self._usable = True
        return steps.checkpoint, outcome

    async def let_go(self, loading: StoreTransaction) -> None:
        """Bring the loader home: no memory goes back before nothing has it open any more."""
        loader = self._loader
        if loader is None or (self._usable and await self._pool.put_back(loader)):
            return
        loader.kill()
        await asyncio.wait([loader.exited], timeout=LEAVE_SECONDS)
        if not loader.exited.done():
            log.warning(Line("loader", {"pid": loader.pid}, "does not die; its memory stays in quarantine"))
            loading.quarantine()
        await asyncio.shield(loader.exited)

    async def forget(self) -> None:
        """Let go of the list of tensors."""
        if self._steps is not None:
            await self._steps.forget()
            heap.freed(self._steps.books)
