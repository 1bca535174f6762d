"""The thread of a GPU's driver, and what waits for it: a call that hangs stops nobody else, and leaves nothing."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import pytest

from weightd.errors import DeviceAbsentError, DeviceError
from weightd_daemon.core.arena import Extent
from weightd_daemon.core.lease import LeaseTable
from weightd_daemon.core.loading import StoreTransaction
from weightd_daemon.core.memory import MemoryAccounting
from weightd_daemon.core.store import ContentStore
from weightd_daemon.devices import driver_thread
from weightd_daemon.devices.driver_thread import DriverThread, answered
from weightd_daemon.devices.reclaimer import DeviceReclaimer

PAGE = 4096


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver_thread, "ANSWER_SECONDS", 0.05)


def run(steps: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(steps, 60))


class Hanging:
    """A call that hangs until the test lets it go on."""

    def __init__(self) -> None:
        self.begun, self.goes_on = threading.Event(), threading.Event()

    def __call__(self) -> None:
        self.begun.set()
        assert self.goes_on.wait(60)


class Gpu:
    """A GPU with a driver that can hang in `create` and `release`."""

    uuid, kind, sparse, page = "GPU-0", "cuda_vmm", False, PAGE
    creates_by, releases_by = "cuMemCreate", "cuMemRelease"

    def __init__(self) -> None:
        self.calls = DriverThread(self.uuid)
        self.creating: Callable[[], object] = lambda: None
        self.releasing: Callable[[], object] = lambda: None
        self.created = 0
        self.segments: set[int] = set()

    def create(self, size: int) -> int:
        self.creating()
        self.created += 1
        self.segments.add(self.created)
        return self.created

    def release(self, segment: int) -> None:
        self.releasing()
        self.segments.remove(segment)


class Desk:
    """The books of a GPU, and what carries out what they ask for."""

    def __init__(self, budget: int = 4) -> None:
        self.gpu: Any = Gpu()
        self.reclaimer = DeviceReclaimer(self.gpu)
        self.store = ContentStore(leases=LeaseTable(lambda _: False), on_event=lambda _: None)
        self.memory = self.store.memories["GPU-0"] = MemoryAccounting(
            budget=budget * PAGE, page=PAGE, sparse=False, pool_limit=0, create=self.reclaimer.maker.create,
            on_reclaim=self.reclaimer.kick,
        )  # fmt: skip
        self.reclaimer.watch(self.memory)
        self.gpu.calls.on_change = self.reclaimer.notify

    def open(self) -> StoreTransaction:
        return StoreTransaction(self.store, "GPU-0", "all", 1000)

    async def granted(self, load: StoreTransaction, size: int) -> Extent:
        """As a load's dialogue does it."""
        while (extent := load.grant(size, size)) is None:
            await self.reclaimer.wait()
        return extent


async def change_of(thread: DriverThread) -> None:
    """Wait until the device does not answer any more, or answers again."""
    changed, before = asyncio.Event(), thread.on_change

    def on_change() -> None:
        before()
        changed.set()

    thread.on_change = on_change
    await changed.wait()
    thread.on_change = before


async def begun(hanging: Hanging) -> None:
    await asyncio.to_thread(hanging.begun.wait, 60)


def test_steps_are_taken_in_order_on_one_thread_and_their_errors_reach_who_waits() -> None:
    async def steps() -> None:
        thread, taken = DriverThread("GPU-0"), list[int]()

        def broken() -> None:
            raise DeviceError("cuMemCreate failed")

        waiting: list[Awaitable[Any]] = [thread.run("a", lambda n=n: taken.append(n)) for n in range(5)]
        await asyncio.gather(*waiting, thread.run("b", lambda: taken.append(threading.get_ident())))
        assert taken[:5] == [0, 1, 2, 3, 4]
        with pytest.raises(DeviceError, match="cuMemCreate failed"):
            await thread.run("c", broken)
        assert thread.wait_for("d", threading.get_ident) == taken[5] != threading.get_ident()
        with pytest.raises(DeviceError, match="cuMemCreate failed"):
            thread.wait_for("e", broken)
        thread.stop()

    run(steps())


def test_a_device_whose_call_hangs_does_not_answer_until_the_call_comes_back() -> None:
    async def steps() -> None:
        thread, hanging = DriverThread("GPU-0"), Hanging()
        call = asyncio.ensure_future(thread.run("cuMemCreate", hanging))
        behind = asyncio.ensure_future(thread.run("cuMemRelease", lambda: "released"))
        thread.check()
        await change_of(thread)
        with pytest.raises(DeviceAbsentError, match=r"GPU-0 is absent: it does not answer since \d\d:.*, in cuMemCre"):
            thread.check()
        call.cancel()  # whoever waited has left
        hanging.goes_on.set()
        await change_of(thread)
        thread.check()
        assert await behind == "released"

    run(steps())


def test_many_quick_calls_in_a_row_are_no_hanging_one() -> None:
    async def steps() -> None:
        thread, pause = DriverThread("GPU-0"), threading.Event()
        told: list[str] = []
        thread.on_change = lambda: told.append(thread.problem)
        # Together far longer than one may take.
        await asyncio.gather(*(thread.run("cuMemRelease", lambda: pause.wait(0.002)) for _ in range(100)))
        assert told == []

    run(steps())


