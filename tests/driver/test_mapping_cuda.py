"""GPU memory in a client, on the fake driver, in processes of their own: what is mapped, kept and given back."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from support import fakecuda
from support.gpu_segments import check, python

KINDS = ["cuda_vmm", "cuda_ipc"]
each_kind = pytest.mark.parametrize("kind", KINDS)


@each_kind
def test_a_buffer_is_the_bytes_of_its_segment(kind: str, fake_driver: Path) -> None:
    source = f"""
segments = opened({kind!r}, wanted({kind!r}, count=3))
for number in range(3):
    buffer = segments.buffer(number, 0, 128, 1000)
    assert buffer.size == 1000
    assert read(buffer) == contents(number)[128:1128]
assert buffer.__dlpack_device__() == (2, 0)
assert segments.torch_device == "cuda:0"
try:
    segments.buffer(3, 0, 0, 1)
except KeyError:
    print("no such segment")
"""
    assert check(fake_driver, source) == "no such segment\n"


def test_vmm_memory_is_read_only_for_the_device(fake_driver: Path) -> None:
    source = """
ended = []
segments = opened("cuda_vmm", wanted("cuda_vmm"), ended)
buffer = segments.buffer(0, 0, 256, 256)
try:
    with cuda_driver.on_device(0):
        call("cuMemsetD8", int(buffer.handle), 1, 1)
        call("cuCtxSynchronize")
except cuda_driver.DeviceError as error:
    print(error.code)
assert read(buffer) == bytes(range(256))
del segments, buffer  # the context is dead: that must not be heard, and the lease ends
assert len(ended) == 1
"""
    assert check(fake_driver, source) == "CUDA_ERROR_ILLEGAL_ADDRESS\n"


def test_a_store_into_vmm_memory_faults(fake_driver: Path) -> None:
    source = """
buffer = opened("cuda_vmm", wanted("cuda_vmm")).buffer(0, 0, 256, 256)
ctypes.memset(int(buffer.handle), 1, 1)
"""
    assert python(fake_driver, source).returncode == -signal.SIGSEGV


@each_kind
def test_names_of_one_place_have_addresses_of_their_own(kind: str, fake_driver: Path) -> None:
    check(
        fake_driver,
        f"""
segments = opened({kind!r}, wanted({kind!r}, count=2, copies=3))
for number in range(2):
    buffers = [segments.buffer(number, copy, 256, 512) for copy in range(3)]
    spans = sorted(int(buffer.handle) for buffer in buffers)
    assert all(one + 512 <= other for one, other in zip(spans, spans[1:])), spans
    assert {{read(buffer) for buffer in buffers}} == {{contents(number)[256:768]}}
""",
    )


@each_kind
def test_whatever_is_dropped_first_the_rest_stays_and_then_the_lease_ends(kind: str, fake_driver: Path) -> None:
    check(
        fake_driver,
        f"""
from itertools import permutations
found = wanted({kind!r}, count=2)
for order in permutations(range(3)):
    ended = []
    segments = opened({kind!r}, found, ended)
    kept = [segments, segments.buffer(0, 0, 0, 300), segments.buffer(1, 0, 512, 300)]
    del segments
    for number in order:
        assert not ended and mapped() == 2, order
        kept[number] = None
        if kept[1]:
            assert read(kept[1]) == contents(0)[:300], order
        if kept[2]:
            assert read(kept[2]) == contents(1)[512:812], order
    assert ended == [0], "the lease ends once, when nothing is mapped any more"
""",
    )


@each_kind
def test_the_default_stream_is_waited_for_before_anything_is_unmapped(
    kind: str, fake_driver: Path, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    check(
        fake_driver,
        f"""
segments = opened({kind!r}, wanted({kind!r}, count=2))
segments.buffer(1, 0, 0, 1)
os.environ["FAKECUDA_LOG"] = {str(log)!r}
del segments
del os.environ["FAKECUDA_LOG"]
""",
    )
    functions = [call.function for call in fakecuda.calls(log)]
    undone = "cuMemUnmap" if kind == "cuda_vmm" else "cuIpcCloseMemHandle"
    assert functions.count(undone) == 2
    assert functions.index("cuEventRecord") < functions.index("cuEventQuery") < functions.index(undone)


def test_a_handle_is_opened_once_and_closed_with_its_last_user(fake_driver: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    check(
        fake_driver,
        """
