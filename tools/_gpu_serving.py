"""The questions of tools/gpu_probe.py about processes that serve: what an attach, a detach or a start does to them.

Each function is a probe, as in tools/_gpu_behaviour.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from _gpu_asking import (
    MIB,
    ORDINAL,
    SUCCESS,
    NoAnswerError,
    code,
    export_memory,
    is_double,
    mapped,
    peer,
    question,
    set_access,
)

from weightd._mapping import cuda_driver as driver
from weightd.errors import DeviceError

if TYPE_CHECKING:
    from collections.abc import Callable

_SIDE = 1024  # of a square bf16 matrix of 2 MiB

# -- CUDA graphs -------------------------------------------------------------------------------------------------------


@question(
    "capture",
    "Which calls end a stream's capture, or fail during it?",
    "cuStreamBeginCapture in each mode; a call, by the capturing thread or another, as it is or in relaxed mode "
    "(cuThreadExchangeStreamCaptureMode); does cuStreamEndCapture succeed? What is not named does neither",
    "what attach, detach and finalizers may call while anybody in the process captures a CUDA graph",
    seconds=90,
)
def _capture() -> str:
    from cuda.bindings import driver as cuda

    modes = cuda.CUstreamCaptureMode
    said = []
    with driver.on_device(ORDINAL):
        stream = driver.call("cuStreamCreate", 1)
        calls = _calls_of_a_client(stream)
        for mode in modes:
            for name, call in calls.items():
                fates: dict[str, list[str]] = {}
                for where, run in (
                    ("its thread", call),
                    ("another", lambda call=call: _elsewhere(call)),
                    ("its thread relaxed", lambda call=call: _relaxed(call)),
                    ("another relaxed", lambda call=call: _elsewhere(lambda: _relaxed(call))),
                ):
                    begun = code("cuStreamBeginCapture", stream, mode)
                    if begun != SUCCESS:
                        return "; ".join([*said, f"no further capture can begin: {begun}"])
                    answer = run()
                    end = code("cuStreamEndCapture", stream)
                    if (answer, end) != (SUCCESS, SUCCESS):
                        fate = f"{_short(answer)}, capture {'goes on' if end == SUCCESS else f'ends: {_short(end)}'}"
                        fates.setdefault(fate, []).append(where)
                label = mode.name.removeprefix("CU_STREAM_CAPTURE_MODE_").lower()
                said += [f"{label}, {name} by {' or '.join(threads)}: {fate}" for fate, threads in fates.items()]
    return "; ".join(said) or f"none of {', '.join(calls)}"


def _calls_of_a_client(stream: Any) -> dict[str, Callable[[], str]]:
    """What a client may have to do while somebody captures. Each returns the driver's word."""
    from cuda.bindings import driver as cuda

    size = driver.granularity(ORDINAL)
    descriptor = driver.export(driver.create(ORDINAL, size))
    spare = [mapped(driver.create(ORDINAL, size), size, writable=True) for _ in range(12)]  # three modes, four threads
    before, fresh = (driver.call("cuEventCreate", 2) for _ in range(2))  # 2: without times
    other = driver.call("cuStreamCreate", 1)
    driver.call("cuEventRecord", before, stream)
    driver.call("cuStreamSynchronize", stream)

    def record_and_query() -> None:
        driver.call("cuEventRecord", fresh, other)
        while code("cuEventQuery", fresh) == "CUDA_ERROR_NOT_READY":
            time.sleep(0.001)
        driver.call("cuEventQuery", fresh)

    return {
        "nothing": lambda: SUCCESS,
        "cuCtxSynchronize": lambda: code("cuCtxSynchronize"),
        "import, map and set access": lambda: _word(
            lambda: mapped(driver.import_descriptor(descriptor), size, writable=False)
        ),
        "unmap and free addresses": lambda: _word(spare.pop().close),
        "cuMemAlloc": lambda: code("cuMemAlloc", size),
        "cuStreamIsCapturing of it": lambda: code("cuStreamIsCapturing", stream),
        "cuStreamIsCapturing of the legacy stream": lambda: code("cuStreamIsCapturing", cuda.CUstream(1)),
        "cuEventQuery of an earlier event of it": lambda: code("cuEventQuery", before),
        "record and query of an event of another stream": lambda: _word(record_and_query),
    }


def _short(code: str) -> str:
    return code.replace("CUDA_ERROR_", "").replace("STREAM_CAPTURE_", "")


