"""What every access of a loader to segments promises (devices/segment_io.py): on the host, and on a GPU both ways.

The double's streams are lazy: a copy happens as late as it may. So a buffer that is reused, or looked into, too early
gives wrong bytes here every time.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from support import fakecuda
from support.backends import CUDA, EVERY, Backend
from support.daemon import environment
from support.descriptors import counted
from support.worker import Worker
from weightd.errors import DeviceError
from weightd_daemon.devices.access import open_io
from weightd_daemon.devices.device import DeviceSegment
from weightd_daemon.devices.segment_io import PIECE, DeviceSegmentIO, DeviceStaging

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SIZE = 4 * PIECE
SEGMENTS = 3
MORE_THAN_A_RING = 11
"""Pieces: more than any staging has buffers, fewer than the segments hold."""

every_backend = pytest.mark.backends(*EVERY)


class Memory:
    """Segments 0, 1, 2 of `SIZE` zeroes, and a way to look into them that is not the loader's."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self._holder: Worker | None = None
        make = {"host": self._memfd, "cuda_vmm": self._exported, "cuda_ipc": self._held}[backend.kind]
        self.handles = {number: DeviceSegment(number, SIZE, make(number)) for number in range(SEGMENTS)}

    def content(self, number: int) -> bytes:
        """All bytes of a segment."""
        handle = self.handles[number].handle
        if self._holder is not None:
            return bytes.fromhex(self._holder.run(_CONTENT, number=number, size=SIZE))
        assert isinstance(handle, int)
        return os.pread(handle, SIZE, 0) if self.backend.is_host else _imported(handle)

    def close(self) -> None:
        """Give the segments up."""
        if self._holder is not None:
            self._holder.close()
        for segment in self.handles.values():
            if isinstance(segment.handle, int):
                os.close(segment.handle)

    def _memfd(self, _: int) -> int:
        descriptor = os.memfd_create("segment")
        os.ftruncate(descriptor, SIZE)
        return descriptor

    def _exported(self, _: int) -> int:
        from weightd._mapping import cuda_driver

        cuda_driver.initialise()
        allocation = cuda_driver.create(0, SIZE)
        descriptor = cuda_driver.export(allocation)
        cuda_driver.release(allocation)
        return descriptor

    def _held(self, number: int) -> bytes:
        """A handle of another process's memory: nobody can open a handle of its own."""
        if self._holder is None:
            self._holder = Worker(Path("/nonexistent"), self.backend.environment)
            self._holder.run("from weightd._mapping.cuda_driver import call, ipc_handle, on_device; held = {}")
        return bytes.fromhex(self._holder.run(_HOLD, number=number, size=SIZE))


_HOLD = """
with on_device(0):
    held[number] = int(call("cuMemAlloc", size))
    call("cuMemsetD8", held[number], 0, size)
    call("cuCtxSynchronize")
    result = ipc_handle(held[number]).hex()
"""

_CONTENT = """
with on_device(0):
    found = bytearray(size)
    call("cuMemcpyDtoH", found, held[number], size)
    result = found.hex()
"""


def _imported(descriptor: int) -> bytes:
    from weightd._mapping import cuda_driver

    allocation = cuda_driver.import_descriptor(descriptor)
    addresses = cuda_driver.MappedAddressRange(0, SIZE)
    addresses.map(0, SIZE, allocation)
    addresses.allow(writable=False)
    cuda_driver.release(allocation)
    found = bytearray(SIZE)
    with cuda_driver.on_device(0):
        cuda_driver.call("cuMemcpyDtoH", found, addresses.address, SIZE)
    addresses.close()
    return bytes(found)


@pytest.fixture
def memory(backend: Backend) -> Iterator[Memory]:
    """Segments. A test closes what it opens; nothing of it may be left."""
    made = Memory(backend)
    before = counted()
    yield made
    assert "/memfd:fakecuda" not in Path("/proc/self/maps").read_text()
    assert backend.is_real_gpu or counted() == before  # what the real driver keeps looks like an exported descriptor
    made.close()
    assert not backend.device_bytes()


@contextlib.contextmanager
def opened(memory: Memory) -> Iterator[tuple[DeviceSegmentIO, DeviceStaging]]:
    """Access to the segments, and one staging."""
    io = open_io(memory.backend.kind, memory.backend.uuid, memory.handles)
    with contextlib.closing(io), contextlib.closing(io.staging()) as staging:
        yield io, staging