ended = []
segments = wanted("cuda_ipc")
first, second = (opened("cuda_ipc", segments, ended) for _ in range(2))
assert int(first.buffer(0, 0, 0, 1).handle) == int(second.buffer(0, 0, 0, 1).handle)
del first
assert ended == [1], "the other's memory stays"
buffer = second.buffer(0, 0, 256, 256)
del second
assert read(buffer) == bytes(range(256))
del buffer
assert ended == [1, 0]
third = opened("cuda_ipc", segments)
assert read(third.buffer(0, 0, 256, 256)) == bytes(range(256))
del third
""",
        log=log,
    )
    functions = [call.function for call in fakecuda.calls(log)]
    assert functions.count("cuIpcOpenMemHandle") == functions.count("cuIpcCloseMemHandle") == 2
    first_end = functions.index("cuEventQuery")  # the first lease ended before any handle was closed
    assert first_end < functions.index("cuIpcCloseMemHandle")


def test_a_copy_of_ipc_memory_is_made_when_asked_for_and_freed_with_its_last_buffer(fake_driver: Path) -> None:
    check(
        fake_driver,
        """
ended = []
segments = opened("cuda_ipc", wanted("cuda_ipc", copies=2), ended)
assert mapped() == 1
one, again = segments.buffer(0, 1, 256, 256), segments.buffer(0, 1, 256, 256)
assert int(one.handle) == int(again.handle) and mapped() == 2
[place] = segments.ranges()  # without the copy
assert (place.address, place.size, place.owner()) == (int(segments.buffer(0, 0, 0, 1).handle), SIZE, segments)
ctypes.memset(int(one.handle), 7, 256)
assert read(segments.buffer(0, 0, 256, 256)) == bytes(range(256))
del one, segments
assert ended and mapped() == 1, "a private copy keeps neither the lease nor the segment"
assert read(again) == bytes([7]) * 256
del again
assert mapped() == 0
""",
    )


def test_ipc_memory_is_writable_and_shared(fake_driver: Path) -> None:
    check(
        fake_driver,
        """
segments = opened("cuda_ipc", wanted("cuda_ipc"))
ctypes.memset(int(segments.buffer(0, 0, 0, 1).handle), 9, 1)
assert read(segments.buffer(0, 0, 0, 2)) == bytes([9, 0])
""",
    )


def test_a_handle_whose_exporter_is_gone_cannot_be_opened(fake_driver: Path) -> None:
    source = """
segments = wanted("cuda_ipc")
kill_exporters()
ended = []
try:
    opened("cuda_ipc", segments, ended)
except cuda_driver.DeviceError as error:
    print(error)
"""
    assert check(fake_driver, source) == "cuIpcOpenMemHandle failed with CUDA_ERROR_INVALID_VALUE; see `nvidia-smi`\n"


@each_kind
def test_a_forked_child_calls_nothing_and_its_parent_keeps_all(kind: str, fake_driver: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    output = check(
        fake_driver,
        f"""
import gc
segments = opened({kind!r}, found := wanted({kind!r}, copies=2))
buffers = [segments.buffer(0, copy, 256, 256) for copy in range(2)]
child = os.fork()
if child == 0:
    try:
        opened({kind!r}, found)
    except cuda_driver.ForkedError as error:
        print(error, flush=True)
    del segments, buffers
    gc.collect()
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
assert read(buffers[0]) == read(buffers[1]) == bytes(range(256))
""",
        log=log,
    )
    assert output == "CUDA does not survive a fork; start the process with `spawn`, and attach there\n"
    assert not [call for call in fakecuda.calls(log) if call.after_fork]


@each_kind
def test_the_device_goes_by_uuid_wherever_it_is_visible(kind: str, fake_driver: Path) -> None:
    source = f"""
names = [cuda_driver.uuid_of(ordinal) for ordinal in range(cuda_driver.device_count())]
for ordinal in range(len(names)):
    segments = opened({kind!r}, wanted({kind!r}, ordinal=ordinal), ordinal=ordinal)
    buffer = segments.buffer(0, 0, 256, 256)
    assert read(buffer) == bytes(range(256))
    assert buffer.__dlpack_device__() == (2, ordinal)
    print(names[ordinal], segments.torch_device)
"""
    zero, one = fakecuda.uuid(0), fakecuda.uuid(1)
    assert check(fake_driver, source, devices=2).split() == [zero, "cuda:0", one, "cuda:1"]
    assert check(fake_driver, source, devices=2, visible="1,0").split() == [one, "cuda:0", zero, "cuda:1"]
    assert check(fake_driver, source, devices=2, visible="1").split() == [one, "cuda:0"]


@each_kind
def test_a_device_that_is_not_visible_is_said_so(kind: str, fake_driver: Path) -> None:
    source = f"""
