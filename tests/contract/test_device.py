"""What every device promises (devices/device.py). A new device joins the list in `DEVICES`."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import fcntl
import gc
import mmap
import os
import resource
import stat
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from support import fakecuda
from support.closed import close, closed_after
from support.daemon import environment
from support.descriptors import counted
from weightd._mapping import cuda_driver
from weightd.errors import DeviceError
from weightd_daemon.devices import host as host_device
from weightd_daemon.devices.cuda_ipc import CudaHolderContext, CudaIpcDevice
from weightd_daemon.devices.cuda_vmm import CudaVmmDevice
from weightd_daemon.devices.host import HostDevice

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from weightd_daemon.devices.device import Device

NOBODY = 65534
REFUSED = {errno.EACCES, errno.EPERM, errno.EBADF, errno.EINVAL}


def nobody_is_told(uuid: str, reason: str) -> None:
    raise AssertionError(f"{uuid}: {reason}")


@contextlib.contextmanager
def ipc_device() -> Iterator[Device]:
    """A device with a holder; the loop does not run, and nothing here needs it."""
    loop = asyncio.new_event_loop()
    with (
        contextlib.closing(loop),
        closed_after(CudaIpcDevice(0, CudaHolderContext(loop, nobody_is_told))) as device,
    ):
        yield device


DEVICES: dict[str, Callable[[], contextlib.AbstractContextManager[Device]]] = {
    "host": lambda: closed_after(HostDevice()),
    "cuda_vmm": lambda: closed_after(CudaVmmDevice(0)),
    "cuda_ipc": ipc_device,
}


@contextlib.contextmanager
def opened(device: Device, segment: int, *, writable: bool) -> Iterator[int]:
    """A segment of GPU memory in this process, as loaders and clients open it; yields its address."""
    handle, size = device.writable(segment) if writable else device.shared(segment), device.allocated(segment)
    with cuda_driver.on_device(0), contextlib.ExitStack() as stack:
        if isinstance(handle, bytes):
            address = cuda_driver.open_ipc(handle)
            stack.callback(cuda_driver.call, "cuIpcCloseMemHandle", address)
            yield address
        else:
            addresses = stack.enter_context(contextlib.closing(cuda_driver.MappedAddressRange(0, size)))
            allocation = cuda_driver.import_descriptor(handle)
            addresses.map(0, size, allocation)
            cuda_driver.release(allocation)
            addresses.allow(writable=writable)
            yield addresses.address


def copied_from(address: int, length: int) -> bytes:
    buffer = ctypes.create_string_buffer(length)
    cuda_driver.call("cuMemcpyDtoH", ctypes.addressof(buffer), address, length)
    return buffer.raw


def write(device: Device, segment: int, offset: int, data: bytes) -> None:
    if device.kind == "host":
        assert os.pwrite(device.writable(segment), data, offset) == len(data)
        return
    with opened(device, segment, writable=True) as address:
        cuda_driver.call("cuMemcpyHtoD", address + offset, data, len(data))


def read(device: Device, segment: int, offset: int, length: int) -> bytes:
    if device.kind == "host":
        return os.pread(device.shared(segment), length, offset)
    with opened(device, segment, writable=False) as address:
        return copied_from(address + offset, length)


on_the_double = pytest.mark.skipif(
    "config.getoption('--gpu') == 'hardware'", reason="others use a GPU, and it obeys none"
)


def on_gpu_are(size: int) -> bool:
    """Whether so many bytes are alive on the GPU; true where only a real one could tell."""
    return "FAKECUDA_MACHINE" not in os.environ or fakecuda.device_bytes(0) == size


@pytest.fixture(params=["host", *(pytest.param(kind, marks=pytest.mark.gpu) for kind in ("cuda_ipc", "cuda_vmm"))])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    """A device; whatever a test leaves on it, closing it leaves no descriptor and no memory behind."""
    on_gpu = request.param != "host"
    if on_gpu and request.config.getoption("--gpu") == "double":
        for name, value in fakecuda.environment(request.getfixturevalue("fake_driver")).items():
            monkeypatch.setenv(name, value)
    if on_gpu:
        with cuda_driver.on_device(0):  # the driver opens what it keeps open
            pass
    gc.collect()  # or descriptors of earlier tests would be closed meanwhile
    before = counted()
    with DEVICES[request.param]() as made:
        yield made
    assert counted() == before
    assert not on_gpu or on_gpu_are(0)


@pytest.fixture
def host(device: Device) -> Device:
    if device.kind != "host":
        pytest.skip("promised of host memory only")
    return device


# -- all devices -------------------------------------------------------------------------------------------------------


def test_it_says_what_it_is(device: Device) -> None:
    assert device.uuid
    assert device.name
    assert device.kind in {"host", "cuda_vmm", "cuda_ipc"}
    assert device.page > 0
    assert device.page & (device.page - 1) == 0
    assert device.page <= device.capacity() < 1 << 50


def test_segments_have_numbers_of_their_own_and_are_never_reused(device: Device) -> None:
    first = device.create(device.page)
    device.release(first)
    second, third = device.create(device.page), device.create(device.page)
    assert len({first, second, third}) == 3


def test_a_fresh_segment_reads_as_zero_and_takes_memory_as_it_is_written(device: Device) -> None:
    segment = device.create(8 * device.page)
    assert not any(read(device, segment, 0, 8 * device.page))
    assert device.allocated(segment) == (0 if device.sparse else 8 * device.page)
    write(device, segment, device.page, b"x" * device.page)
    assert device.allocated(segment) == (device.page if device.sparse else 8 * device.page)


def test_clients_see_what_the_loader_writes(device: Device) -> None:
    segment = device.create(2 * device.page)
    write(device, segment, device.page - 3, b"across")
    assert read(device, segment, device.page - 3, 6) == b"across"


def test_punching_gives_whole_pages_back_and_leaves_the_neighbours(device: Device) -> None:
    if not device.sparse:
        pytest.skip("this device keeps its memory until a segment is released")
    page = device.page
    segment = device.create(4 * page)
    write(device, segment, 0, b"x" * (4 * page))
    device.punch(segment, page, 2 * page)
    assert device.allocated(segment) == 2 * page
    assert read(device, segment, 0, 4 * page) == b"x" * page + bytes(2 * page) + b"x" * page
    write(device, segment, page, b"again")
    assert read(device, segment, page, 6) == b"again\0"


def test_releasing_leaves_no_descriptor(device: Device) -> None:
    before = counted()
    segments = [device.create(device.page) for _ in range(5)]
    assert counted() > before or device.kind == "cuda_ipc"
    for segment in segments:
        device.release(segment)
    assert counted() == before
    with pytest.raises(KeyError):
        device.shared(segments[0])


def test_a_segment_for_which_there_are_no_descriptors_leaves_nothing(device: Device) -> None:
    if device.kind == "cuda_ipc":
        pytest.skip("its segments take no descriptors here")
    before = counted()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.open("/dev/null", os.O_RDONLY)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free + 1, hard))  # the first descriptor of a segment, and no second
    try:
        with pytest.raises((MemoryError, DeviceError)):
            device.create(device.page)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert counted() == before


def test_no_descriptor_survives_exec(device: Device) -> None:
    segment = device.create(device.page)
    for handle in (device.writable(segment), device.shared(segment)):
        assert isinstance(handle, bytes) or not os.get_inheritable(handle)


def test_handles_are_of_the_kind_that_is_told(device: Device) -> None:
    handles = [device.shared(device.create(device.page)) for _ in range(3)]
    assert len({*handles}) == 3
    assert [len(handle) if isinstance(handle, bytes) else -1 for handle in handles] == (
        [64] * 3 if device.kind == "cuda_ipc" else [-1] * 3
    )
    assert bool(device.note) == (device.kind == "cuda_ipc")


# -- for the next daemon -----------------------------------------------------------------------------------------------


def test_a_segment_is_adopted_by_its_descriptor(device: Device) -> None:
    """As the next daemon gets it: what the first one had is closed by then, and all it has itself is the descriptor."""
    if not device.lasting:
        pytest.skip("its memory ends with the daemon")
    segment = device.create(4 * device.page)
    write(device, segment, device.page, b"kept")
    handle = device.writable(segment)
    assert isinstance(handle, int)
    descriptor = os.dup(handle)
    device.release(segment)
    with DEVICES[device.kind]() as following:
        adopted = following.adopt(descriptor, 4 * device.page)
        assert following.allocated(adopted) == (device.page if device.sparse else 4 * device.page)
        assert read(following, adopted, device.page, 4) == b"kept"
        write(following, adopted, 0, b"more")
        assert read(following, adopted, 0, 4) == b"more"
        made = following.create(device.page)
        assert made != adopted
        further = os.dup(descriptor)
        following.release(adopted)
        with pytest.raises(KeyError):
            following.shared(adopted)
        again = following.adopt(further, 4 * device.page)
        assert again not in (adopted, made)
        assert read(following, again, device.page, 4) == b"kept"


def test_what_is_no_segment_is_not_adopted_and_stays_the_callers(device: Device) -> None:
    descriptor = os.open("/dev/null", os.O_RDWR)
    before = counted()
    with pytest.raises(DeviceError):
        device.adopt(descriptor, device.page)
    assert counted() == before
    os.close(descriptor)


def test_hollow_is_what_has_no_memory(device: Device) -> None:
    page = device.page
    segment = device.create(8 * page)
    assert device.hollow(segment) == ([(0, 8 * page)] if device.sparse else [])
    write(device, segment, 2 * page, b"x" * page)
    write(device, segment, 5 * page, b"x" * 2 * page)
    expected = [(0, 2 * page), (3 * page, 5 * page), (7 * page, 8 * page)]
    assert device.hollow(segment) == (expected if device.sparse else [])
    write(device, segment, 0, b"x" * 8 * page)
    assert device.hollow(segment) == []


# -- GPU memory --------------------------------------------------------------------------------------------------------


@pytest.fixture
def gpu(device: Device) -> Device:
    if device.kind == "host":
        pytest.skip("promised of GPU memory only")
    return device


def test_a_gpu_is_called_by_its_uuid_and_keeps_its_memory_in_whole_segments(gpu: Device) -> None:
    assert gpu.uuid == cuda_driver.uuid_of(0)
    assert not gpu.sparse
    assert gpu.page % (2 << 20) == 0
    with pytest.raises(NotImplementedError):
        gpu.punch(gpu.create(gpu.page), 0, gpu.page)


def test_releasing_gives_gpu_memory_back(gpu: Device) -> None:
    segments = [gpu.create(size * gpu.page) for size in (1, 2, 3)]
    assert on_gpu_are(6 * gpu.page)
    gpu.release(segments[1])
    assert gpu.allocated(gpu.create(gpu.page)) == gpu.page  # in the holder, requests are done in order
    assert on_gpu_are(5 * gpu.page)


def test_released_memory_reads_as_zero_when_it_comes_again(gpu: Device) -> None:
    first = gpu.create(gpu.page)
    write(gpu, first, 0, b"somebody's weights" * 1000)
    gpu.release(first)
    assert not any(read(gpu, gpu.create(gpu.page), 0, gpu.page))


def test_a_full_gpu_is_a_memory_error_that_says_what_was_asked_and_leaves_nothing(gpu: Device) -> None:
    kept = gpu.create(gpu.page)
    size = gpu.capacity()
    with pytest.raises(MemoryError, match=f"no segment of {size} bytes: {gpu.uuid} is full"):
        gpu.create(size)
    assert on_gpu_are(gpu.page)
    gpu.release(kept)
    gpu.release(gpu.create(size - 64 * gpu.page))


def test_what_nvml_says_is_free_stands_in_the_error(gpu: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "weightd_daemon.devices.cuda_device.free_bytes", lambda uuid: 4711 if uuid == gpu.uuid else None
    )
    gpu.look()
    assert gpu.available() == 4711
    with pytest.raises(MemoryError, match="4711 bytes are free"):
        gpu.create(gpu.capacity() + gpu.page)


@on_the_double
def test_what_is_free_is_what_nvml_says(gpu: Device) -> None:
    gpu.create(3 * gpu.page)
    gpu.look()
    assert gpu.available() == gpu.capacity() - 3 * gpu.page


@on_the_double
def test_where_nvml_does_not_answer_nobody_knows_what_is_free(gpu: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKECUDA_FAIL", "nvmlDeviceGetMemoryInfo:3")
    gpu.look()
    assert gpu.available() is None


def test_released_memory_lives_on_where_it_is_mapped(gpu: Device) -> None:
    """NVIDIA does not promise it of CUDA IPC: there nothing is released that somebody has open."""
    if gpu.kind != "cuda_vmm":
        pytest.skip("promised of VMM memory only")
    segment = gpu.create(gpu.page)
    write(gpu, segment, 0, b"still here")
    with opened(gpu, segment, writable=False) as address:
        gpu.release(segment)
        gpu.create(gpu.page)
        assert copied_from(address, 10) == b"still here"


# Runs in a process of its own: `arguments` are the transport and what to do with a device.
ALONE = """
import asyncio, sys
from weightd.errors import DeviceError
from weightd_daemon.devices.cuda_ipc import CudaIpcDevice, CudaHolderContext
from weightd_daemon.devices.cuda_vmm import CudaVmmDevice

