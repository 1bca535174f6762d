"""The holder process of memory shared by CUDA IPC, on the double: what its end means, and that it leaves nothing."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support import fakecuda
from support.closed import close, closed_after
from support.daemon import environment, eventually
from support.descriptors import open_descriptors
from support.leash import leashed
from weightd.errors import DeviceAbsentError, DeviceError
from weightd_daemon.devices import cuda_ipc, driver_thread
from weightd_daemon.devices.cuda_ipc import CudaHolderContext, CudaIpcDevice


@pytest.fixture(autouse=True)
def on_the_double(fake_driver: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in fakecuda.environment(fake_driver).items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    with contextlib.closing(asyncio.new_event_loop()) as loop:
        yield loop
        tasks = asyncio.all_tasks(loop)
        loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True) if tasks else asyncio.sleep(0))


class Losses:
    """What the daemon is told of losses."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.told: list[tuple[str, str]] = []
        self.holding = CudaHolderContext(loop, self.tell)
        self._loop = loop
        self._arrived = asyncio.Event()

    def tell(self, uuid: str, reason: str) -> None:
        self.told.append((uuid, reason))
        self._arrived.set()

    def wait(self) -> None:
        """Let the loop run until a loss is told."""
        self._loop.run_until_complete(asyncio.wait_for(self._arrived.wait(), 60))
        self._arrived.clear()


@pytest.fixture
def losses(loop: asyncio.AbstractEventLoop) -> Losses:
    return Losses(loop)


@pytest.fixture
def device(losses: Losses) -> Iterator[CudaIpcDevice]:
    with closed_after(CudaIpcDevice(0, losses.holding)) as device:
        yield device


def holder(device: CudaIpcDevice) -> int:
    assert device._holder is not None
    return device._holder.pid


def create(device: CudaIpcDevice, loop: asyncio.AbstractEventLoop) -> int:
    """A segment, made as in a daemon: while the loop runs, and after a holder that is being started is ready."""
    return loop.run_until_complete(creating(device))


async def creating(device: CudaIpcDevice) -> int:
    async with asyncio.timeout(60):
        return await device.calls.run("cuMemAlloc", lambda: device.create(device.page))


async def hanging(device: CudaIpcDevice, goes_on: Callable[[], object]) -> tuple[str, int]:
    """Ask for a segment of a device that hangs, then let it go on. Returns the problem meanwhile, and the segment."""
    changed = asyncio.Event()
    device.calls.on_change = changed.set
    segment = asyncio.ensure_future(creating(device))
    await asyncio.wait_for(changed.wait(), 60)
    problem = device.calls.problem
    with pytest.raises(DeviceAbsentError, match="does not answer"):
        device.calls.check()
    goes_on()
    return problem, await segment


def test_a_killed_holder_is_told_as_a_loss_and_another_takes_its_place(
    device: CudaIpcDevice, losses: Losses, loop: asyncio.AbstractEventLoop
) -> None:
    segment, first = device.create(device.page), holder(device)
    os.kill(first, signal.SIGKILL)
    losses.wait()
    assert losses.told == [
        (device.uuid, f"the process that holds the memory of {device.uuid} (pid {first}) was ended by SIGKILL")
    ]
    assert fakecuda.device_bytes(0) == 0
    device.release(segment)  # which may have been under way

    another = create(device, loop)
    assert another > segment
    assert holder(device) != first
    assert str(holder(device)) in device.note
    assert fakecuda.device_bytes(0) == device.page
    assert len(losses.told) == 1


def test_until_its_loss_is_told_nothing_is_made_that_would_be_lost_with_it(
    device: CudaIpcDevice, losses: Losses, loop: asyncio.AbstractEventLoop
) -> None:
    first = holder(device)
    os.kill(first, signal.SIGKILL)
    eventually(lambda: not Path(f"/proc/{first}").exists())
    with pytest.raises(DeviceError, match="has ended; load again"):
        device.create(device.page)
    assert losses.told == []
    losses.wait()
    create(device, loop)