ended = []
try:
    open_segments({kind!r}, {fakecuda.uuid(0)!r}, wanted({kind!r}), Lease(ended))
except cuda_driver.DeviceMismatchError as error:
    print(error)
assert (ended, mapped()) == ([0], 0)
"""
    output = check(fake_driver, source, devices=2, visible="1")
    expected = f"{fakecuda.uuid(0)} is not visible to this process (CUDA_VISIBLE_DEVICES=1); it sees {fakecuda.uuid(1)}"
    assert output.strip() == expected


@each_kind
def test_where_only_the_manifest_is_attached_no_driver_is_needed(kind: str, fake_driver: Path) -> None:
    source = f"""
ended = []
segments = open_segments({kind!r}, "GPU-somewhere", [], Lease(ended))
assert ended, "nothing is mapped that needs a lease"
assert not cuda_driver.is_ours()
"""
    check(fake_driver, source, visible="")


@each_kind
def test_any_call_of_the_driver_may_fail_and_leaves_nothing(kind: str, fake_driver: Path, tmp_path: Path) -> None:
    """Each call of an attach and of its first tensors, in turn. `cuMemRelease` leaves what it refused to release."""
    log = tmp_path / "log"
    output = check(
        fake_driver,
        f"""
from collections import Counter
found = wanted({kind!r}, count=2, copies=2)
before = descriptors()

def attach(ended):
    segments = open_segments({kind!r}, {fakecuda.uuid(0)!r}, found, Lease(ended))
    return [segments.buffer(0, 1, 0, 256), segments.buffer(1, 0, 256, 256), segments.buffer(1, 1, 256, 256)]

attach([])
os.environ["FAKECUDA_LOG"] = {str(log)!r}
kept = attach([])
del os.environ["FAKECUDA_LOG"]
del kept
assert (mapped(), descriptors()) == (0, before)

seen = Counter()
for call in fakecuda.calls(Path({str(log)!r})):
    name = call.function
    seen[name] += 1
    ended = []
    os.environ["FAKECUDA_FAIL"] = f"{{name}}:999:{{seen[name]}}"
    try:
        attach(ended)
    except (cuda_driver.DeviceError, cuda_driver.DeviceMismatchError) as error:
        assert name in str(error), error
    else:
        raise AssertionError(f"{{name}} did not fail")
    finally:
        os.environ["FAKECUDA_FAIL"] = ""
    left = 1 if name == "cuMemRelease" else 0
    assert (mapped(), descriptors()) == (0, before + left), (name, mapped(), descriptors())
    before += left
    again = attach([])
    assert [read(buffer) for buffer in again] == [bytes(256), bytes(range(256)), bytes(range(256))], name
    del again
    assert len(ended) == 1, name
print(*seen)
""",
    )
    needed = {"cuda_vmm": {"cuMemAddressReserve", "cuMemImportFromShareableHandle", "cuMemMap", "cuMemSetAccess"}}
    assert needed.get(kind, {"cuIpcOpenMemHandle", "cuMemAlloc", "cuMemcpyDtoDAsync"}) <= set(output.split())


@each_kind
@pytest.mark.parametrize("name", ["cuInit", "cuDevicePrimaryCtxRetain"])
def test_a_driver_that_comes_up_late_is_tried_again(kind: str, name: str, fake_driver: Path) -> None:
    check(
        fake_driver,
        f"""
os.environ["FAKECUDA_FAIL"] = ""
found = wanted({kind!r})
cuda_driver._initialised_in = None  # as in a process that has called nothing so far
cuda_driver._contexts.clear()
os.environ["FAKECUDA_FAIL"] = "{name}:999:1"
try:
    open_segments({kind!r}, {fakecuda.uuid(0)!r}, found, None)
except (cuda_driver.DeviceError, cuda_driver.DeviceMismatchError) as error:
    assert "{name}" in str(error)
else:
    raise AssertionError("it did not fail")
assert mapped() == 0
assert read(opened({kind!r}, found).buffer(0, 0, 256, 256)) == bytes(range(256))
""",
    )


@each_kind
def test_a_failure_while_giving_back_is_not_heard_and_the_lease_ends(kind: str, fake_driver: Path) -> None:
    check(
        fake_driver,
        f"""
