"""Segments and attachments without a daemon: made here (host, CUDA VMM), or by a child that holds them (CUDA IPC)."""

from __future__ import annotations

import atexit
import ctypes
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import weightd
from support import fakecuda, gpu_program
from support.daemon import environment
from weightd._mapping import cuda_driver
from weightd._mapping.cuda_driver import call
from weightd._mapping.opening import open_segments
from weightd._mapping.segments import MappedSegments, SegmentToMap
from weightd._proto.v1 import handles_pb2
from weightd._transport.handle_socket import ReceivedDescriptors

SIZE = 2 << 20
Places = dict[str, tuple[str, tuple[int, ...], int, int]]
"""By name: dtype, shape, and offset and length in segment 0."""

_children: list[subprocess.Popen[str]] = []


def python(library: Path, source: str, **knobs: Any) -> subprocess.CompletedProcess[str]:
    """Run `source`, with this module's names, in a process on the fake GPU. Warnings are errors there, too."""
    return gpu_program.run(source, environment() | fakecuda.environment(library, **knobs), environment())


def check(library: Path, source: str, **knobs: Any) -> str:
    """Like `python`; what it prints. It must end with 0 and without a word on stderr."""
    done = python(library, source, **knobs)
    assert (done.returncode, done.stderr) == (0, ""), done
    return done.stdout


class Lease:
    """What segments keep. When it goes it notes how many fake segments are mapped at that moment."""

    def __init__(self, ended: list[int]) -> None:
        self._ended = ended

    def __del__(self) -> None:
        self._ended.append(mapped())


def contents(number: int) -> bytes:
    """What segment `number` holds."""
    return bytes([number]) * 256 + bytes(range(256)) * (SIZE // 256 - 1)


def received(
    kind: str, device: str, places: Places, *, says: str | None = None, attach: bool = True
) -> ReceivedDescriptors:
    """The answer to an attach of segment 0, or of the manifest only; `says` is the kind in it, if that is not true."""
    manifest = handles_pb2.Manifest(
        content_digest="sha256:" + "0" * 64, device=device, kind=kind if says is None else says,
        components=[""], files=[handles_pb2.ManifestFile(file="m.safetensors")], segment_bytes=[SIZE],
        names=list(places), file_indices=[0] * len(places), segments=[0] * len(places), variants=[0] * len(places),
        dtypes=[handles_pb2.DType.Value(f"DTYPE_{dtype}") for dtype, *_ in places.values()],
        ranks=[len(shape) for _, shape, *_ in places.values()],
        dimensions=[extent for _, shape, *_ in places.values() for extent in shape],
        offsets=[offset for *_, offset, _ in places.values()], lengths=[length for *_, length in places.values()],
        digests=bytes(16 * len(places)),
    )  # fmt: skip
    data = manifest.SerializeToString()
    reply = handles_pb2.AttachReply(lease=1, manifest_bytes=len(data), segments=[0] if attach else [])
    handles = [segment.handle for segment in wanted(kind)] if attach else []
    manifest = _memfd("manifest", data)
    return ReceivedDescriptors(reply, manifest, manifest, handles)


class _Nobody:
    """A line to a daemon that is not there."""

    def hold(self, lease: int, content_digest: str, device: str, mapping: object) -> None:
        pass

    def detach(self, lease: int) -> bool:
        return True


def attachment(kind: str, places: Places, *, device: str | None = None, **options: Any) -> weightd.Attachment:
    """An attachment to segment 0; see `received`."""
    name = device or ("host" if kind == "host" else cuda_driver.uuid_of(0))
    return weightd.Attachment(received(kind, name, places, **options), _Nobody())  # type: ignore[arg-type]  # enough of one


def wanted(kind: str, count: int = 1, copies: int = 1, ordinal: int = 0) -> list[SegmentToMap]:
    """Segments 0, 1, … of `SIZE` bytes that somebody has filled; "handle": of nothing. Descriptors are the caller's."""
    make = {"host": _files, "handle": _nowhere, "cuda_vmm": _exported, "cuda_ipc": _held}[kind]
    return [SegmentToMap(number, SIZE, handle, copies) for number, handle in enumerate(make(count, ordinal))]


def opened(
    kind: str,
    segments: Sequence[SegmentToMap],
    ended: list[int] | None = None,
    ordinal: int = 0,
    *,
    peers: bool = False,
) -> MappedSegments:
    """Map them; the lease that they keep notes its end in `ended`."""
    lease = Lease([] if ended is None else ended)
    return open_segments(kind, cuda_driver.uuid_of(ordinal), segments, lease, peers=peers)


def read(buffer: Any) -> bytes:
    """The bytes of a `cuda.core.Buffer`: the fake GPU's addresses are the host's."""
    return ctypes.string_at(int(buffer.handle), buffer.size)


def mapped() -> int:
    """How many mappings of fake GPU memory this process has."""
    return _mappings("memfd:fakecuda")


def manifests() -> int:
    """How many manifests are mapped, each of which is a lease."""
    return _mappings("memfd:manifest")


def descriptors() -> int:
    """How many descriptors of fake GPU memory this process has, the driver's own among them."""
    return sum("memfd:fakecuda" in _link(number) for number in os.listdir("/proc/self/fd"))


@atexit.register
def kill_exporters() -> None:
    """kill -9 whoever holds memory for this process; also at its end."""
    while _children:
        child = _children.pop()
        child.kill()
        child.wait(60)
        for pipe in (child.stdin, child.stdout):
            assert pipe is not None
            pipe.close()


def _mappings(name: str) -> int:
    return sum(name in line for line in Path("/proc/self/maps").read_text().splitlines())


def _memfd(name: str, data: bytes) -> int:
    descriptor = os.memfd_create(name)
    os.write(descriptor, data)
    return descriptor


def _files(count: int, _: int) -> list[int]:
    return [_memfd("segment", contents(number)) for number in range(count)]


def _nowhere(count: int, _: int) -> list[bytes]:
    return [bytes(64)] * count


def _link(number: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{number}")
    except OSError:  # that of the listing itself
        return ""


def _exported(count: int, ordinal: int) -> list[int]:
    cuda_driver.initialise()
    found = []
    for number in range(count):
        allocation = cuda_driver.create(ordinal, SIZE)
        found.append(cuda_driver.export(allocation))
        addresses = cuda_driver.MappedAddressRange(ordinal, SIZE)
        addresses.map(0, SIZE, allocation)
        addresses.allow(writable=True)
        ctypes.memmove(addresses.address, contents(number), SIZE)
        addresses.close()
        cuda_driver.release(allocation)
    return found


def _held(count: int, ordinal: int) -> list[bytes]:
    """Handles of a child's memory. It ends when its standard input does, however this process ends."""
    child = subprocess.Popen(
        [sys.executable, "-m", "support.gpu_segments", str(count), str(ordinal)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={name: value for name, value in os.environ.items() if name != "FAKECUDA_LOG"},
    )  # fmt: skip
    _children.append(child)
    assert child.stdout is not None
    return [bytes.fromhex(child.stdout.readline()) for _ in range(count)]


def _hold(count: int, ordinal: int) -> None:
    with cuda_driver.on_device(ordinal):
        for number in range(count):
            address = call("cuMemAlloc", SIZE)
            call("cuMemcpyHtoD", address, contents(number), SIZE)
            print(cuda_driver.ipc_handle(int(address)).hex(), flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    _hold(int(sys.argv[1]), int(sys.argv[2]))