loop = asyncio.new_event_loop()
device = CudaVmmDevice(0) if sys.argv[1] == "cuda_vmm" else CudaIpcDevice(0, CudaHolderContext(loop, print))
failures = []
for _ in range(3):
    try:
        device.release(device.create(device.page))
    except DeviceError as error:
        failures.append(f"{error.metadata['call']}={error.code}")
print(*failures)
device.create(device.page)
from support import fakecuda
from support.closed import close, closed_after
print(fakecuda.device_bytes(0) // device.page)
device.close()
device.calls.join(60)
"""


def alone(kind: str, folder: Path, **knobs: object) -> list[str]:
    """What ALONE prints under the knobs of the double."""
    variables = {**environment(), **fakecuda.environment(folder, **knobs)}
    done = subprocess.run(
        [sys.executable, "-c", ALONE, kind], env=variables, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("call", ["cuMemCreate", "cuMemExportToShareableHandle"])
def test_a_call_that_fails_half_way_is_a_device_error_and_leaves_nothing(call: str, fake_driver: Path) -> None:
    """With a holder, such a call is its end: tests/driver/test_devices_holder.py."""
    assert alone("cuda_vmm", fake_driver, fail=f"{call}:801:2") == [f"{call}=CUDA_ERROR_NOT_SUPPORTED", "1"]


def test_what_cannot_be_given_back_at_the_end_is_logged_and_keeps_nothing_else(
    fake_driver: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    device = CudaVmmDevice(0)
    first, *_ = [device._segments[device.create(device.page)] for _ in range(3)]
    monkeypatch.setenv("FAKECUDA_FAIL", "cuMemRelease:999:1")
    close(device)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert f"device {device.uuid}: a segment is not given back" in caplog.text
    assert "cuMemRelease failed" in caplog.text
    assert fakecuda.device_bytes(0) == device.page
    cuda_driver.release(first.allocation)


@pytest.mark.parametrize("kind", ["cuda_vmm", "cuda_ipc"])
def test_the_daemons_side_never_has_a_context(kind: str, fake_driver: Path, tmp_path: Path) -> None:
    assert alone(kind, fake_driver, log=tmp_path / "calls") == ["", "1"]
    calls = fakecuda.calls(tmp_path / "calls")
    ours = {call.function for call in calls if call.pid == calls[0].pid}
    assert "cuInit" in ours
    assert not {name for name in ours if "Ctx" in name or name.startswith(("cuMemAlloc", "cuMemcpy", "cuStream"))}
    theirs = {call.function for call in calls} - ours
    assert ("cuDevicePrimaryCtxRetain" in theirs) == (kind == "cuda_ipc")


# -- host memory -------------------------------------------------------------------------------------------------------


def refusals(attempts: dict[str, Callable[[], object]], uid: int | None) -> dict[str, int]:
    """errno of each attempt, 0 where it succeeded, made in a forked child that has become `uid`."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            if uid is not None:
                os.setgroups([])
                os.setresgid(uid, uid, uid)
                os.setresuid(uid, uid, uid)
            for name, attempt in attempts.items():
                code = 0
                try:
                    attempt()
                except OSError as error:
                    code = error.errno or -1
                os.write(writer, f"{name} {code}\n".encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as answers:
        found = {name: int(code) for name, code in (line.split() for line in answers)}
    os.waitpid(child, 0)
    assert found.keys() == attempts.keys()
    return found


def attempts_on(descriptor: int, length: int) -> dict[str, Callable[[], object]]:
    path = f"/proc/self/fd/{descriptor}"
    return {
        "write": lambda: os.pwrite(descriptor, b"evil", 0),
        "truncate": lambda: os.ftruncate(descriptor, 0),
        "chmod": lambda: os.fchmod(descriptor, 0o666),
        "punch": lambda: os.posix_fallocate(descriptor, 0, length),
        "map": lambda: mmap.mmap(descriptor, length, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ | mmap.PROT_WRITE),
        "reopen": lambda: os.open(path, os.O_RDWR),
        "reopen_to_read": lambda: os.open(path, os.O_RDONLY),
    }


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_user_can_do_nothing_but_read(host: Device) -> None:
    segment = host.create(host.page)
    write(host, segment, 0, b"good")
    found = refusals(attempts_on(host.shared(segment), host.page), NOBODY)
    assert {name: code for name, code in found.items() if code not in REFUSED} == {}
    assert read(host, segment, 0, 4) == b"good"
    assert stat.S_IMODE(os.fstat(host.shared(segment)).st_mode) == 0o400


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_user_can_map_it_and_read(host: Device) -> None:
    segment = host.create(host.page)
    write(host, segment, 0, b"good")
    descriptor = host.shared(segment)

    def look() -> None:
        if mmap.mmap(descriptor, host.page, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)[:4] != b"good":
            raise OSError(errno.EIO, "wrong bytes")

    assert refusals({"look": look}, NOBODY) == {"look": 0}


def test_the_same_user_is_kept_from_accidents_only(host: Device) -> None:
    """docs/security.md: through this descriptor nothing can be written, but its owner may open it anew."""
    segment = host.create(host.page)
    found = refusals(attempts_on(host.shared(segment), host.page), None)
    assert all(found[name] in REFUSED for name in ("write", "truncate", "punch", "map"))
    assert (found["chmod"], found["reopen_to_read"]) == (0, 0)


def test_segments_are_sealed_against_resizing_and_more_seals(host: Device) -> None:
    segment = host.create(2 * host.page)
    descriptor = host.writable(segment)
    assert stat.S_IMODE(os.fstat(descriptor).st_mode) == 0o400
    for size in (host.page, 3 * host.page):
        with pytest.raises(PermissionError):
            os.ftruncate(descriptor, size)
    with pytest.raises(PermissionError):
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    write(host, segment, 0, b"a loader still can")


def test_a_private_mapping_keeps_its_writes_to_itself(host: Device) -> None:
    segment = host.create(host.page)
    write(host, segment, 0, b"shared")
    mine, yours = (
        mmap.mmap(
            host.shared(segment), host.page, flags=mmap.MAP_PRIVATE,
            prot=mmap.PROT_READ | mmap.PROT_WRITE,
        )
        for _ in range(2)
    )  # fmt: skip
    mine[:6] = b"mine!!"
    assert (mine[:6], yours[:6], read(host, segment, 0, 6)) == (b"mine!!", b"shared", b"shared")
    mine.close()
    yours.close()


def test_a_released_segment_lives_on_under_a_mapping(host: Device) -> None:
    segment = host.create(host.page)
    write(host, segment, 0, b"still here")
    mapping = mmap.mmap(host.shared(segment), host.page, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)
    host.release(segment)
    host.create(host.page)
    assert mapping[:10] == b"still here"
    mapping.close()


# -- how much there is -------------------------------------------------------------------------------------------------


def test_the_capacity_is_the_lowest_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for limit, expected in ((None, machine), (1 << 20, 1 << 20), (machine * 4, machine)):
        monkeypatch.setattr(host_device, "memory_limit", lambda limit=limit: limit)
        assert HostDevice().capacity() == expected
