"""A device that cannot be served: what stands in for it, what is carried on, and how it takes everything up again.

On the double of the driver in this process; the errors of the driver, call by call, are tests/systemd's
(test_driver_errors.py).
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from support import fakecuda
from support.descriptors import open_descriptors
from support.kept_gpu import MIB, WHO, Keeper, Start
from weightd._mapping import cuda_driver
from weightd.errors import DeviceAbsentError, DeviceError, InUseError
from weightd_daemon.config.settings import Settings, TemporaryConfigError
from weightd_daemon.core.catalog import CatalogTag
from weightd_daemon.core.lease import LeasePeer
from weightd_daemon.devices import cuda_vmm, driver_thread, served
from weightd_daemon.devices.absent import AbsentDevice, StandInDevice
from weightd_daemon.devices.cuda_choice import Choice
from weightd_daemon.devices.cuda_opening import ServedGpu
from weightd_daemon.devices.cuda_vmm import CudaVmmDevice
from weightd_daemon.operations import absence

GPU = fakecuda.uuid(0)
OTHER = "GPU-cccc0000-0000-0000-0000-000000000000"
DATA = {name: {f"t{i}": bytes([ord(name), i]) * (MIB // 4) for i in range(4)} for name in "ab"}
PEER = LeasePeer(1, 2, 1000, "python")
AWAY = "cuInit:802"


@pytest.fixture
def keeper(fake_driver: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Keeper]:
    """What a daemon has left that held "a" and "b" on the GPU, in a segment each, and "h" in host memory."""

    async def leave(made: Keeper) -> None:
        async with Start.of(made, device="host,cuda") as start:
            for name, tensors in DATA.items():
                await start.load(name, GPU, tensors)
            await start.load("h", "host", {"t": b"h" * 4096})
            start.catalog.pin(WHO, start.catalog.find(WHO, "a"))
            start.catalog.restore("", "dangling", CatalogTag("sha256:" + "0" * 64, 7))

    monkeypatch.setenv("FAKECUDA_FAIL", "")
    first, made = Keeper(), Keeper()
    asyncio.run(leave(first))
    first.close()
    before = len(open_descriptors())  # with what the libraries open the first time, and keep
    asyncio.run(leave(made))
    made.dropped.clear()
    yield made
    made.close()
    assert fakecuda.device_bytes(0) == 0
    assert len(open_descriptors()) == before, "descriptors are left open"


Body = Callable[[Start], Coroutine[Any, Any, None]]


def started(keeper: Keeper, body: Body, *, device: str = "host,cuda") -> None:
    """Start on what is kept, do something, and be killed."""

    async def run() -> None:
        async with Start.of(keeper, device=device) as start:
            await body(start)

    asyncio.run(run())


async def everything_is_there(start: Start) -> None:
    assert start.store.absent == {}
    for name, tensors in DATA.items():
        assert start.bytes_of(name) == list(tensors.values())
    assert start.catalog.find(WHO, "a").pins == {WHO.uid}


def rows_of_gpu(keeper: Keeper) -> dict[str, list[str]]:
    """What the root record says of the GPU, and all names."""
    return {table: [row for row in rows if GPU in row or table == "names"] for table, rows in keeper.rows().items()}


def test_what_is_kept_is_carried_through_changes_and_new_bases(keeper: Keeper, monkeypatch: pytest.MonkeyPatch) -> None:
    before = rows_of_gpu(keeper)
    monkeypatch.setattr("weightd_daemon.persistence.root_record._LEAST_LOG", 1 << 10)

    async def change(start: Start) -> None:
        bases = set()
        for number in range(40):
            tag = CatalogTag("sha256:" + f"{number:064x}", 7)
            start.catalog.restore("", f"name{number}", tag)
            start.descriptor_store.flip()
            root = start.descriptor_store._record.root
            assert root is not None
            bases.add(root.sequence)
            assert {*before["checkpoints"]} == {*rows_of_gpu(keeper)["checkpoints"]}
            assert {*before["segments"]} == {*rows_of_gpu(keeper)["segments"]}
        assert len(bases) > 1, "a new base was written while it is absent"

    monkeypatch.setenv("FAKECUDA_FAIL", AWAY)
    for _ in range(2):
        started(keeper, change)
    assert {*before["names"]} <= {*rows_of_gpu(keeper)["names"]}
    assert keeper.dropped == []
    monkeypatch.setenv("FAKECUDA_FAIL", "")
    started(keeper, everything_is_there)


def test_the_books_are_as_true_as_before_and_nothing_is_granted_or_evicted(
    keeper: Keeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def look(start: Start) -> None:
        memory, found = start.store.memories[GPU], start.catalog.find(WHO, "b")
        assert (memory.used, memory.segments, start.store.live_bytes(GPU)) == (4 * MIB, 2, 4 * MIB)
        while start.store.sharing.go_on():
            pass
        exclusive = start.store.sharing.exclusive_bytes(found)
        assert (found.total_bytes, found.tensor_count, exclusive) == (2 * MIB, 4, 2 * MIB)
        assert [state for _, _, state in start.catalog.listed(WHO)] == ["absent", "absent", "evicted", "resident"]
        with pytest.raises(DeviceAbsentError, match=f"device {GPU} is absent: .*SYSTEM_NOT_READY.*; what is kept on"):
            await start.load("c", GPU, {"t": b"c" * MIB})
        assert list(start.store.evictable(GPU)) == []
        assert list(start.store.fit(GPU)) == []
        start.store.books.limit = 1
        assert list(start.store.fit_books()) == [None]
        assert [checkpoint.key.device for checkpoint in start.store.checkpoints.values()] == [GPU, GPU]

    monkeypatch.setenv("FAKECUDA_FAIL", AWAY)
    started(keeper, look)


def test_leases_are_found_and_hold_what_they_hold(keeper: Keeper, monkeypatch: pytest.MonkeyPatch) -> None:
    locks: list[int] = []

    async def lease(start: Start) -> None:
        key = start.catalog.find(WHO, "b").key
        locks.append(start.locks.lock(key, start.store.leases.begin(key, PEER, 6.0).number, None).manifest)

    async def held(start: Start) -> None:
        with pytest.raises(InUseError):
            start.catalog.remove(WHO, "b")
        os.close(locks.pop())
        assert start.catalog.remove(WHO, "b") == 2 * MIB
        await start.reclaimers[GPU].finish()
        assert fakecuda.device_bytes(0) == 2 * MIB

    started(keeper, lease)
    monkeypatch.setenv("FAKECUDA_FAIL", AWAY)
    started(keeper, held)
    assert [name[:3] for name in keeper.dropped] == ["man", "seg"], "in the order of the laws"
    monkeypatch.setenv("FAKECUDA_FAIL", "")

    async def see(start: Start) -> None:
        assert start.bytes_of("a") == list(DATA["a"].values())
        assert len(start.store.checkpoints) == 2

    started(keeper, see)


@pytest.mark.parametrize("device", ["cuda:0", "auto"])
def test_another_uuid_at_its_number_is_another_device(
    keeper: Keeper, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    async def see(start: Start) -> None:
        assert {*start.store.absent} == {GPU} | ({"host"} if device == "cuda:0" else set())
        assert f"it shows cuda:0 ({OTHER})" in start.store.absent[GPU]
        assert start.served.default == (OTHER if device == "cuda:0" else "")
        await start.load("c", OTHER, {"t": b"c" * MIB})

    with monkeypatch.context() as patch:
        patch.setattr(cuda_driver, "_uuid", lambda _: OTHER)
        started(keeper, see, device=device)
    assert keeper.dropped == []


def test_a_segment_that_lies_on_another_gpu_is_not_taken_for_its_own(
    keeper: Keeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refused(start: Start) -> None:
        assert f"a segment that is kept for {GPU} (cuda:0) lies on cuda:1" in start.store.absent[GPU]

    with monkeypatch.context() as patch:
        patch.setattr(cuda_driver, "ordinal_of_allocation", lambda _: 1)
        started(keeper, refused)
    assert fakecuda.device_bytes(0) == 4 * MIB
    monkeypatch.setattr(cuda_driver, "ordinal_of_allocation", lambda _: None)  # a driver that does not tell
    started(keeper, everything_is_there)


def test_a_driver_that_says_where_memory_lies_is_asked(fake_driver: Path) -> None:
    cuda_driver.initialise()
    allocation = cuda_driver.create(0, 2 * MIB)
    descriptor = cuda_driver.export(allocation)
    imported = cuda_driver.import_descriptor(descriptor)
    assert cuda_driver.ordinal_of_allocation(imported) == 0
    for one in (allocation, imported):
        cuda_driver.release(one)
    os.close(descriptor)
    assert cuda_driver.ordinal_of_allocation(imported) is None, "what it does not know it does not say"


class Ipc(CudaVmmDevice):
    """A GPU that says that its memory is shared in another way."""

    kind = "cuda_ipc"


@pytest.mark.parametrize(
    ("kinds", "why"),
    [
        ([Ipc], "its memory is shared as cuda_ipc now, and what is kept on it as cuda_vmm"),
        ([], "it cannot be served"),
    ],
)
def test_a_choice_of_another_kind_or_of_nothing_lets_nothing_go(
    keeper: Keeper, monkeypatch: pytest.MonkeyPatch, kinds: list[type[CudaVmmDevice]], why: str
) -> None:
    """Whatever decides which devices are served: nothing that is kept hangs on it."""

    def choose(*_: object) -> Choice:
        return Choice([ServedGpu(kind(0), (GPU, "cuda:0", "cuda")) for kind in kinds], [])

    async def absent(start: Start) -> None:
        assert start.store.absent[GPU].startswith(why)

    with monkeypatch.context() as patch:
        patch.setattr(served, "choose_gpus", choose)
        started(keeper, absent)
    assert keeper.dropped == []
    started(keeper, everything_is_there)


def test_host_memory_that_the_settings_no_longer_name_is_kept_too(keeper: Keeper) -> None:
    async def see(start: Start) -> None:
        assert start.store.absent == {"host": start.served.absent["host"].words}
        assert "device = 'cuda' does not name it" in start.store.absent["host"]
        assert start.served.default == GPU
        assert start.state("h") == "absent"

    started(keeper, see, device="cuda")
    assert keeper.dropped == []
    started(keeper, everything_is_there)


def test_an_import_that_fails_in_the_midst_gives_all_back(keeper: Keeper, monkeypatch: pytest.MonkeyPatch) -> None:
    async def refused(start: Start) -> None:
        held = start.served.devices[GPU]
        assert isinstance(held, StandInDevice)
        device, before = CudaVmmDevice(0), len(open_descriptors())
        monkeypatch.setenv("FAKECUDA_FAIL", "cuMemImportFromShareableHandle:999:2")
        with pytest.raises(DeviceError, match="CUDA_ERROR_UNKNOWN"):
            device.import_held(held)
        monkeypatch.setenv("FAKECUDA_FAIL", "")
        assert len(open_descriptors()) == before

    monkeypatch.setenv("FAKECUDA_FAIL", "cuMemImportFromShareableHandle:999")
    started(keeper, refused)
    started(keeper, everything_is_there)


def released_on_main_thread(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each allocation that a device releases from now on, whether the thread of the loop calls the driver."""
    seen: list[bool] = []

    def release(allocation: Any) -> None:
        seen.append(threading.current_thread() is threading.main_thread())
        cuda_driver.release(allocation)

    monkeypatch.setattr(cuda_vmm, "driver", SimpleNamespace(**{**vars(cuda_driver), "release": release}))
    return seen