def test_a_load_waits_for_its_segment_and_the_loop_does_not() -> None:
    async def steps() -> None:
        desk, hanging, driver_thread.ANSWER_SECONDS = Desk(), Hanging(), 60.0
        desk.gpu.creating = hanging
        load, other = desk.open(), desk.open()
        waiting = [asyncio.ensure_future(desk.granted(one, PAGE)) for one in (load, other)]
        await begun(hanging)
        assert (desk.memory.used, desk.memory.in_flight, desk.memory.segments) == (2 * PAGE, 2 * PAGE, 0)
        hanging.goes_on.set()
        first, second = await asyncio.gather(*waiting)
        assert (first, second) == (Extent(1, 0, PAGE), Extent(2, 0, PAGE)), "each has its own"
        load.end()
        other.end()
        await desk.reclaimer.finish()
        assert (desk.memory.used, desk.gpu.segments) == (0, set())

    run(steps())


def test_while_the_gpu_does_not_answer_a_load_fails_and_what_comes_late_goes_back() -> None:
    async def steps() -> None:
        desk, hanging = Desk(), Hanging()
        desk.gpu.creating = hanging
        load = desk.open()
        with pytest.raises(DeviceAbsentError, match=r"does not answer since .*, in cuMemCreate"):
            await desk.granted(load, PAGE)
        load.end()
        assert desk.memory.used == PAGE, "it may be made by now"
        late = desk.open()
        with pytest.raises(DeviceAbsentError, match=r"does not answer since .*, in cuMemCreate"):
            await desk.granted(late, PAGE)
        late.end()
        with pytest.raises(DeviceAbsentError):
            await desk.reclaimer.finish()
        await desk.reclaimer.stop()  # which no hanging call keeps from its end
        hanging.goes_on.set()
        await change_of(desk.gpu.calls)
        await desk.reclaimer.finish()
        assert (desk.memory.used, desk.gpu.segments) == (0, set())
        assert desk.gpu.created == 1, "nothing is made that nobody wants any more"
        assert await desk.granted(desk.open(), PAGE) == Extent(2, 0, PAGE)

    run(steps())


def test_who_waits_for_memory_that_is_being_released_hears_that_the_gpu_does_not_answer() -> None:
    async def steps() -> None:
        desk, hanging = Desk(budget=1), Hanging()
        load = desk.open()
        await desk.granted(load, PAGE)
        desk.gpu.releasing = hanging
        load.end()
        other = desk.open()
        with pytest.raises(DeviceAbsentError, match="in cuMemRelease"):
            await desk.granted(other, PAGE)
        hanging.goes_on.set()
        await change_of(desk.gpu.calls)
        assert await desk.granted(other, PAGE) == Extent(2, 0, PAGE)

    run(steps())


def test_a_segment_that_is_made_while_its_memory_is_lost_is_released() -> None:
    async def steps() -> None:
        desk, hanging, driver_thread.ANSWER_SECONDS = Desk(), Hanging(), 60.0
        desk.gpu.creating = hanging
        waiting = asyncio.ensure_future(desk.granted(desk.open(), PAGE))
        await begun(hanging)
        desk.store.lose("GPU-0", "its holder has ended")
        assert (desk.memory.used, desk.memory.creating) == (0, False)
        after = asyncio.ensure_future(desk.granted(desk.open(), PAGE))
        hanging.goes_on.set()
        with pytest.raises(DeviceError, match="its holder has ended"):
            await waiting
        assert await after == Extent(2, 0, PAGE)
        await desk.gpu.calls.run("", lambda: None)  # behind the release
        assert desk.gpu.segments == {2}

    run(steps())


def test_a_full_gpu_is_asked_for_less_and_says_so_in_the_end() -> None:
    async def steps() -> None:
        desk, sizes = Desk(budget=8), list[int]()
        create = desk.gpu.create

        def full(size: int) -> int:
            sizes.append(size // PAGE)
            if size > 2 * PAGE:
                raise MemoryError("GPU-0 is full")
            return create(size)

        desk.gpu.create = full
        load = desk.open()
        while (extent := load.grant(8 * PAGE, PAGE)) is None:
            await desk.reclaimer.wait()
        assert (extent.length, sizes) == (2 * PAGE, [8, 4, 2])
        with pytest.raises(Exception, match="GPU-0 is full"):
            await desk.granted(load, 3 * PAGE)
        assert desk.memory.used == 2 * PAGE

    run(steps())


def test_a_device_that_hangs_while_it_is_taken_up_keeps_nobody_waiting_and_nothing_of_it_stays() -> None:
    async def steps() -> None:
        thread, hanging, undone = DriverThread("GPU-0"), Hanging(), list[str]()
        with pytest.raises(DeviceAbsentError, match="in cuMemImport"):
            await answered(thread, "cuMemImport", lambda: hanging() or "imported", undone.append)
        hanging.goes_on.set()
        thread.stop()
        assert thread._thread is not None
        await asyncio.to_thread(thread._thread.join, 60)
        assert undone == ["imported"]

        thread = DriverThread("GPU-0")
        assert await answered(thread, "cuMemImport", lambda: "imported", undone.append) == "imported"
        with pytest.raises(ZeroDivisionError):
            await answered(thread, "cuMemImport", lambda: 1 / 0, undone.append)
        assert undone == ["imported"]

    run(steps())
