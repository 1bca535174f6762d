"""Absent devices: tries them again, and has those that can be served take over what is kept of them.

A device is taken up in the same way at the start and later. Its checkpoints are in the books by then: their manifests
were checked against the root record and the sizes of their segments (persistence/restore.py). Here its UUID and kind
are checked, every segment is imported, and the driver is asked where each lies. If anything fails, everything stays as
it is, and the device stays absent. The root record has nothing to say about it: its rows are the same before and after.
"""

from __future__ import annotations

import asyncio
import logging
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, cast

from weightd.errors import DeviceError, WeightdError
from weightd_daemon.config.settings import ConfigError
from weightd_daemon.core.events import DeviceAbsent, DeviceBack
from weightd_daemon.devices.absent import AbsentDevice, StandInDevice
from weightd_daemon.devices.budgets import books_of, budget_of, pool_of
from weightd_daemon.devices.driver_thread import answered
from weightd_daemon.log_line import Line

from .model_roots import on_thread

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from weightd_daemon.config.settings import Settings
    from weightd_daemon.core.events import Event
    from weightd_daemon.core.store import ContentStore
    from weightd_daemon.devices.absent import TakesOver
    from weightd_daemon.devices.cuda_opening import ServedGpu
    from weightd_daemon.devices.device import Calls, Device
    from weightd_daemon.devices.reclaimer import DeviceReclaimer
    from weightd_daemon.devices.served import Devices
    from weightd_daemon.persistence.gpu_nodes import GpuNodes

log = logging.getLogger(__name__)

FIRST_SECONDS, MOST_SECONDS = 5.0, 60.0
"""How long after a device was found absent it is tried again: at first, and at most."""

END_SECONDS = 1.0
"""How long a device that was closed is waited for before it is opened again; else that is for the next try."""
_IMPORTS = "cuMemImportFromShareableHandle"
_UNCLOSED = "it does not answer: what was opened of it has yet to be closed"
GIVEN_UP = "it was let go of (`weightd drain --forget`); reload the settings (SIGHUP) or restart to serve it again"


class _Closed(NamedTuple):
    """The thread of a device that was closed, and why it is absent if that thread does not end."""

    calls: Calls
    why: str