def test_what_is_imported_in_vain_is_given_up_off_the_loop(keeper: Keeper, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody forgets the device while it is imported."""
    imported, goes_on, devices = threading.Event(), threading.Event(), list[CudaVmmDevice]()
    real = CudaVmmDevice.import_held

    def import_held(self: CudaVmmDevice, stand_in: StandInDevice) -> dict[int, Any]:
        allocations = real(self, stand_in)
        devices.append(self)
        imported.set()
        assert goes_on.wait(60)
        return allocations

    async def back(start: Start) -> None:
        monkeypatch.setattr(CudaVmmDevice, "import_held", import_held)
        monkeypatch.setenv("FAKECUDA_FAIL", "")
        start.absences.hurry()
        await start.until(imported.is_set)
        start.store.leaving.add(GPU)
        released = released_on_main_thread(monkeypatch)  # not that of the segment that was made to try
        goes_on.set()
        await start.until(lambda: len(released) == 2)
        assert released == [False, False]
        assert await asyncio.to_thread(devices[0].calls.join, 60)
        assert not start.absences.serves(GPU)

    monkeypatch.setenv("FAKECUDA_FAIL", AWAY)
    started(keeper, back)


def test_a_gpu_that_hangs_at_the_end_keeps_the_daemon_a_while_at_most(
    keeper: Keeper, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    hangs, goes_on, devices = threading.Event(), threading.Event(), list[Any]()

    def release(allocation: Any) -> None:
        hangs.set()
        assert goes_on.wait(60)
        cuda_driver.release(allocation)

    async def end(start: Start) -> None:
        devices.append(start.served.devices[GPU])
        monkeypatch.setattr(served, "CLOSE_SECONDS", 0.01)
        monkeypatch.setattr(cuda_vmm, "driver", SimpleNamespace(**{**vars(cuda_driver), "release": release}))

    try:
        started(keeper, end)
        assert hangs.wait(60)
        assert f"device {GPU} does not answer at the end" in caplog.text
    finally:
        goes_on.set()
    assert devices[0].calls.join(60)


def test_many_segments_may_take_longer_to_import_than_one_call(keeper: Keeper, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]

    async def back(start: Start) -> None:
        loop, imported = asyncio.get_running_loop(), CudaVmmDevice._imported

        async def look(device: CudaVmmDevice) -> None:
            device.calls._look(loop)

        def slow(self: CudaVmmDevice, descriptor: int) -> Any:
            clock[0] += driver_thread.ANSWER_SECONDS * 0.8
            asyncio.run_coroutine_threadsafe(look(self), loop).result(60)
            return imported(self, descriptor)

        monkeypatch.setattr(CudaVmmDevice, "_imported", slow)
        monkeypatch.setattr(driver_thread, "time", SimpleNamespace(**{**vars(time), "monotonic": lambda: clock[0]}))
        monkeypatch.setenv("FAKECUDA_FAIL", "")
        start.absences.hurry()
        await start.until(lambda: not start.store.absent or "late" in start.store.absent[GPU] or clock[0] > 100)
        assert (start.store.absent, clock) == ({}, [driver_thread.ANSWER_SECONDS * 1.6])

    monkeypatch.setenv("FAKECUDA_FAIL", AWAY)
    started(keeper, back)


def test_what_goes_while_it_is_imported_is_gone(
    keeper: Keeper, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A thread imports while the loop goes on: somebody removes a checkpoint, whose release takes a while."""
    releasing = threading.Event()

    async def back(start: Start) -> None:
        real = CudaVmmDevice.import_held
        held = start.served.devices[GPU]
        loop = asyncio.get_running_loop()

        def import_held(self: CudaVmmDevice, stand_in: StandInDevice) -> dict[int, Any]:
            imported = real(self, stand_in)
            loop.call_soon_threadsafe(start.catalog.remove, WHO, "b")
            assert releasing.wait(60)
            return imported

        def release(self: StandInDevice, segment: int) -> None:
            releasing.set()
            time.sleep(0.05)
            really_release(self, segment)

        really_release = StandInDevice.release
        released = released_on_main_thread(monkeypatch)
        monkeypatch.setattr(StandInDevice, "release", release)
        monkeypatch.setattr(CudaVmmDevice, "import_held", import_held)
        monkeypatch.setenv("FAKECUDA_FAIL", "")
        start.absences.hurry()
        await start.until(lambda: not start.store.absent)
        assert start.served.devices[GPU] is not held
        await start.reclaimers[GPU].finish()
        await start.until(lambda: fakecuda.device_bytes(0) == 2 * MIB)
        assert released == [False, False], "the segment that was made to try, and the one that nobody wants"
        assert start.bytes_of("a") == list(DATA["a"].values())
        assert "could not be returned" not in caplog.text

    monkeypatch.setenv("FAKECUDA_FAIL", AWAY)
    started(keeper, back)
    assert fakecuda.device_bytes(0) == 2 * MIB


def test_a_budget_that_it_cannot_have_leaves_it_absent_and_says_so(
    keeper: Keeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def back(start: Start) -> None:
        monkeypatch.setenv("FAKECUDA_FAIL", "")
        start.absences.hurry(Settings(device="host,cuda", budget="host=64MiB,cuda=1TiB"))
        await start.until(lambda: "budget = " in start.store.absent[GPU])
        start.absences.hurry(Settings(device="host,cuda", budget="host=64MiB,cuda=3MiB"))
        await start.until(lambda: not start.store.absent)
        assert start.catalog.visible(WHO)[0].pinned
        assert start.state("a") == "resident"
        assert len(start.store.on_device(GPU)) == 1, "b does not fit into the budget any more"

    monkeypatch.setenv("FAKECUDA_FAIL", AWAY)
    started(keeper, back)


def test_a_budget_that_is_changed_during_the_import_is_the_one_that_it_gets(
    keeper: Keeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    budgets = iter(["1TiB", "32MiB"])

    async def back(start: Start) -> None:
        real = CudaVmmDevice.import_held

        def import_held(self: CudaVmmDevice, stand_in: StandInDevice) -> dict[int, Any]:
            imported = real(self, stand_in)
            start.absences.settings = Settings(device="host,cuda", budget=f"host=64MiB,cuda={next(budgets)}")
            return imported

        monkeypatch.setattr(CudaVmmDevice, "import_held", import_held)
        monkeypatch.setenv("FAKECUDA_FAIL", "")
        start.absences.hurry()
        await start.until(lambda: "budget = " in start.store.absent[GPU])
        start.absences.settings = Settings(device="host,cuda", budget="64MiB")
        start.absences.hurry()
        await start.until(lambda: not start.store.absent)
        assert start.store.memories[GPU].budget == 32 * MIB
        await everything_is_there(start)

    monkeypatch.setenv("FAKECUDA_FAIL", AWAY)
    started(keeper, back)


def test_it_is_tried_again_ever_less_often_until_it_is_back(keeper: Keeper, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float | None] = []
    real = asyncio.timeout

    def timeout(seconds: float | None) -> Any:
        waits.append(seconds)
        return real(None if seconds is None else 0.001)

    async def back(start: Start) -> None:
        monkeypatch.setattr(absence.asyncio, "timeout", timeout)
        await asyncio.sleep(0)
        while len(waits) < 7:  # noqa: ASYNC110  # counted above
            await asyncio.sleep(0.001)
        monkeypatch.setattr(absence.asyncio, "timeout", real)
        monkeypatch.setenv("FAKECUDA_FAIL", "")
        start.absences.hurry()
        await start.until(lambda: not start.store.absent)

    monkeypatch.setenv("FAKECUDA_FAIL", AWAY)
    started(keeper, back)
    assert waits[:7] == [5.0, 10.0, 20.0, 40.0, 60.0, 60.0, 60.0]


def test_only_what_the_settings_name_is_tried_again(keeper: Keeper) -> None:
    async def see(start: Start) -> None:
        assert start.absences._tasks == {}

    started(keeper, see, device="host")
    assert keeper.dropped == []


def test_it_is_tried_off_the_loop(keeper: Keeper, monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver may hang, whether anything is kept or not."""
    threads: list[bool] = []

    def open_again(*_: object) -> ServedGpu:
        threads.append(threading.current_thread() is threading.main_thread())
        raise DeviceError("not yet")

    async def back(start: Start) -> None:
        monkeypatch.setattr(served.Devices, "open_again", open_again)
        start.absences.hurry()
        await start.until(lambda: threads)

    monkeypatch.setenv("FAKECUDA_FAIL", AWAY)
    started(keeper, back)
    assert threads == [False]


def test_a_checkpoint_without_bytes_has_no_segment_and_is_kept(keeper: Keeper, monkeypatch: pytest.MonkeyPatch) -> None:
    async def leave(start: Start) -> None:
        for name in DATA:
            start.catalog.remove(WHO, name)
        await start.load("empty", GPU, {})

    async def see(start: Start) -> None:
        states.append(start.state("empty"))

    states: list[str] = []
    started(keeper, leave)
    assert not [row for row in keeper.rows()["segments"] if GPU in row]
    for rule in (AWAY, ""):
        monkeypatch.setenv("FAKECUDA_FAIL", rule)
        started(keeper, see)
    assert states == ["absent", "resident"]


def test_a_stand_in_makes_nothing_and_lends_nothing() -> None:
    stand_in = StandInDevice(GPU, "cuda_vmm")
    for refused in (lambda: stand_in.create(1), lambda: stand_in.writable(1), lambda: stand_in.shared(1)):
        with pytest.raises(DeviceAbsentError, match=f"device {GPU} is absent"):
            refused()
    assert (stand_in.capacity(), stand_in.available(), stand_in.is_empty) == (0, None, True)


def test_an_absent_device_is_called_as_it_was() -> None:
    assert AbsentDevice(GPU, 1, None, "").names == (GPU, "cuda:1", "cuda")
    assert AbsentDevice(GPU, None, None, "").names == (GPU, "cuda")
    assert AbsentDevice("host", None, "host", "").names == ("host",)
    assert AbsentDevice(GPU, 1, None, "why").words.endswith("and it is tried again by itself")
    assert AbsentDevice(GPU, 1, None, "why", said=False).words == "why; what is kept on it stays kept"


def test_without_anything_kept_a_device_that_fails_keeps_its_exit_code(
    fake_driver: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKECUDA_FAIL", AWAY)
    keeper = Keeper()

    async def run() -> None:
        with pytest.raises(TemporaryConfigError, match="SYSTEM_NOT_READY"):
            async with Start.of(keeper, device="cuda"):
                pass

    asyncio.run(run())