def _relaxed(call: Callable[[], str]) -> str:
    """What `call` returns while this thread lets others' captures live, where CUDA only holds it to be unsafe."""
    from cuda.bindings import driver as cuda

    before = driver.call("cuThreadExchangeStreamCaptureMode", cuda.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED)
    try:
        return call()
    finally:
        driver.call("cuThreadExchangeStreamCaptureMode", before)


def _word(step: Callable[[], object]) -> str:
    try:
        step()
    except DeviceError as error:
        return f"{error.metadata['call']} {error.code}"
    return SUCCESS


def _elsewhere(call: Callable[[], str]) -> str:
    """What `call` returns in another thread, or that it hangs."""
    answers = ["hangs"]

    def run() -> None:
        with driver.on_device(ORDINAL):
            answers.append(call())

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(10)
    return answers[-1]


# -- while the GPU is busy ---------------------------------------------------------------------------------------------


@question(
    "unmap-while-busy",
    "Does cuMemUnmap wait for the device?",
    "200 copies of 256 MiB on a stream, then cuMemUnmap of their source at once, timed; then synchronise",
    "whether a detach must wait first, as it does now",
)
def _unmap_while_busy() -> str:
    with driver.on_device(ORDINAL):
        source, stream = _start_copies()
        return _while_busy(lambda: code("cuMemUnmap", source.address, source.size), "cuMemUnmap", stream)


@question(
    "map-while-busy",
    "Does mapping memory wait for the device?",
    "200 copies of 256 MiB on a stream, then cuMemMap and cuMemSetAccess of other memory, timed; then synchronise",
    "whether an attach stalls a process that serves",
)
def _map_while_busy() -> str:
    with driver.on_device(ORDINAL):
        size = 64 * MIB
        allocation = driver.create(ORDINAL, size)
        place = driver.MappedAddressRange(ORDINAL, size)
        _, stream = _start_copies()

        def attach() -> str:
            place.map(0, size, allocation)
            return set_access(place.address, size, writable=False)

        return _while_busy(attach, "mapping", stream)


@question(
    "default-stream",
    "Does an event of an empty blocking stream come after the work of the default stream?",
    "200 copies of 256 MiB on the NULL stream; cuEventRecord in a blocking stream without work, and in one that does "
    "not block; cuEventQuery of both at once; cuEventSynchronize of the first, timed; then synchronise the NULL stream",
    "whether a detach may wait for the default stream by such an event, as it does now, without using that stream",
)
def _default_stream() -> str:
    with driver.on_device(ORDINAL):
        blocking, other = (driver.call("cuStreamCreate", flags) for flags in (0, 1))
        event, beside = (driver.call("cuEventCreate", 2) for _ in range(2))  # 2: without times
        _start_copies(0)
        driver.call("cuEventRecord", event, blocking)
        driver.call("cuEventRecord", beside, other)
        at_once, elsewhere = code("cuEventQuery", event), code("cuEventQuery", beside)
        waited = _while_busy(lambda: code("cuEventSynchronize", event), "waiting for the event", 0)
        return f"cuEventQuery: {at_once}, where the stream does not block: {elsewhere}; {waited}"


def _start_copies(stream: Any = None) -> tuple[driver.MappedAddressRange, Any]:
    """Enqueue a tenth of a second of work, on a stream of its own unless one is given. Returns the memory that is read,
    and the stream.
    """
    size = (2 if is_double() else 256) * MIB
    source, target = (mapped(driver.create(ORDINAL, size), size, writable=True) for _ in range(2))
    stream = driver.call("cuStreamCreate", 1) if stream is None else stream
    for _ in range(200):
        driver.call("cuMemcpyDtoDAsync", target.address, source.address, size, stream)
    return source, stream


def _while_busy(step: Callable[[], str], name: str, stream: Any) -> str:
    start = time.perf_counter()
    result = step()
    done = time.perf_counter()
    waited = code("cuStreamSynchronize", stream)
    end = time.perf_counter()
    milliseconds = [f"{seconds * 1e3:.1f} ms" for seconds in (done - start, end - done)]
    return f"{name}: {result} after {milliseconds[0]}; synchronising: {waited} after {milliseconds[1]} more"


# -- processes ---------------------------------------------------------------------------------------------------------


