"""GPU memory that is given back while the GPU may read it, and while CUDA graphs are captured: on the fake driver."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.gpu_segments import check

each_kind = pytest.mark.parametrize("kind", ["cuda_vmm", "cuda_ipc"])
each_mode = pytest.mark.parametrize("mode", ["GLOBAL", "THREAD_LOCAL", "RELAXED"])

# A stream, captures of it, and a torch that queues its work there.
STREAM = """
import gc, sys, threading, time
from types import SimpleNamespace
from cuda.bindings import driver
from weightd._mapping import cuda_release
cuda_driver._enter(0)
stream = int(call("cuStreamCreate", 1))

def begin(mode="GLOBAL", stream=stream):
    call("cuStreamBeginCapture", stream, getattr(driver.CUstreamCaptureMode, f"CU_STREAM_CAPTURE_MODE_{mode}"))

def end(stream=stream):
    code, graph = driver.cuStreamEndCapture(stream)
    assert int(code) == 0, code

def use_torch(stream_id=3):
    current = SimpleNamespace(stream_id=stream_id, cuda_stream=stream)
    sys.modules["torch"] = SimpleNamespace(
        cuda=SimpleNamespace(is_initialized=lambda: True, current_stream=lambda ordinal: current)
    )

def queue_copy(buffer):
    copied = (ctypes.c_ubyte * buffer.size).from_address(int(call("cuMemHostAlloc", buffer.size, 0)))
    call("cuMemcpyDtoHAsync", ctypes.addressof(copied), int(buffer.handle), buffer.size, stream)
    return copied

def elsewhere(work):
    failed = []
    def run():
        try:
            work()
        except BaseException as error:  # for the assertion below
            failed.append(error)
    thread = threading.Thread(target=run)
    thread.start()
    thread.join(60)
    assert not failed and not thread.is_alive(), failed

def rules(text):
    path = Path(os.environ["FAKECUDA_RULES"])
    path.with_suffix(".new").write_text(text)
    path.with_suffix(".new").replace(path)  # the thread calls the driver, too

def released():
    assert weightd.wait_until_released(60)
    assert weightd.unreleased_bytes() == 0
"""


def rules_in(folder: Path) -> Path:
    """Where `rules` of the program writes what the driver is to do wrong."""
    path = folder / "rules"
    path.touch()
    return path


@each_kind
def test_work_on_the_stream_of_torch_is_done_before_anything_is_unmapped(
    kind: str, fake_driver: Path, tmp_path: Path
) -> None:
    check(
        fake_driver,
        STREAM
        + f"""
ended = []
use_torch()
segments = opened({kind!r}, wanted({kind!r}), ended)
copied = queue_copy(segments.buffer(0, 0, 256, 256))
rules("cuEventQuery:600")  # the work takes its time
del segments
assert weightd.unreleased_bytes() == SIZE and mapped() == 1 and not ended
assert not any(copied), "nobody has waited for it"
rules("")
released()
assert bytes(copied) == bytes(range(256))
assert ended == [0]
call("cuCtxSynchronize")
""",
        rules=rules_in(tmp_path),
    )


@each_kind
def test_the_stream_is_that_of_each_thread_in_which_a_buffer_was_made(kind: str, fake_driver: Path) -> None:
    check(
        fake_driver,
        STREAM
        + f"""
segments = opened({kind!r}, wanted({kind!r}))
copies = []
def work():
    use_torch()
    with cuda_driver.on_device(0):
        copies.append(queue_copy(segments.buffer(0, 0, 256, 256)))
    del sys.modules["torch"]
elsewhere(work)
del segments
released()
assert bytes(copies[0]) == bytes(range(256))
""",
    )


# `busy(stream)`: whether the work of that stream takes its time, until `busy` is another function.
BUSY = """
real, events = cuda_release.call, set()

def busy(stream):
    return False

def call_of_busy_gpu(name, *arguments):
    if name == "cuEventQuery" and arguments[0] in events and busy is not idle:
        raise cuda_driver.DeviceError("not ready", {"code": "CUDA_ERROR_NOT_READY"})
    if name == "cuEventRecord" and busy(int(arguments[1])):
        events.add(arguments[0])
    return real(name, *arguments)