def test_a_holder_that_hangs_is_waited_for_and_its_gpu_does_not_answer(
    device: CudaIpcDevice, losses: Losses, loop: asyncio.AbstractEventLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It holds weights that are in use: they are not thrown away for a driver that takes long."""
    monkeypatch.setattr(driver_thread, "ANSWER_SECONDS", 0.05)
    first = holder(device)
    os.kill(first, signal.SIGSTOP)
    problem, segment = loop.run_until_complete(hanging(device, lambda: os.kill(first, signal.SIGCONT)))
    assert problem.endswith("in cuMemAlloc; what is kept on it stays kept")
    assert (losses.told, holder(device), device.calls.problem) == ([], first, "")
    assert fakecuda.device_bytes(0) == device.page
    device.release(segment)


def test_while_the_next_holder_starts_who_wants_memory_waits_and_the_loop_does_not(
    device: CudaIpcDevice,
    losses: Losses,
    loop: asyncio.AbstractEventLoop,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(driver_thread, "ANSWER_SECONDS", 0.05)
    hangs, first = tmp_path / "hangs", holder(device)
    hangs.touch()
    for name, value in {"HANG": "cuInit", "HANG_WHILE": str(hangs), "FAIL_IN": "cuda_holder"}.items():
        monkeypatch.setenv(f"FAKECUDA_{name}", value)
    os.kill(first, signal.SIGKILL)
    losses.wait()
    problem, _ = loop.run_until_complete(hanging(device, hangs.unlink))
    assert "in the start of its holder" in problem
    assert len(losses.told) == 1
    assert holder(device) != first


@pytest.mark.parametrize("late", [False, True])
def test_a_next_holder_that_cannot_start_says_why_and_is_followed_by_another_when_memory_is_wanted(
    late: bool,
    device: CudaIpcDevice,
    losses: Losses,
    loop: asyncio.AbstractEventLoop,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with monkeypatch.context() as patch:
        if late:
            patch.setattr(cuda_ipc, "_START_SECONDS", 0.001)
        else:
            patch.setenv("FAKECUDA_FAIL", "cuInit:999")
        os.kill(holder(device), signal.SIGKILL)
        losses.wait()
        assert device._starting is not None
        loop.run_until_complete(asyncio.wait_for(device._starting, 60))
    why = "was not ready in 0 s" if late else "no CUDA device can be used here: cuInit failed"
    (said,) = caplog.messages
    assert f"device {device.uuid} has no holder" in said
    assert why in said
    create(device, loop)
    assert len(losses.told) == 1  # nothing lay in the one that did not start


def test_ctrl_c_and_a_stop_of_the_service_leave_its_end_to_the_daemon(device: CudaIpcDevice, losses: Losses) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(holder(device), number)
    device.create(device.page)
    assert losses.told == []


def test_closing_leaves_no_process_and_is_no_loss(losses: Losses, loop: asyncio.AbstractEventLoop) -> None:
    device = CudaIpcDevice(0, losses.holding)
    device.create(device.page)
    pid = holder(device)
    close(device)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    loop.run_until_complete(asyncio.sleep(0))
    assert losses.told == []
    assert fakecuda.device_bytes(0) == 0


def test_closing_waits_neither_for_a_holder_that_hangs_nor_for_its_end(
    losses: Losses, loop: asyncio.AbstractEventLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads, waits = list[bool](), threading.Event()
    end, answer = cuda_ipc._Holder.close, cuda_ipc._Holder._answer

    def ended(self: cuda_ipc._Holder) -> None:
        threads.append(threading.current_thread() is threading.main_thread())
        end(self)

    monkeypatch.setattr(cuda_ipc._Holder, "close", ended)

    async def steps() -> None:
        device = CudaIpcDevice(0, losses.holding)
        pid = holder(device)
        os.kill(pid, signal.SIGSTOP)
        monkeypatch.setattr(cuda_ipc._Holder, "_answer", lambda self: (waits.set(), answer(self))[1])
        segment = asyncio.ensure_future(creating(device))
        await asyncio.to_thread(waits.wait, 60)
        device.close()
        with pytest.raises(DeviceError, match="has ended"):
            await segment
        assert await asyncio.to_thread(device.calls.join, 60)
        assert threads == [False]
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)

    loop.run_until_complete(steps())
    assert losses.told == []


@pytest.mark.parametrize("call", ["cuInit", "cuDevicePrimaryCtxRetain", "cuCtxPushCurrent"])
def test_a_holder_that_cannot_start_says_why_and_leaves_nothing(
    call: str, losses: Losses, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = open_descriptors()
    monkeypatch.setenv("FAKECUDA_FAIL", f"{call}:999")
    monkeypatch.setenv("FAKECUDA_FAIL_IN", "cuda_holder")
    with pytest.raises(DeviceError, match=f"{call} failed with CUDA_ERROR_UNKNOWN"):
        CudaIpcDevice(0, losses.holding)
    assert open_descriptors() == before
    assert losses.told == []


def test_a_holder_whose_driver_cannot_free_ends(
    losses: Losses, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FAKECUDA_FAIL", "cuMemFree:719")
    monkeypatch.setenv("FAKECUDA_FAIL_IN", "cuda_holder")
    with closed_after(CudaIpcDevice(0, losses.holding)) as device:
        device.release(device.create(device.page))
        losses.wait()
        assert losses.told[0][1].endswith("ended with code 1")
    assert "cuMemFree failed" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("fails", "expected"),
    [
        ("cuMemsetD8:999", DeviceError),
        ("cuMemsetD8:999,cuMemFree:719", DeviceError),
        ("cuMemAlloc:700", DeviceError),  # which sticks to its context
        ("cuMemsetD8:2,cuMemFree:719", MemoryError),
    ],
)
def test_a_holder_that_may_have_more_than_the_books_or_a_dead_context_says_why_and_ends(
    fails: str, expected: type[Exception], losses: Losses, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKECUDA_FAIL", fails)
    monkeypatch.setenv("FAKECUDA_FAIL_IN", "cuda_holder")
    with closed_after(CudaIpcDevice(0, losses.holding)) as device:
        with pytest.raises(expected, match=fails.partition(":")[0]):
            device.create(device.page)
        losses.wait()
        assert losses.told[0][1].endswith("ended with code 1")
        assert fakecuda.device_bytes(0) == 0


def test_a_full_device_is_not_the_end_of_its_holder(losses: Losses, monkeypatch: pytest.MonkeyPatch) -> None:
    for call in ("cuMemAlloc", "cuMemsetD8", "cuCtxSynchronize", "cuIpcGetMemHandle"):
        monkeypatch.setenv("FAKECUDA_FAIL", f"{call}:2:2")
        monkeypatch.setenv("FAKECUDA_FAIL_IN", "cuda_holder")
        with closed_after(CudaIpcDevice(0, losses.holding)) as device:
            device.create(device.page)
            with pytest.raises(MemoryError, match=call):
                device.create(device.page)
            device.create(device.page)
            assert fakecuda.device_bytes(0) == 2 * device.page
    assert losses.told == []


# A daemon with a lock, reduced to its device; it says which process holds.
DAEMON = """
import asyncio, fcntl, os, sys, time
from weightd_daemon.devices.cuda_ipc import CudaIpcDevice, CudaHolderContext

lock = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
fcntl.flock(lock, fcntl.LOCK_EX)
device = CudaIpcDevice(0, CudaHolderContext(asyncio.new_event_loop(), print, inherited=(lock,)))
device.create(device.page)
print(device._holder.pid, flush=True)
time.sleep(600)
"""


def test_the_holder_dies_with_the_daemon_and_keeps_its_lock_until_then(fake_driver: Path, tmp_path: Path) -> None:
    variables = {**environment(), **fakecuda.environment(fake_driver)}
    command = leashed([sys.executable, "-c", DAEMON, str(tmp_path / "lock")])
    with subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, text=True) as daemon:
        try:
            assert daemon.stdout is not None
            pid = int(daemon.stdout.readline())
            holder = os.pidfd_open(pid)
            assert "lock" in {Path(os.readlink(f"/proc/{pid}/fd/{fd}")).name for fd in os.listdir(f"/proc/{pid}/fd")}
            assert fakecuda.device_bytes(0) == 2 << 20
            os.kill(pid, signal.SIGSTOP)  # so that it cannot see that the daemon has hung up
        finally:
            daemon.kill()
    with open(holder, "rb") as ended:
        assert select.select([ended], [], [], 60.0)[0], f"holder {pid} lives on"
    assert fakecuda.device_bytes(0) == 0


# Opens every GPU, and says which are served.
SEVERAL = """
import asyncio
from weightd_daemon.devices import cuda_ipc
from weightd_daemon.devices.cuda_choice import choose_gpus
from weightd_daemon.devices.cuda_ipc import CudaHolderContext

cuda_ipc.names_alike = lambda uuid: not uuid.endswith("2")
holding = CudaHolderContext(asyncio.new_event_loop(), print)
choice = choose_gpus(["cuda"], "cuda_ipc", holding, {})
print(*(gpu.device.uuid for gpu in choice.served))
for gpu in choice.served:
    gpu.device.close()
for gpu in choice.served:
    gpu.device.calls.join(60)
"""


def holders_of(daemon: int) -> dict[str, str]:
    """By UUID, what each holder of a process sees."""
    found: dict[str, str] = {}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            *_, parent, uuid, _ = ["", "", *(process / "cmdline").read_text().split("\0")]
            if parent == str(daemon):
                variables = (process / "environ").read_text().split("\0")
                found[uuid] = next(v.partition("=")[2] for v in variables if v.startswith("CUDA_VISIBLE_DEVICES="))
    return found


def test_holders_of_several_gpus_start_side_by_side_and_see_their_gpu_alone(fake_driver: Path, tmp_path: Path) -> None:
    """Each waits in cuInit until all of them are there."""
    hangs, uuids = tmp_path / "hangs", [fakecuda.uuid(number) for number in range(3)]
    hangs.touch()
    knobs = fakecuda.environment(fake_driver, devices=3, hang="cuInit", hang_while=hangs, fail_in="cuda_holder")
    command = leashed([sys.executable, "-c", SEVERAL])
    with subprocess.Popen(command, env={**environment(), **knobs}, stdout=subprocess.PIPE, text=True) as daemon:
        try:
            expected = {uuids[0]: uuids[0], uuids[1]: uuids[1], uuids[2]: "0,1,2"}
            eventually(lambda: holders_of(daemon.pid) == expected)
            hangs.unlink()
            assert daemon.communicate(timeout=60)[0].split() == uuids
        finally:
            daemon.kill()