@question(
    "after-fork",
    "What does the driver say in a forked child?",
    "cuInit, fork; cuInit and cuDeviceGetCount in the child",
    "whether the library recognises a child whose parent had initialised the driver, and says so",
)
def _after_fork() -> str:
    driver.initialise()
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        with suppress(BaseException):  # a fork must not run on into its parent's code
            os.write(writer, f"cuInit: {code('cuInit', 0)}, cuDeviceGetCount: {code('cuDeviceGetCount')}".encode())
        os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    return os.read(reader, 4096).decode() or "the child ended without a word"


@question(
    "start",
    "How long does a process take until it can attach?",
    "imports, cuInit, the primary context, import of cuda.core; three processes, the first with cold files",
    "what docs/library.md says of the first attach: figures of attach alone leave this out",
)
def _start() -> str:
    program = (
        "import time\nclock = [time.perf_counter()]\ntick = lambda: clock.append(time.perf_counter())\n"
        "from weightd._mapping import cuda_driver\nfrom cuda.bindings import driver\ntick()\n"
        f"cuda_driver.initialise()\ntick()\ncuda_driver.on_device({ORDINAL}).__enter__()\ntick()\n"
        "from cuda.core import Buffer\ntick()\n"
        "print(*(round((end - start) * 1e3) for start, end in zip(clock, clock[1:])))"
    )
    said = []
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=True)
        parts = zip(("imports", "cuInit", "context", "cuda.core"), done.stdout.split(), strict=True)
        said.append(", ".join(f"{name} {milliseconds}" for name, milliseconds in parts))
    return f"ms: {'; '.join(said)}"


@question(
    "torch-on-readonly",
    "Do torch's kernels read a read-only mapping, and what does not work on it?",
    "bf16 products, copy to the host and to pinned memory, graph capture and replay, record_stream, sharing, resizing",
    "what docs/library.md lists as working on attached tensors",
    seconds=180,
)
def _torch_on_readonly() -> str:
    try:
        import torch
    except ImportError:
        raise NoAnswerError("torch is not installed") from None
    with peer(export_memory) as exporter:  # forked before this process touches the driver
        _, (descriptor,) = exporter.receive()
        driver.initialise()
        if is_double() or not torch.cuda.is_available():
            raise NoAnswerError("torch.cuda does not run here")
        from cuda.core import Buffer

        with driver.on_device(ORDINAL):
            size = driver.granularity(ORDINAL)
            place = mapped(driver.import_descriptor(descriptor), size, writable=False)
        whole = torch.from_dlpack(Buffer.from_handle(place.address, size, owner=place))
        tensor = whole[: 2 * _SIDE * _SIDE].view(torch.bfloat16).view(_SIDE, _SIDE)
        return f"device {tensor.device}; {'; '.join(_tries(torch, tensor))}"


def _tries(torch: Any, tensor: Any) -> list[str]:
    """What became of each thing that programs do with weights."""
    other = torch.randn(_SIDE, _SIDE, device="cuda", dtype=torch.bfloat16)
    private = tensor.clone()

    def graph() -> bool:
        out = torch.empty_like(other)
        torch.matmul(other, tensor, out=out)
        torch.cuda.synchronize()
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            torch.matmul(other, tensor, out=out)
        captured.replay()
        torch.cuda.synchronize()
        return bool(torch.equal(out, other @ private))

    tries: dict[str, Callable[[], object]] = {
        "product": lambda: torch.equal(other @ tensor, other @ private),
        "transposed product": lambda: torch.equal(other @ tensor.T, other @ private.T),
        "copy to the host": lambda: torch.equal(tensor.cpu(), private.cpu()),
        "copy to pinned memory": lambda: torch.equal(
            torch.empty(_SIDE, _SIDE, dtype=torch.bfloat16, pin_memory=True).copy_(tensor), private.cpu()
        ),
        "graph": graph,
        "is_pinned": tensor.is_pinned,
        "record_stream": lambda: tensor.record_stream(torch.cuda.Stream()),
        "_share_cuda_": lambda: bool(tensor.untyped_storage()._share_cuda_()),
        "resize_(0)": lambda: tensor.untyped_storage().resize_(0),
    }
    said = []
    for name, attempt in tries.items():
        try:
            said.append(f"{name}: {attempt()}")
        except Exception as error:  # noqa: BLE001  # whatever it raises is the answer
            said.append(f"{name}: {type(error).__name__}: {str(error).splitlines()[0][:100]}")
    return said