idle, cuda_release.call = busy, call_of_busy_gpu
"""


def test_work_on_the_default_stream_is_waited_for_whatever_stream_torch_has(fake_driver: Path) -> None:
    check(
        fake_driver,
        STREAM
        + BUSY
        + """
use_torch()
ended = []
segments = opened("cuda_vmm", wanted("cuda_vmm"), ended)
segments.buffer(0, 0, 256, 256)
busy = lambda of: of != stream
del segments
assert mapped() == 1 and not ended
busy = idle
released()
assert ended == [0]
""",
    )


@pytest.mark.parametrize("stream", ["that of torch", "default"])
def test_work_of_other_gpus_that_can_access_the_memory_is_done_before_it_is_unmapped(
    stream: str, fake_driver: Path
) -> None:
    check(
        fake_driver,
        STREAM
        + BUSY
        + f"""
call("cuCtxPopCurrent")
cuda_driver._enter(1)
streams = {{0: stream, 1: int(call("cuStreamCreate", 1))}}
torch = SimpleNamespace(is_initialized=lambda: True)
torch.current_stream = lambda ordinal: SimpleNamespace(stream_id=3, cuda_stream=streams[ordinal])
sys.modules["torch"] = SimpleNamespace(cuda=torch)
ended = []
segments = opened("cuda_vmm", wanted("cuda_vmm"), ended, peers=True)
buffer = segments.buffer(0, 0, 256, 256)
stream, own = streams[1], [stream, int(cuda_release._markers[0])]
copied = queue_copy(buffer)
if {stream!r} == "default":
    busy = lambda of: of not in (*own, stream)
else:
    busy = lambda of: of == stream
del segments, buffer
assert mapped() == 1 and not ended
busy = idle
released()
assert ended == [0] and bytes(copied) == bytes(range(256))
call("cuStreamSynchronize", stream)
""",
        devices=2,
    )


def test_no_context_is_made_on_gpus_that_do_not_use_the_memory(fake_driver: Path) -> None:
    check(
        fake_driver,
        STREAM
        + """
segments = opened("cuda_vmm", wanted("cuda_vmm"), peers=True)
segments.buffer(0, 0, 256, 256)
assert segments.peers == ("cuda:1",)
del segments
assert mapped() == 0
assert [cuda_driver.is_active(ordinal) for ordinal in range(2)] == [True, False]
""",
        devices=2,
    )


def test_a_stream_that_another_library_lent_to_torch_is_not_touched(fake_driver: Path) -> None:
    """It may be destroyed by then. A torch that is being imported, or does not see the GPU, does no harm either."""
    check(
        fake_driver,
        STREAM
        + """
use_torch(stream_id=stream)
segments = opened("cuda_vmm", wanted("cuda_vmm"))
segments.buffer(0, 0, 256, 256)
call("cuStreamDestroy", stream)
del segments
assert mapped() == 0
def refuse(ordinal):
    raise RuntimeError("invalid device ordinal")
for cuda in (None, SimpleNamespace(is_initialized=lambda: True, current_stream=refuse)):
    sys.modules["torch"] = SimpleNamespace(cuda=cuda)
    segments = opened("cuda_vmm", wanted("cuda_vmm"))
    segments.buffer(0, 0, 256, 256)
    del segments
    assert mapped() == 0
""",
    )


@each_kind
def test_memory_of_which_nobody_had_a_buffer_waits_for_nothing(kind: str, fake_driver: Path) -> None:
    check(
        fake_driver,
        STREAM
        + f"""
ended = []
use_torch()
segments = opened({kind!r}, wanted({kind!r}), ended)
begin()
del segments
assert ended == [0]
end()
""",
    )


# -- captures ----------------------------------------------------------------------------------------------------------


@each_kind
@each_mode
def test_a_capture_survives_attaching_and_dropping_in_every_thread(kind: str, mode: str, fake_driver: Path) -> None:
    check(
        fake_driver,
        STREAM
        + f"""
found, ended = wanted({kind!r}, count=2, copies=2), []

def attach_and_drop():
    segments = opened({kind!r}, found, ended)
    buffers = [segments.buffer(number, copy, 256, 256) for number in range(2) for copy in range(2)]
    assert [read(buffer) for buffer in buffers] == [bytes(range(256))] * 4
    cycle = [segments, buffers]
    cycle.append(cycle)

