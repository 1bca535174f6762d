"""The questions of tools/gpu_probe.py about time: what calls and copies cost. Each function is a probe, as there."""

from __future__ import annotations

import ctypes
import os
import statistics
import time
from typing import TYPE_CHECKING

from _gpu_asking import MIB, ORDINAL, PATTERN, NoAnswerError, fill, mapped, question, read

from weightd._mapping import cuda_driver as driver
from weightd.errors import DeviceError

if TYPE_CHECKING:
    from collections.abc import Callable


def _cost_of_calls(size: int, number: int) -> str:
    """Microseconds of each call, medians over `number` allocations of `size` bytes that exist together."""
    times: dict[str, list[float]] = {}

    def each(name: str, function: Callable[..., object], *rows: list[object]) -> list[object]:
        results = []
        for row in zip(*rows, strict=True):
            start = time.perf_counter()
            results.append(function(*row))
            times.setdefault(name, []).append((time.perf_counter() - start) * 1e6)
        return results

    with driver.on_device(ORDINAL):
        sizes: list[object] = [size] * number
        try:
            created = each("create", lambda bytes_: driver.create(ORDINAL, bytes_), sizes)
        except DeviceError as error:
            raise NoAnswerError(f"the device has no {number} × {size // MIB} MiB: {error.code}") from None
        exported = each("export", driver.export, created)
        imported = each("import", driver.import_descriptor, exported)
        places = each("reserve", lambda bytes_: driver.MappedAddressRange(ORDINAL, bytes_), sizes)
        each("map", lambda place, allocation: place.map(0, size, allocation), places, imported)
        each("set access", lambda place: place.allow(writable=False), places)
        each("release", driver.release, imported)
        each("unmap", lambda place: driver.call("cuMemUnmap", place.address, size), places)
        each("free addresses", lambda place: driver.call("cuMemAddressFree", place.address, size), places)
        each("close", os.close, exported)
        each("release the last", driver.release, created)
    return "µs: " + ", ".join(f"{name} {statistics.median(values):,.0f}" for name, values in times.items())


def _register_costs() -> None:
    for label, size, number in (("2 MiB", 2 * MIB, 64), ("64 MiB", 64 * MIB, 16), ("1 GiB", 1024 * MIB, 8)):
        question(
            f"cost-{label.replace(' ', '').lower()}",
            f"What does each call cost for {label}?",
            f"{number} allocations at once, a context current; median of each call, Python's share of it",
            "the size of segments: large ones attach faster, small ones give memory back sooner",
        )(lambda size=size, number=number: _cost_of_calls(size, number))  # type: ignore[misc]


_register_costs()


@question(
    "scrubbing",
    "What does cuMemCreate cost by size, and does it zero memory that was used before?",
    "cuMemCreate of 256 MiB, 1 GiB and 4 GiB, median of 5 each; 64 MiB filled, released, created again, read",
    "whether the daemon must clear segments, and how long its driver calls take",
)
def _scrubbing() -> str:
    said = []
    with driver.on_device(ORDINAL):
        for size in (256 * MIB, 1024 * MIB, 4096 * MIB):
            times = []
            for _ in range(5):
                start = time.perf_counter()
                allocation = driver.create(ORDINAL, size)
                times.append(time.perf_counter() - start)
                driver.release(allocation)
            said.append(f"{size // MIB:,} MiB {statistics.median(times) * 1e3:.2f} ms")
        size = 64 * MIB
        for round_ in range(2):
            allocation = driver.create(ORDINAL, size)
            place = mapped(allocation, size, writable=True)
            if round_ == 0:
                fill(place.address, size)
            else:
                zeroed = "zero" if read(place.address, size).count(0) == size else "not all zero"
            place.close()
            driver.release(allocation)
    return f"{', '.join(said)}; memory that was used before reads {zeroed}"


@question(
    "copy-rate",
    "How fast are copies from pinned memory, by the number of copies under way?",
    "cuMemcpyHtoDAsync on one stream, an event for each buffer, into a cuMemCreate mapping; median of 3 × 0.2 s",
    "the number and size of a loader's pinned buffers, and the rate that a load is measured against",
)
def _copy_rate() -> str:
    said = []
    with driver.on_device(ORDINAL):
        size = 128 * MIB
        allocation = driver.create(ORDINAL, size)
        target = mapped(allocation, size, writable=True).address
        stream = driver.call("cuStreamCreate", 1)
        for piece, depth in ((MIB, 1), (MIB, 2), (MIB, 4), (MIB, 8), (64 * MIB, 1), (64 * MIB, 2)):
            rate = statistics.median(_copy_round(stream, target, size, piece, depth) for _ in range(3))
            said.append(f"{depth} × {piece // MIB} MiB {rate / 1e9:.1f} GB/s")
    return ", ".join(said)


def _copy_round(stream: object, target: int, size: int, piece: int, depth: int) -> float:
    """Bytes a second, with `depth` pinned buffers of `piece` bytes in turns."""
    buffers = [int(driver.call("cuMemHostAlloc", piece, 0)) for _ in range(depth)]
    events = [driver.call("cuEventCreate", 2) for _ in range(depth)]  # 2: without times
    for buffer in buffers:
        ctypes.memset(buffer, PATTERN, piece)
    done, start = 0, time.perf_counter()
    while time.perf_counter() - start < 0.2:
        for slot in range(depth):
            driver.call("cuEventSynchronize", events[slot])
            driver.call("cuMemcpyHtoDAsync", target + done % size, buffers[slot], piece, stream)
            driver.call("cuEventRecord", events[slot], stream)
            done += piece
    driver.call("cuStreamSynchronize", stream)
    rate = done / (time.perf_counter() - start)
    for buffer, event in zip(buffers, events, strict=True):
        driver.call("cuMemFreeHost", buffer)
        driver.call("cuEventDestroy", event)
    return rate