found = wanted({kind!r})
for name in ("cuThreadExchangeStreamCaptureMode", "cuEventCreate", "cuEventRecord", "cuEventQuery", "cuEventDestroy",
             "cuCtxPushCurrent", "cuCtxPopCurrent", "cuMemUnmap", "cuMemAddressFree", "cuIpcCloseMemHandle"):
    ended = []
    segments = opened({kind!r}, found, ended)
    segments.buffer(0, 0, 0, 1)
    os.environ["FAKECUDA_FAIL"] = f"{{name}}:999"
    del segments
    assert len(ended) == 1, name
    os.environ["FAKECUDA_FAIL"] = ""
    assert read(opened({kind!r}, found).buffer(0, 0, 256, 256)) == bytes(range(256)), name
""",
    )


@each_kind
def test_the_interpreter_ends_silently_with_live_buffers(kind: str, fake_driver: Path, tmp_path: Path) -> None:
    """The driver may be gone by then, and others may still use the memory: the end of the process unmaps it."""
    log = tmp_path / "log"
    check(
        fake_driver,
        f"""
import sys
found = wanted({kind!r}, copies=2)
segments, unused = opened({kind!r}, found), opened({kind!r}, found)
buffers = [segments.buffer(0, copy, 0, 100) for copy in range(2)]
capsule = buffers[1].__dlpack__()
sys.kept = segments, buffers  # they go late, and in a cycle later still
cycle = [segments, *buffers]
cycle.append(cycle)
os.environ["FAKECUDA_LOG"] = {str(log)!r}
""",
    )
    assert not log.exists(), "nothing is called any more"


@each_kind
def test_memory_may_be_given_back_in_the_midst_of_another_call(kind: str, fake_driver: Path) -> None:
    """As when the garbage collector runs while this thread holds the locks of the driver's module."""
    check(
        fake_driver,
        f"""
from weightd._mapping import cuda_ipc
ended = []
segments = opened({kind!r}, wanted({kind!r}, copies=2), ended)
buffers = [segments.buffer(0, copy, 0, 100) for copy in range(2)]
with cuda_driver._lock, cuda_ipc._lock:
    del segments, buffers
assert ended == [0]
""",
    )


# -- buffers -----------------------------------------------------------------------------------------------------------


@each_kind
def test_a_buffer_knows_its_device_in_a_thread_that_has_no_context(
    kind: str, fake_driver: Path, tmp_path: Path
) -> None:
    """The driver is asked where it has a context; later whoever takes the buffer asks it nothing."""
    log = tmp_path / "log"
    check(
        fake_driver,
        f"""
import threading
segments = opened({kind!r}, wanted({kind!r}, copies=2))
segments.buffer(0, 1, 0, 256)
found = []

def work():
    os.environ["FAKECUDA_LOG"] = {str(log)!r}
    found.append(segments.buffer(0, 0, 0, 256))
    asked = len(fakecuda.calls(Path({str(log)!r})))
    assert found[0].__dlpack_device__() == (2, 0) and found[0].__dlpack__()
    assert len(fakecuda.calls(Path({str(log)!r}))) == asked
    del os.environ["FAKECUDA_LOG"]
    assert int(call("cuCtxGetCurrent")) == 0
    found.append("done")

thread = threading.Thread(target=work)
thread.start()
thread.join(60)
assert found[1:] == ["done"]
""",
    )
    assert [call.function for call in fakecuda.calls(log)] == [
        "cuCtxPushCurrent",
        "cuPointerGetAttributes",
        "cuCtxPopCurrent",
    ]


@each_kind
def test_threads_may_make_the_first_buffers_of_a_process_at_the_same_time(kind: str, fake_driver: Path) -> None:
    check(
        fake_driver,
        f"""
import sys
from concurrent.futures import ThreadPoolExecutor
sys.setswitchinterval(1e-5)
segments = opened({kind!r}, wanted({kind!r}))
with ThreadPoolExecutor(8) as pool:
    found = list(pool.map(lambda number: segments.buffer(0, 0, 0, 256).size, range(8)))
assert found == [256] * 8
""",
    )