attach_and_drop()
gc.collect()
cycles = opened({kind!r}, found, ended)
cycle = [cycles, cycles.buffer(0, 0, 0, 1), cycles.buffer(1, 1, 0, 1)]
cycle.append(cycle)
begin({mode!r})
del cycles, cycle
gc.collect()  # of what was attached before the capture
attach_and_drop()
elsewhere(attach_and_drop)
gc.collect()
try:
    opened({kind!r}, [found[0]._replace(handle=1 << 20 if {kind!r} == "cuda_vmm" else bytes(64))])
except cuda_driver.DeviceError:
    pass  # what was mapped until then is given back, too
end()
released()
assert len(ended) == 4 and mapped() == 0
""",
    )


@each_kind
@each_mode
def test_what_the_captured_stream_may_read_waits_for_the_end_of_the_capture(
    kind: str, mode: str, fake_driver: Path
) -> None:
    check(
        fake_driver,
        STREAM
        + f"""
use_torch()
ended = []
segments = opened({kind!r}, wanted({kind!r}), ended)
buffer = segments.buffer(0, 0, 256, 256)
copied = queue_copy(buffer)
begin({mode!r})
del segments, buffer
assert weightd.unreleased_bytes() == SIZE
assert not weightd.wait_until_released(0.05)  # while the thread tries again and again
assert not ended and mapped() == 1
end()
released()
assert ended == [0] and bytes(copied) == bytes(range(256))
""",
    )


def test_a_capture_that_begins_between_the_question_and_the_event_is_not_ended(fake_driver: Path) -> None:
    check(
        fake_driver,
        STREAM
        + """
use_torch()
segments = opened("cuda_vmm", wanted("cuda_vmm"))
segments.buffer(0, 0, 256, 256)
real, seen = cuda_release.call, []

def racing(name, *arguments):
    if name == "cuEventRecord" and arguments[1] == stream and not seen:
        seen.append(name)
        begin()
    return real(name, *arguments)

cuda_release.call = racing
del segments
assert seen and mapped() == 1
end()
released()
assert mapped() == 0
""",
    )


def test_an_event_that_a_capture_of_the_past_took_is_recorded_again(fake_driver: Path, tmp_path: Path) -> None:
    check(
        fake_driver,
        STREAM
        + """
segments = opened("cuda_vmm", wanted("cuda_vmm"))
segments.buffer(0, 0, 256, 256)
rules("cuEventQuery:907:1")
del segments
released()
assert mapped() == 0
""",
        rules=rules_in(tmp_path),
    )


@pytest.mark.parametrize(
    ("kind", "call", "code"),
    [
        ("cuda_vmm", "cuMemUnmap", 800),  # in a host function
        ("cuda_vmm", "cuMemUnmap", 908),  # during a capture
        ("cuda_ipc", "cuIpcCloseMemHandle", 900),
        ("cuda_vmm", "cuEventRecord", 900),
        ("cuda_ipc", "cuEventCreate", 2),
        ("cuda_ipc", "cuThreadExchangeStreamCaptureMode", 800),
    ],
)
def test_a_call_that_is_refused_for_now_is_made_again(
    kind: str, call: str, code: int, fake_driver: Path, tmp_path: Path
) -> None:
    check(
        fake_driver,
        STREAM
        + f"""
ended = []
segments = opened({kind!r}, wanted({kind!r}), ended)
segments.buffer(0, 0, 256, 256)
rules("{call}:{code}")
del segments
assert mapped() == 1 and weightd.unreleased_bytes() == SIZE
rules("")
released()
assert mapped() == 0 and len(ended) == 1
""",
        rules=rules_in(tmp_path),
    )


@each_kind
def test_ctrl_c_while_memory_is_given_back_leaves_the_context_as_it_was(kind: str, fake_driver: Path) -> None:
    check(
        fake_driver,
        STREAM
        + f"""
call("cuCtxPopCurrent")
found, ended, heard = wanted({kind!r}), [], []
segments = opened({kind!r}, found, ended)
segments.buffer(0, 0, 0, 1)
real, main = cuda_release.call, threading.current_thread()

def interrupted(name, *arguments):
    if name == "cuEventQuery" and threading.current_thread() is main:
        raise KeyboardInterrupt
    return real(name, *arguments)