def pattern(seed: int, size: int) -> bytes:
    """`size` bytes that differ from those of other seeds, and from piece to piece."""
    return bytes((seed * 37 + at) % 251 for at in range(251)) * (size // 251) + bytes([seed % 251]) * (size % 251)


def write(staging: DeviceStaging, content: bytes, segment: int, offset: int) -> None:
    """Write in pieces; does not wait."""
    for at in range(0, len(content), PIECE):
        piece = content[at : at + PIECE]
        buffer = staging.acquire()
        buffer.view[: len(piece)] = piece
        staging.write(buffer, len(piece), segment, offset + at)


def read(staging: DeviceStaging, size: int, segment: int, offset: int) -> bytes:
    """Read in pieces."""
    found = b""
    while len(found) < size:
        piece = min(PIECE, size - len(found))
        buffer = staging.acquire()
        buffer.view[:piece] = bytes(piece)
        staging.read(buffer, piece, segment, offset + len(found))
        staging.synchronize()
        found += bytes(buffer.view[:piece])
        staging.put_back(buffer)
    return found


@every_backend
@pytest.mark.parametrize(
    ("offset", "size"),
    [
        (0, 1), (1, 1), (SIZE - 1, 1), (0, PIECE), (4099, PIECE), (12_345, PIECE - 1), (SIZE - PIECE, PIECE),
        (7, 3 * PIECE), (255, 2 * PIECE + 3), (0, SIZE),
    ],
)  # fmt: skip
def test_bytes_arrive_where_they_should_and_nowhere_else(memory: Memory, offset: int, size: int) -> None:
    content = pattern(1, size)
    with opened(memory) as (_, staging):
        write(staging, content, 1, offset)
        staging.synchronize()
        assert memory.content(1) == bytes(offset) + content + bytes(SIZE - offset - size)
        assert read(staging, size, 1, offset) == content
    assert memory.content(0) == memory.content(2) == bytes(SIZE)


@every_backend
def test_a_buffer_is_not_given_out_again_before_its_copy_is_done(memory: Memory) -> None:
    """Each write is of other bytes, there are more of them than buffers, and no wait but that of `acquire`."""
    pieces = [pattern(number, PIECE) for number in range(MORE_THAN_A_RING)]
    with opened(memory) as (_, staging):
        for number, piece in enumerate(pieces):
            write(staging, piece, *divmod(number * PIECE, SIZE))
        staging.synchronize()
    found = b"".join(memory.content(number) for number in range(SEGMENTS))
    assert found == b"".join(pieces) + bytes(len(found) - len(pieces) * PIECE)


@every_backend
def test_a_write_takes_the_bytes_as_they_are_then(memory: Memory) -> None:
    """What is in the buffer after the copy, and what is written to the same place later, come after."""
    with opened(memory) as (_, staging):
        for number in range(1, MORE_THAN_A_RING):
            write(staging, pattern(number, 5000), 0, 1000)
        assert read(staging, 5000, 0, 1000) == pattern(MORE_THAN_A_RING - 1, 5000)


@every_backend
def test_three_buffers_can_be_held_while_others_are_written(memory: Memory) -> None:
    with opened(memory) as (_, staging):
        held = [staging.acquire() for _ in range(3)]
        for number, buffer in enumerate(held):
            assert len(buffer.view) == PIECE
            assert buffer.address % 4096 == 0
            buffer.view[:] = pattern(number, PIECE)
        for number in range(MORE_THAN_A_RING):
            write(staging, pattern(number + 100, PIECE), 1, PIECE)
        assert [bytes(buffer.view) for buffer in held] == [pattern(number, PIECE) for number in range(3)]
        for buffer in held:
            staging.put_back(buffer)


@every_backend
def test_buffers_put_back_or_settled_are_there_again(memory: Memory) -> None:
    with opened(memory) as (_, staging):
        for _ in range(3 * MORE_THAN_A_RING):
            staging.put_back(staging.acquire())
        for _ in range(MORE_THAN_A_RING):
            write(staging, b"one", 0, 0)
            staging.synchronize()
        assert read(staging, 4, 0, 0) == b"one\0"


@every_backend
def test_two_reads_can_be_under_way_at_once(memory: Memory) -> None:
    """As where a loader compares: both are there when it has settled."""
    with opened(memory) as (_, staging):
        write(staging, pattern(1, PIECE), 0, 3)
        write(staging, pattern(2, PIECE), 1, 5)
        mine, theirs = staging.acquire(), staging.acquire()
        staging.read(mine, PIECE, 0, 3)
        staging.read(theirs, PIECE, 1, 5)
        staging.synchronize()
        assert (bytes(mine.view), bytes(theirs.view)) == (pattern(1, PIECE), pattern(2, PIECE))


@every_backend
def test_threads_copy_at_once_each_with_its_own_staging(memory: Memory) -> None:
    """Closing is the main thread's business, as in a loader."""
    count, rounds, length = 6, 12, 40_000
    stagings: list[DeviceStaging] = []
    errors: list[BaseException] = []
    start = threading.Barrier(count, timeout=60)

    def work(io: DeviceSegmentIO, thread: int) -> None:
        try:
            stagings.append(staging := io.staging())
            start.wait()
            for turn in range(rounds):
                for segment in range(SEGMENTS):
                    content = pattern(thread * rounds + turn, length)
                    write(staging, content, segment, (turn * count + thread) * length)
            for turn in range(rounds):
                expected = pattern(thread * rounds + turn, length)
                assert read(staging, length, turn % SEGMENTS, (turn * count + thread) * length) == expected
        except BaseException as error:  # noqa: BLE001  # raised by the test
            errors.append(error)

    with contextlib.closing(open_io(memory.backend.kind, memory.backend.uuid, memory.handles)) as io:
        threads = [threading.Thread(target=work, args=(io, number)) for number in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        for staging in stagings:
            staging.close()
    assert not errors, errors
    expected = b"".join(
        pattern(thread * rounds + turn, length) for turn in range(rounds) for thread in range(count)
    ).ljust(SIZE, b"\0")
    assert all(memory.content(segment) == expected for segment in range(SEGMENTS))


@every_backend
def test_closing_finishes_what_is_under_way(memory: Memory) -> None:
    with opened(memory) as (_, staging):
        write(staging, pattern(5, 3 * PIECE), 2, 99)
    assert memory.content(2)[99 : 99 + 3 * PIECE] == pattern(5, 3 * PIECE)


@every_backend
def test_closing_twice_and_with_buffers_taken_is_right(memory: Memory) -> None:
    """After an error a thread's buffers are wherever they were."""
    with opened(memory) as (io, staging):
        staging.acquire()
        write(staging, b"x", 0, 0)
        staging.close()
        with contextlib.closing(io.staging()) as another:
            assert read(another, 2, 0, 0) == b"x\0"


@every_backend
def test_segments_that_come_later_can_be_used(memory: Memory) -> None:
    late = memory.handles.pop(2)
    with opened(memory) as (_, staging):
        write(staging, b"early", 1, 0)
        memory.handles[2] = late
        write(staging, b"late", 2, 0)
        assert (read(staging, 5, 1, 0), read(staging, 5, 2, 0)) == (b"early", b"late\0")


@pytest.mark.backends(*CUDA)
def test_a_gpu_that_this_process_does_not_see_is_an_error(memory: Memory) -> None:
    with pytest.raises(DeviceError, match=r"the loader cannot use the device: GPU-00000000-.* is not visible"):
        open_io(memory.backend.kind, "GPU-00000000-0000-0000-0000-000000000000", memory.handles)


# -- errors of the driver ----------------------------------------------------------------------------------------------

UNDONE_BY = {
    "cuMemHostAlloc": "cuMemFreeHost",
    "cuStreamCreate": "cuStreamDestroy",
    "cuEventCreate": "cuEventDestroy",
    "cuMemImportFromShareableHandle": "cuMemRelease",
    "cuMemAddressReserve": "cuMemAddressFree",
    "cuMemMap": "cuMemUnmap",
    "cuIpcOpenMemHandle": "cuIpcCloseMemHandle",
}

# Uses segments 0 and 1 of the three. Each line of standard input is the faults of one run, which is a fork: importing
# is what takes time, and the driver is first called in the child. Answers: the errors, in order, what is left, and for
# which calls room was asked.
LOADER = """
import json, os, sys
from pathlib import Path
from cuda.bindings import driver
from support.descriptors import counted
from weightd.errors import WeightdError
from weightd_daemon.devices.device import DeviceSegment
from weightd_daemon.devices.access import open_io
from weightd_daemon.devices.segment_io import PIECE

kind, uuid, log, *handles = sys.argv[1:]
handles = [int(handle) if kind == "cuda_vmm" else bytes.fromhex(handle) for handle in handles]
segments = {number: DeviceSegment(number, 4 * PIECE, handle) for number, handle in enumerate(handles)}

asked = []

def run():
    to_close = []
    try:
        to_close.append(io := open_io(kind, uuid, segments, lambda error: asked.append(error.metadata["call"])))
        to_close.append(staging := io.staging())
        for number in range(8):
            staging.write(staging.acquire(), PIECE, number // 4, number % 4 * PIECE)
        staging.synchronize()
        staging.read(staging.acquire(), PIECE, 1, 0)
        staging.synchronize()
    except WeightdError as error:
        yield error
    for each in reversed(to_close):
        try:
            each.close()
        except WeightdError as error:
            yield error

for number, line in enumerate(sys.stdin):
    child = os.fork()
    if not child:
        os.environ |= {"FAKECUDA_FAIL": line.strip(), "FAKECUDA_LOG": f"{log}.{number}"}
        before = counted()
        # Without version, as in the double's log: cuda-bindings 12 has cuDeviceGetUuid_v2.
        errors = [[type(error).__name__, error.metadata.get("call", "").removesuffix("_v2")] for error in run()]
        mapped = Path("/proc/self/maps").read_text().count("/memfd:fakecuda")
        print(json.dumps([errors, mapped, counted() - before, asked]), flush=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, line
"""


@pytest.fixture
def run_loader(memory: Memory, tmp_path: Path) -> Callable[[list[str]], list[Any]]:
    """Run LOADER with each of the faults.

    Gives of each: errors, mappings left, descriptors left, for what room was asked, counts of calls.
    """

    def run(faults: list[str]) -> list[Any]:
        log = tmp_path / str(len(list(tmp_path.iterdir())))
        handles = [segment.handle for segment in memory.handles.values()]
        arguments = [handle.hex() if isinstance(handle, bytes) else str(handle) for handle in handles]
        command = [sys.executable, "-W", "error", "-c", LOADER, memory.backend.kind, memory.backend.uuid, str(log)]
        done = subprocess.run(
            [*command, *arguments], input="".join(f"{fault}\n" for fault in faults), text=True, capture_output=True,
            env=environment() | memory.backend.environment, timeout=100, check=False,
            pass_fds=[handle for handle in handles if isinstance(handle, int)],
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (0, ""), done
        return [
            (*json.loads(line), Counter(call.function for call in fakecuda.calls(Path(f"{log}.{number}"))))
            for number, line in enumerate(done.stdout.splitlines())
        ]

    return run


@pytest.mark.backends(*CUDA, double_only=True)
def test_segments_are_opened_once_as_they_are_first_used(run_loader: Callable[[list[str]], list[Any]]) -> None:
    ((errors, mapped, descriptors, asked, calls),) = run_loader([""])
    assert (errors, mapped, descriptors, asked) == ([], 0, 0, [])
    assert calls["cuMemImportFromShareableHandle"] + calls["cuIpcOpenMemHandle"] == 2


@pytest.mark.backends(*CUDA, double_only=True)
def test_whichever_call_fails_it_is_told_and_the_rest_is_given_back(
    run_loader: Callable[[list[str]], list[Any]],
) -> None:
    ((*_, calls),) = run_loader([""])
    cases = [(function, nth) for function in sorted(calls) for nth in range(1, calls[function] + 1)]
    assert len(cases) > 40
    outcomes = run_loader([f"{function}:999:{nth}" for function, nth in cases])
    for (function, nth), (errors, mapped, descriptors, _, made) in zip(cases, outcomes, strict=True):
        case = f"{function}, call {nth}"
        assert errors == [["DeviceError", "" if function == "cuInit" else function]], case
        for do, undo in UNDONE_BY.items():
            cannot = function == "cuMemUnmap" and undo == "cuMemAddressFree"
            assert made[undo] == made[do] - (function == do) - cannot, f"{case}: {undo}"
        if function not in UNDONE_BY.values():
            assert (mapped, descriptors) == (0, 0), case


@pytest.mark.backends(*CUDA, double_only=True)
def test_where_everything_fails_the_first_error_is_told_and_all_is_tried(
    run_loader: Callable[[list[str]], list[Any]],
) -> None:
    """As after a fault of the GPU, which sticks to the process."""
    ((*_, calls),) = run_loader([""])
    fails = {*UNDONE_BY.values(), "cuStreamSynchronize", "cuCtxSynchronize"} - {"cuMemRelease"}
    ((errors, *_, made),) = run_loader([",".join(f"{name}:700" for name in sorted(fails))])
    assert errors == [["DeviceError", "cuStreamSynchronize"]]
    for undo in set(UNDONE_BY.values()) - {"cuMemAddressFree"}:  # not while something is mapped there
        assert made[undo] == calls[undo], undo


@pytest.mark.backends(*CUDA, double_only=True)
def test_where_there_is_no_memory_for_the_loader_itself_room_is_asked_for_and_it_goes_on(
    run_loader: Callable[[list[str]], list[Any]],
) -> None:
    ((*_, calls),) = run_loader([""])
    takers = [*UNDONE_BY, "cuDevicePrimaryCtxRetain", "cuMemSetAccess"]
    cases = [(function, nth) for function in takers for nth in range(1, calls[function] + 1)]
    assert len(cases) > 10
    outcomes = run_loader([f"{function}:2:{nth}" for function, nth in cases])
    for (function, nth), (errors, mapped, descriptors, asked, made) in zip(cases, outcomes, strict=True):
        case = f"{function}, call {nth}"
        assert (errors, asked) == ([], [function]), case
        assert (mapped, descriptors) == (0, 0), case
        for do, undo in UNDONE_BY.items():
            assert made[undo] == made[do] - (function == do), f"{case}: {undo}"