@each_kind
def test_a_driver_that_does_not_know_the_address_is_an_error(kind: str, fake_driver: Path) -> None:
    source = f"""
segments = opened({kind!r}, wanted({kind!r}))
os.environ["FAKECUDA_FAIL"] = "cuPointerGetAttributes:1"
try:
    segments.buffer(0, 0, 0, 256)
except cuda_driver.DeviceError as error:
    print(error, error.code)
"""
    code = "CUDA_ERROR_INVALID_VALUE"
    assert check(fake_driver, source) == f"cuPointerGetAttributes failed with {code}; see `nvidia-smi` {code}\n"


@each_kind
def test_an_address_that_the_driver_does_not_know_is_an_error_and_no_tensor_of_the_cpu(
    kind: str, fake_driver: Path
) -> None:
    source = f"""
from weightd._mapping.cuda_buffer import make_buffer
segments = opened({kind!r}, wanted({kind!r}))
memory = ctypes.create_string_buffer(256)
try:
    make_buffer(0, ctypes.addressof(memory), 256, memory)
except cuda_driver.DeviceError as error:
    print(error)
"""
    assert check(fake_driver, source) == (
        "the driver says that memory attached on cuda:0 is of another device: DLPack's (1, 0)\n"
    )


# -- statuses that the bindings do not know ----------------------------------------------------------------------------


@each_kind
def test_a_status_newer_than_the_bindings_is_an_error_like_any_other(kind: str, fake_driver: Path) -> None:
    source = f"""
found, ended = wanted({kind!r}), []
segments = opened({kind!r}, wanted({kind!r}))
os.environ["FAKECUDA_FAIL"] = "cuCtxPushCurrent:12345,cuMemAddressReserve:12345,cuIpcOpenMemHandle:12345"
for work in (lambda: opened({kind!r}, found, ended), lambda: segments.buffer(0, 0, 0, 1)):
    try:
        work()
    except cuda_driver.DeviceError as error:
        print(error.code)
assert len(ended) == 1
os.environ["FAKECUDA_FAIL"] = ",".join(f"{{name}}:12345" for name in ("cuMemUnmap", "cuIpcCloseMemHandle"))
del segments  # which prints nothing
"""
    assert check(fake_driver, source) == "CUDA_ERROR_12345\n" * 2


def test_how_older_bindings_say_that_they_do_not_know_a_status(fake_driver: Path) -> None:
    """12.9 looks the number up in a dictionary; any other KeyError is a fault of the caller."""
    source = """
from cuda.bindings import driver
def fail(error):
    def function(*arguments):
        raise error
    return function
for error in (KeyError(917), ValueError("917 is not a valid CUresult"), KeyError("name"), ValueError("negative")):
    driver.cuDriverGetVersion, driver.cuCtxPopCurrent = fail(error), fail(error)
    cuda_driver.bound.cache_clear()
    for work in (lambda: call("cuDriverGetVersion"), lambda: cuda_driver.bound("cuCtxPopCurrent")()):
        try:
            work()
        except cuda_driver.DeviceError as error:
            print(error.code, error.metadata["call"])
        except (KeyError, ValueError) as error:
            print(repr(error))
"""
    assert check(fake_driver, source).splitlines() == [
        "CUDA_ERROR_917 cuDriverGetVersion",
        "CUDA_ERROR_917 cuCtxPopCurrent",
        "CUDA_ERROR_917 cuDriverGetVersion",
        "CUDA_ERROR_917 cuCtxPopCurrent",
        *["KeyError('name')"] * 2,
        *["ValueError('negative')"] * 2,
    ]


# -- other threads -----------------------------------------------------------------------------------------------------


def test_other_threads_run_while_the_driver_takes_its_time(fake_driver: Path, tmp_path: Path) -> None:
    """cuda-bindings 12.9.0 held the GIL in every call: then nobody would remove the file, and the call never return.

    cuPointerGetAttributes is not among them: cuda.core 1.2 asks it for a buffer's device, and holds the GIL.
    """
    check(
        fake_driver,
        """
import threading
path, found = Path(os.environ["FAKECUDA_HANG_WHILE"]), wanted("cuda_vmm")
segments = opened("cuda_vmm", found)
cuda_driver._enter(0)
for name, work in {
    "cuMemImportFromShareableHandle": lambda: opened("cuda_vmm", found),
    "cuMemMap": lambda: opened("cuda_vmm", found),
    "cuMemSetAccess": lambda: opened("cuda_vmm", found),
    "cuMemUnmap": lambda: opened("cuda_vmm", found),
    "cuCtxSynchronize": lambda: call("cuCtxSynchronize"),
}.items():
    os.environ["FAKECUDA_HANG"] = name
    path.touch()
    other = threading.Timer(0.05, path.unlink)
    other.start()
    work()
    assert not path.exists(), name
    other.join(60)
""",
        hang="cuMemMap",
        hang_while=tmp_path / "hanging",
    )