class AbsentDevices:
    """The devices that cannot be served now. `settings` are those in force.

    On the thread of the loop; what may hang runs on a thread of its own.
    """

    def __init__(
        self,
        settings: Settings,
        served: Devices,
        store: ContentStore,
        reclaimers: Mapping[str, DeviceReclaimer],
        nodes: GpuNodes,
        on_event: Callable[[Event], None],
    ) -> None:
        self.settings = settings
        self._served = served
        self._store = store
        self._reclaimers = reclaimers
        self.nodes = nodes
        """The device files of those that serve."""
        self._on_event = on_event
        self._let_go: set[str] = set()
        """Absent devices that were forgotten: these are tried again when somebody asks, not by themselves."""
        self._closed: dict[str, _Closed] = {}
        """The last device of each UUID that was closed, which its driver may keep from its end."""
        self._hurry: dict[str, asyncio.Event] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._came: Callable[[], None] = lambda: None
        store.absent.update({uuid: absent.words for uuid, absent in served.absent.items()})
        for uuid, device in served.devices.items():
            device.calls.on_change = partial(self.look, uuid)

    async def begin(self) -> None:
        """Have the devices that were opened at the start take over what is kept, and tell of those that are absent."""
        served = self._served
        for uuid, gpu in list(served.arriving.items()):
            await self._arrive(uuid, gpu)
            served.arriving.pop(uuid)
        for absent in served.absent.values():
            self._tell(absent)
        for uuid in served.devices.keys() - served.absent.keys():
            self.nodes.keep(uuid)

    def serve(self, came: Callable[[], None]) -> None:
        """Try again, from now on, what the settings name and is absent. `came` is told that a device serves."""
        self._came = came
        for uuid, absent in self._served.absent.items():
            if absent.said:
                self._try_later(uuid)

    def hurry(self, settings: Settings | None = None) -> None:
        """Try every device now that the settings name, also one that was let go of. They may be other settings."""
        self.settings = settings or self.settings
        self._let_go.clear()
        for event in self._hurry.values():
            event.set()

    def serves(self, uuid: str) -> bool:
        """Whether a device serves, be it that it does not answer at the moment."""
        return uuid not in self._served.absent

    def look(self, uuid: str) -> None:
        """A device no longer answers, or answers again: until it does, it is absent, and takes up nothing anew."""
        self._reclaimers[uuid].notify()
        if uuid in self._served.absent or uuid in self._store.leaving:
            return
        problem, was = self._served.devices[uuid].calls.problem, self._store.absent.get(uuid, "")
        if problem != was:
            self._store.set_absent(uuid, problem)
        if problem and not was:
            self._on_event(DeviceAbsent(uuid, problem))
        elif was and not problem:
            self._on_event(DeviceBack(uuid))
            self._came()

    def depart(self, uuid: str) -> str:
        """A device of which nothing is left is to be absent until somebody wants it back. Returns why it is absent.

        For one that the settings do not name, that is what it was.
        """
        served = self._served
        was = served.absent.get(uuid)
        if was is not None and not was.said:
            return was.words
        self._let_go.add(uuid)
        if was is not None:
            served.absent[uuid] = AbsentDevice(uuid, was.index, None, GIVEN_UP)
            return GIVEN_UP
        device = served.devices[uuid]
        served.devices[uuid] = stand_in = StandInDevice(uuid, device.kind)
        self._reclaimers[uuid].device = stand_in
        self._close(device)
        index = next((int(name[5:]) for name in served.names[uuid] if name.startswith("cuda:")), None)
        served.absent[uuid] = AbsentDevice(uuid, index, None, GIVEN_UP)
        self._tell(served.absent[uuid])
        self._try_later(uuid)
        return GIVEN_UP

    async def close(self) -> None:
        """The daemon stops."""
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    # -- inside --------------------------------------------------------------------------------------------------------

    def _tell(self, absent: AbsentDevice) -> None:
        log.warning(Line("device absent", {"device": absent.uuid}, because=absent.reason))
        self._on_event(DeviceAbsent(absent.uuid, absent.reason))

    def _try_later(self, uuid: str) -> None:
        if uuid not in self._tasks or self._tasks[uuid].done():  # else it goes on by itself
            self._hurry[uuid] = asyncio.Event()
            self._tasks[uuid] = asyncio.get_running_loop().create_task(self._keep_trying(uuid))

    async def _keep_trying(self, uuid: str) -> None:
        hurry, seconds = self._hurry[uuid], FIRST_SECONDS
        while uuid in self._served.absent:
            try:
                async with asyncio.timeout(None if uuid in self._let_go else seconds):
                    await hurry.wait()
                seconds = FIRST_SECONDS
            except TimeoutError:
                if uuid in self._let_go:  # meanwhile
                    continue
                seconds = min(MOST_SECONDS, 2 * seconds)
            hurry.clear()
            try:
                await self._try(uuid)
            except Exception as error:  # a bug must not end the tries
                log.exception("device %s was not tried again by a bug", uuid)
                self._stays(
                    uuid, f"it cannot be taken up by a bug ({type(error).__name__}); the daemon's log says more"
                )

    async def _try(self, uuid: str) -> None:
        absent, closed = self._served.absent[uuid], self._closed.get(uuid)
        if closed is not None and not await on_thread(partial(closed.calls.join, END_SECONDS)):
            self._stays(uuid, closed.why)  # it hangs: no try is to add a thread that does
            return
        self._closed.pop(uuid, None)
        kept = {uuid: device.kind for uuid, device in self._served.devices.items() if self._holds(uuid)}
        attempt = partial(self._served.open_again, absent, kept)
        try:
            gpu = await on_thread(attempt)  # it calls the driver, which may hang
        except (WeightdError, ConfigError) as error:
            self._stays(uuid, str(error))
            return
        await self._arrive(uuid, gpu)
        if uuid not in self._served.absent:
            self._came()

    async def _arrive(self, uuid: str, gpu: ServedGpu) -> None:
        """Have a device take over what its stand-in holds, or close it and say why not."""
        device, stand_in, store = gpu.device, self._served.devices[uuid], self._store
        assert isinstance(stand_in, StandInDevice)  # until it is replaced below
        try:
            if device.uuid != uuid or (self._holds(uuid) and device.kind != stand_in.kind):
                raise DeviceError(f"what was opened is {device.uuid}, shared as {device.kind}")
            imported = await self._import(device, stand_in)
        except (WeightdError, OSError) as error:
            why = device.calls.problem.partition(";")[0] or str(error)  # what becomes of it is said by `AbsentDevice`
            self._close(device, why)
            self._stays(uuid, why)
            return
        except BaseException:  # a bug, or the end of the daemon
            self._close(device)
            raise
        await self._reclaimers[uuid].finish()  # what is being released is the stand-in's to release
        try:
            budget = budget_of(self.settings, device, gpu.names)  # SIGHUP may have changed it meanwhile
        except ConfigError as error:
            budget = 0
            self._stays(uuid, str(error))
        if self._is_let_go(uuid) or not budget:
            if imported:
                cast("TakesOver", device).give_up(imported)
            self._close(device)
            return
        # From here to the end nothing else runs: the device is the stand-in's in each place at once.
        if imported or not stand_in.is_empty:
            cast("TakesOver", device).take_over(stand_in, imported)
        served, memory = self._served, store.memories[uuid]
        served.devices[uuid], served.names[uuid] = device, gpu.names
        self._reclaimers[uuid].device = device
        device.calls.on_change = partial(self.look, uuid)
        self.nodes.keep(uuid)
        memory.change_page(device.page)
        memory.resize(budget, pool_of(self.settings, device, budget))
        del served.absent[uuid]
        store.set_absent(uuid, "")
        store.books.limit = books_of(self.settings, {uuid: memory.budget for uuid, memory in store.memories.items()})
        if uuid in self._tasks:  # else nobody was told that it is absent
            there = {"device": uuid, "kind": device.kind, "budget": budget, "checkpoints": len(store.on_device(uuid))}
            log.info(Line("device back", there))
            if device.note:
                log.warning("device %s is %s", uuid, device.note)
            self._on_event(DeviceBack(uuid))
        for _ in store.fit(uuid):
            await asyncio.sleep(0)
        if excess := memory.excess():
            log.warning("device %s: %d bytes more than its budget are leased or pinned, and stay", uuid, excess)

    def _close(self, device: Device, why: str = _UNCLOSED) -> None:
        """Close a device that was opened, and note `why` it cannot be opened again as long as that takes."""
        device.close()
        self._closed[device.uuid] = _Closed(device.calls, why)

    def _is_let_go(self, uuid: str) -> bool:
        """Whether an absent device is to take nothing over, even if a try is under way."""
        return uuid in self._store.leaving or uuid in self._let_go

    def _holds(self, uuid: str) -> bool:
        """Whether anything is kept of a device that is absent."""
        device = self._served.devices[uuid]
        return isinstance(device, StandInDevice) and not (device.is_empty and not self._store.on_device(uuid))

    async def _import(self, device: Device, stand_in: StandInDevice) -> dict[int, object]:
        if stand_in.is_empty:
            return {}
        taking = cast("TakesOver", device)
        return await answered(device.calls, _IMPORTS, partial(taking.import_held, stand_in), taking.release_imported)

    def _stays(self, uuid: str, reason: str) -> None:
        """A device is absent still; the reason may be another one."""
        absent = self._served.absent[uuid]
        if self._is_let_go(uuid) or absent.reason == reason:
            return
        absent = AbsentDevice(uuid, absent.index, absent.kind, reason, said=absent.said)
        self._served.absent[uuid] = absent
        self._store.set_absent(uuid, absent.words)
        if uuid in self._tasks:  # else it is told of in a moment
            log.info(Line("device still absent", {"device": uuid}, because=reason))