sys.unraisablehook = lambda heard_of: heard.append(heard_of.exc_type)
cuda_release.call = interrupted
del segments
assert heard and set(heard) == {{KeyboardInterrupt}}
assert int(call("cuCtxGetCurrent")) == 0
del heard[:]
released()
assert ended == [0]
""",
    )


def test_ctrl_c_while_torch_is_asked_for_its_stream_loses_nothing(fake_driver: Path) -> None:
    check(
        fake_driver,
        STREAM
        + BUSY
        + """
ended, heard = [], []
segments = opened("cuda_vmm", wanted("cuda_vmm"), ended)
segments.buffer(0, 0, 0, 1)

def interrupt(ordinal):
    raise KeyboardInterrupt

sys.unraisablehook = lambda heard_of: heard.append(heard_of.exc_type)
sys.modules["torch"] = SimpleNamespace(cuda=SimpleNamespace(is_initialized=lambda: True, current_stream=interrupt))
busy = lambda of: True
del segments
del sys.modules["torch"]
assert heard == [KeyboardInterrupt] and not ended
busy = idle
del heard[:]
released()
assert ended == [0] and mapped() == 0
""",
    )


@each_kind
def test_threads_may_give_memory_back_at_the_same_time(kind: str, fake_driver: Path, tmp_path: Path) -> None:
    """Some of it at once, and some later, by the thread that does that."""
    check(
        fake_driver,
        STREAM
        + f"""
sys.setswitchinterval(1e-5)
found, ended = wanted({kind!r}), []

def work():
    for _ in range(20):
        segments = opened({kind!r}, found, ended)
        segments.buffer(0, 0, 0, 1)

threads = [threading.Thread(target=work) for _ in range(8)]
for thread in threads:
    thread.start()
while any(thread.is_alive() for thread in threads):
    rules("cuEventQuery:600")
    rules("")
released()
assert len(ended) == 160 and mapped() == 0
""",
        rules=rules_in(tmp_path),
    )


# -- the thread --------------------------------------------------------------------------------------------------------


@each_kind
def test_without_a_thread_to_give_memory_back_nothing_is_attached(kind: str, fake_driver: Path) -> None:
    source = f"""
import threading
from weightd._mapping import cuda_release
found, ended = wanted({kind!r}), []

def refuse(self):
    raise RuntimeError("can't start new thread")

real, threading.Thread.start = threading.Thread.start, refuse
try:
    opened({kind!r}, found, ended)
except weightd.ResourceLimitError as error:
    print(error, error.limit)
threading.Thread.start = real
assert ended == [0]
assert read(opened({kind!r}, found).buffer(0, 0, 256, 256)) == bytes(range(256))
"""
    told = "this process cannot start a thread: can't start new thread; raise `ulimit -u` RLIMIT_NPROC\n"
    assert check(fake_driver, source) == told


@each_kind
def test_what_waits_in_the_parent_is_not_the_childs(kind: str, fake_driver: Path) -> None:
    check(
        fake_driver,
        STREAM
        + f"""
import warnings
warnings.simplefilter("ignore", DeprecationWarning)  # of Python 3.12 and later, for a fork beside threads
use_torch()
ended = []
segments = opened({kind!r}, wanted({kind!r}), ended)
segments.buffer(0, 0, 0, 1)
begin()
del segments
child = os.fork()
if child == 0:
    os._exit(0 if weightd.unreleased_bytes() == 0 and len(ended) == 1 else 1)
assert os.waitpid(child, 0)[1] == 0
assert weightd.unreleased_bytes() == SIZE and not ended
end()
released()
assert ended == [0]
""",
    )


@each_kind
def test_the_interpreter_ends_silently_while_memory_waits(kind: str, fake_driver: Path) -> None:
    check(
        fake_driver,
        STREAM
        + f"""
use_torch()
segments = opened({kind!r}, wanted({kind!r}))
segments.buffer(0, 0, 0, 1)
begin()
del segments
assert weightd.unreleased_bytes() == SIZE
""",
    )


def test_functions_of_atexit_may_wait_when_the_thread_has_ended(fake_driver: Path) -> None:
    told = check(
        fake_driver,
        """
import atexit

@atexit.register  # before the module's own, so it is called after that
def last():
    assert not cuda_release._thread.is_alive()
    print(weightd.wait_until_released(0))
    end()
    print(weightd.wait_until_released(), len(ended))  # the handles of CUDA IPC are closed by the end of the process