# -- one range of addresses, and who may access it ---------------------------------------------------------------------


def test_all_segments_of_an_attachment_lie_in_one_range(fake_driver: Path) -> None:
    check(
        fake_driver,
        """
blocker = [opened("cuda_vmm", wanted("cuda_vmm")) for _ in range(2)]
del blocker[0]  # a hole that one segment would fit into
segments = opened("cuda_vmm", wanted("cuda_vmm", count=4, copies=2))
[(address, size, _)] = segments.ranges()
end = address
for place, length in sorted(segments.places().values()):
    assert place == end
    end += length
assert end == address + size == address + 8 * SIZE
whole = ctypes.string_at(address, size)
assert whole == b"".join(contents(number) * 2 for number in range(4))
""",
    )


def test_peers_get_access_where_they_are_asked_for(fake_driver: Path) -> None:
    source = """
from cuda.bindings import driver
def access(segments, ordinal):
    place = driver.CUmemLocation()
    place.type, place.id = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE, ordinal
    return int(call("cuMemGetAccess", place, segments.ranges()[0].address))
for peers in (False, True):
    segments = opened("cuda_vmm", wanted("cuda_vmm", ordinal=1, count=2), ordinal=1, peers=peers)
    print(segments.peers, [access(segments, ordinal) for ordinal in range(3)])
"""
    all_three = ["() [0, 1, 0]", "('cuda:0', 'cuda:2') [1, 1, 1]"]
    assert check(fake_driver, source, devices=3).splitlines() == all_three
    assert check(fake_driver, source, devices=3, no_peers=True).splitlines() == ["() [0, 1, 0]"] * 2


def test_ipc_memory_needs_no_peers(fake_driver: Path) -> None:
    source = """print(opened("cuda_ipc", wanted("cuda_ipc"), peers=True).peers)"""
    assert check(fake_driver, source, devices=2) == "()\n"


# -- fork --------------------------------------------------------------------------------------------------------------

FORKED = "CUDA does not survive a fork; start the process with `spawn`, and attach there\n"


@each_kind
def test_a_forked_child_gets_no_buffer_and_waits_for_no_lock(kind: str, fake_driver: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    source = f"""
import signal, threading, warnings
from weightd._mapping import cuda_ipc
warnings.simplefilter("ignore", DeprecationWarning)  # of Python 3.12 and later, for a fork beside threads
segments = opened({kind!r}, wanted({kind!r}, copies=2))
locked, forked = threading.Event(), threading.Event()

def other():
    with cuda_driver._lock, cuda_ipc._lock:  # as while another thread attaches
        locked.set()
        forked.wait(60)

thread = threading.Thread(target=other)
thread.start()
locked.wait(60)
child = os.fork()
if child == 0:
    signal.alarm(10)
    for copy in range(2):
        try:
            segments.buffer(0, copy, 0, 256)
        except cuda_driver.ForkedError as error:
            print(error, flush=True)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
forked.set()
thread.join(60)
"""
    assert check(fake_driver, source, log=log) == FORKED * 2
    assert not [call for call in fakecuda.calls(log) if call.after_fork]


def test_a_child_of_a_process_in_which_another_library_initialised_cuda_is_told_of_the_fork(fake_driver: Path) -> None:
    source = """
from cuda.bindings import driver
assert not driver.cuInit(0)[0]
child = os.fork()
if child == 0:
    try:
        cuda_driver.uuid_of(0)
    except cuda_driver.ForkedError as error:
        print(error, flush=True)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
"""
    assert check(fake_driver, source) == FORKED


# -- which GPU ---------------------------------------------------------------------------------------------------------


def test_the_uuid_is_that_of_the_newer_call_where_there_are_two(fake_driver: Path) -> None:
    """cuda-bindings 12 has both; the older one names the whole GPU where the device is a part of it (MIG)."""
    source = """
from types import SimpleNamespace
from cuda.bindings import driver
driver.cuDeviceGetUuid_v2 = lambda device: (driver.CUresult.CUDA_SUCCESS, SimpleNamespace(bytes=bytes(range(16))))
print(cuda_driver.uuid_of(0))
"""
    assert check(fake_driver, source) == "GPU-00010203-0405-0607-0809-0a0b0c0d0e0f\n"
