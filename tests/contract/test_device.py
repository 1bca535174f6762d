"""What every device promises (devices/device.py). A new device joins the list in `DEVICES`."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import resource
import stat
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from weightd_daemon.devices import host as host_device
from weightd_daemon.devices.host import HostDevice

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from weightd_daemon.devices.device import Device

DEVICES: dict[str, Callable[[], Device]] = {"host": HostDevice}
NOBODY = 65534
REFUSED = {errno.EACCES, errno.EPERM, errno.EBADF, errno.EINVAL}


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def write(device: Device, segment: int, offset: int, data: bytes) -> None:
    assert os.pwrite(device.writable(segment), data, offset) == len(data)


def read(descriptor: int, offset: int, length: int) -> bytes:
    return os.pread(descriptor, length, offset)


@pytest.fixture(params=sorted(DEVICES))
def device(request: pytest.FixtureRequest) -> Iterator[Device]:
    """A device; whatever a test leaves on it, closing it leaves no descriptor behind."""
    before = descriptors()
    made = DEVICES[request.param]()
    yield made
    made.close()
    assert descriptors() == before


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
    assert not any(read(device.shared(segment), 0, 8 * device.page))
    assert device.allocated(segment) == (0 if device.sparse else 8 * device.page)
    write(device, segment, device.page, b"x" * device.page)
    assert device.allocated(segment) == (device.page if device.sparse else 8 * device.page)


def test_clients_see_what_the_loader_writes(device: Device) -> None:
    segment = device.create(2 * device.page)
    write(device, segment, device.page - 3, b"across")
    assert read(device.shared(segment), device.page - 3, 6) == b"across"


def test_punching_gives_whole_pages_back_and_leaves_the_neighbours(device: Device) -> None:
    if not device.sparse:
        pytest.skip("this device keeps its memory until a segment is released")
    page = device.page
    segment = device.create(4 * page)
    write(device, segment, 0, b"x" * (4 * page))
    device.punch(segment, page, 2 * page)
    assert device.allocated(segment) == 2 * page
    assert read(device.shared(segment), 0, 4 * page) == b"x" * page + bytes(2 * page) + b"x" * page
    write(device, segment, page, b"again")
    assert read(device.shared(segment), page, 6) == b"again\0"


def test_releasing_leaves_no_descriptor(device: Device) -> None:
    before = descriptors()
    segments = [device.create(device.page) for _ in range(5)]
    assert descriptors() > before
    for segment in segments:
        device.release(segment)
    assert descriptors() == before
    with pytest.raises(KeyError):
        device.shared(segments[0])


def test_a_segment_that_cannot_be_made_leaves_nothing(device: Device) -> None:
    before = descriptors()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.open("/dev/null", os.O_RDONLY)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free + 1, hard))  # the first descriptor of a segment, and no second
    try:
        with pytest.raises((MemoryError, OSError)):
            device.create(device.page)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert descriptors() == before


def test_no_descriptor_survives_exec(device: Device) -> None:
    segment = device.create(device.page)
    assert not os.get_inheritable(device.writable(segment))
    assert not os.get_inheritable(device.shared(segment))


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
    assert read(host.shared(segment), 0, 4) == b"good"
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
    assert (mine[:6], yours[:6], read(host.shared(segment), 0, 6)) == (b"mine!!", b"shared", b"shared")
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


def fake_cgroups(monkeypatch: pytest.MonkeyPatch, files: dict[str, str]) -> None:
    """Let the parser read these files, and no others."""

    def read_text(self: Path) -> str:
        try:
            return files[str(self)]
        except KeyError:
            raise FileNotFoundError(errno.ENOENT, "not there", str(self)) from None

    monkeypatch.setattr(Path, "read_text", read_text)


GIB = 1 << 30
ROOT = "/sys/fs/cgroup"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, []),
        ({"/proc/self/cgroup": "0::/\n"}, []),
        ({"/proc/self/cgroup": "0::/\n", f"{ROOT}/memory.max": f"{GIB}\n"}, [GIB]),
        (
            {
                "/proc/self/cgroup": "0::/user.slice/a.scope\n",
                f"{ROOT}/user.slice/a.scope/memory.max": "max\n",
                f"{ROOT}/user.slice/memory.max": f"{2 * GIB}\n",
            },
            [2 * GIB],
        ),
        (
            {
                "/proc/self/cgroup": "4:memory:/old\n0::/a/b\n",
                f"{ROOT}/a/b/memory.max": f"{3 * GIB}\n",
                f"{ROOT}/a/memory.max": f"{2 * GIB}\n",
                "/sys/fs/memory.max": "1\n",
            },
            [3 * GIB, 2 * GIB],
        ),
    ],
)
def test_limits_of_control_groups(monkeypatch: pytest.MonkeyPatch, files: dict[str, str], expected: list[int]) -> None:
    with monkeypatch.context() as patch:
        fake_cgroups(patch, files)
        found = host_device._cgroup_limits()
    assert found == expected


def test_the_capacity_is_the_lowest_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for limits, expected in (([], machine), ([1 << 20, 1 << 30], 1 << 20), ([machine * 4], machine)):
        monkeypatch.setattr(host_device, "_cgroup_limits", lambda limits=limits: limits)
        assert HostDevice().capacity() == expected