"""
        + STREAM
        + """
use_torch()
ended = []
segments = opened("cuda_vmm", wanted("cuda_vmm"), ended)
segments.buffer(0, 0, 0, 1)
begin()
del segments
""",
    )
    assert told == "False\nTrue 1\n"


def test_many_that_come_while_all_are_tried_are_one_reason_to_try_again(fake_driver: Path, tmp_path: Path) -> None:
    check(
        fake_driver,
        STREAM
        + """
found, passes, going, free = wanted("cuda_vmm"), [], threading.Event(), threading.Event()
real = cuda_release._attempt_all

def pass_():
    passes.append(len(cuda_release._waiting))
    if cuda_release._waiting:
        going.set()
        assert free.wait(60)
    real()

cuda_release._attempt_all = pass_
rules("cuEventQuery:600")
for number in range(100):
    segments = opened("cuda_vmm", found)
    segments.buffer(0, 0, 0, 1)
    del segments
    assert going.wait(60)
before = len(passes)
free.set()
while not cuda_release._wake.empty():
    time.sleep(0.001)
assert len(passes) <= before + 1, passes
rules("")
released()
""",
        rules=rules_in(tmp_path),
    )


def test_ctrl_c_while_the_thread_starts_leaves_one_of_them(fake_driver: Path) -> None:
    check(
        fake_driver,
        STREAM
        + """
found, ended = wanted("cuda_vmm"), []
real = threading.Thread.start

def interrupted(self):
    real(self)
    raise KeyboardInterrupt

threading.Thread.start = interrupted
try:
    opened("cuda_vmm", found, ended)
except KeyboardInterrupt:
    pass
threading.Thread.start = real
assert len(ended) == 1
opened("cuda_vmm", found).buffer(0, 0, 0, 1)
assert [thread.name for thread in threading.enumerate()].count("weightd-release") == 1
released()
""",
    )


@each_kind
def test_another_thread_is_started_where_one_has_died(kind: str, fake_driver: Path, tmp_path: Path) -> None:
    """It goes on with what waits, and until there is one, who waits for memory does that."""
    check(
        fake_driver,
        STREAM
        + f"""
found, ended = wanted({kind!r}), []
real = cuda_release._attempt_all

def die():
    if threading.current_thread() is cuda_release._thread:
        raise SystemExit  # of which threads tell nobody
    real()

def drop():
    rules("cuEventQuery:600")
    segments = opened({kind!r}, found, ended)
    segments.buffer(0, 0, 0, 1)
    del segments
    rules("")

cuda_release._attempt_all = die
drop()
cuda_release._thread.join(60)
released()
drop()
cuda_release._thread.join(60)
cuda_release._attempt_all = real
assert len(ended) == 1
opened({kind!r}, found)
while len(ended) < 2:
    time.sleep(0.001)
""",
        rules=rules_in(tmp_path),
    )


# -- what waits --------------------------------------------------------------------------------------------------------


def test_bytes_that_are_mapped_twice_wait_once(fake_driver: Path, tmp_path: Path) -> None:
    check(
        fake_driver,
        STREAM
        + """
segments = opened("cuda_vmm", wanted("cuda_vmm", count=2, copies=3))
segments.buffer(0, 0, 0, 1)
rules("cuEventQuery:600")
del segments
assert mapped() == 6 and weightd.unreleased_bytes() == 2 * SIZE
rules("")
released()
""",
        rules=rules_in(tmp_path),
    )


def test_a_handle_that_another_attachment_uses_does_not_wait(fake_driver: Path, tmp_path: Path) -> None:
    check(
        fake_driver,
        STREAM
        + """
found = wanted("cuda_ipc", count=2)
both, one = opened("cuda_ipc", found), opened("cuda_ipc", found[:1])
both.buffer(0, 0, 0, 1)
one.buffer(0, 0, 0, 1)
rules("cuEventQuery:600")
del both
assert mapped() == 2 and weightd.unreleased_bytes() == SIZE
del one
assert mapped() == 2 and weightd.unreleased_bytes() == 2 * SIZE
rules("")
released()
assert mapped() == 0
""",
        rules=rules_in(tmp_path),
    )
