"""Loads of files into host memory in this process: a thread is the loader, and `cat` the process that ends."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import xxhash

from support import checkpoints
from support.filled import WHO
from weightd._proto.v1 import handles_pb2
from weightd.errors import NotFoundError, WeightdError
from weightd.types import FileIdentity, SourceFile
from weightd_daemon.core import digest
from weightd_daemon.core.catalog import Catalog
from weightd_daemon.core.checkpoint import Checkpoint, CheckpointKey, Content
from weightd_daemon.core.events import CheckpointEvicted, CheckpointSealed, Event
from weightd_daemon.core.lease import LeasePeer, LeaseTable
from weightd_daemon.core.limits import UserLimits
from weightd_daemon.core.memory import MemoryAccounting
from weightd_daemon.core.store import ContentStore
from weightd_daemon.devices.host import HostDevice
from weightd_daemon.devices.reclaimer import DeviceReclaimer
from weightd_daemon.handles.manifest_file import encode_manifest, make_manifest
from weightd_daemon.loader import job
from weightd_daemon.loader.channel import LoaderChannel, LoaderChannelClosedError
from weightd_daemon.loads.fair_queue import LoadQueue
from weightd_daemon.loads.flight import InFlightLoad
from weightd_daemon.loads.instances import LoadedInstance
from weightd_daemon.loads.loader_process import LoadProcess
from weightd_daemon.loads.loads import Loads
from weightd_daemon.loads.request import LoadOutcome, LoadRequest
from weightd_daemon.loads.verification import LoadVerification

PEER = LeasePeer(1, 1, 1000, "")


class LoaderThreads:
    """Starts loaders as threads of this process, until `join`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.new_hasher: digest.NewHasher = digest.new_hasher
        """What the loaders hash with that are started from now on."""
        self.processes: list[subprocess.Popen[bytes]] = []
        """What stands for each loader: a kill of it ends the loader's channel."""
        self.channels: list[LoaderChannel] = []
        self._threads: list[threading.Thread] = []
        self._own = threading.local()
        signals = SimpleNamespace(
            SIGINT=signal.SIGINT, SIG_IGN=signal.SIG_IGN, signal=lambda *_: None, pause=self._pause
        )
        monkeypatch.setattr(job, "die_with", lambda _: True)
        monkeypatch.setattr(job, "signal", signals)
        monkeypatch.setattr(job, "LoaderChannel", self._channel)
        monkeypatch.setattr(LoadProcess, "_start", self._start)

    def die(self) -> None:
        """On a thread of the loader that was started last: have its process killed, and do nothing any more."""
        self.processes[-1].kill()
        raise LoaderChannelClosedError

    def join(self) -> None:
        """Wait until all have ended."""
        for thread in self._threads:
            thread.join(60)
            assert not thread.is_alive()

    def _start(self, _argv: Sequence[str], _inherited: Sequence[int]) -> tuple[LoadProcess, socket.socket]:
        control, loader_control = socket.socketpair()
        descriptors, loader_descriptors = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        process = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
        self.processes.append(process)
        arguments = [str(end.detach()) for end in (loader_control, loader_descriptors)]
        thread = threading.Thread(target=self._run, args=(arguments, process))
        self._threads.append(thread)
        thread.start()
        control.setblocking(False)
        return LoadProcess(process, control, descriptors), control

    def _run(self, arguments: list[str], process: subprocess.Popen[bytes]) -> None:
        try:
            job.main([*arguments, "0"], self.new_hasher)
        finally:
            channel: LoaderChannel = self._own.channel
            channel.forget_segments()
            for end in (channel._reader, channel._control, channel._descriptors):
                end.close()
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()

    def _channel(self, control: socket.socket, descriptors: socket.socket) -> LoaderChannel:
        self._own.channel = LoaderChannel(control, descriptors)
        self.channels.append(self._own.channel)
        return self._own.channel

    def _pause(self) -> None:
        """Wait for the kill, which this thread sees as the end of its channel."""
        select.select([self._own.channel._control], [], [], 60)


class Index:
    """A digest index in memory."""

    def __init__(self) -> None:
        self.known: dict[FileIdentity, list[LoadedInstance]] = {}

    async def get(self, files: Iterable[FileIdentity]) -> dict[FileIdentity, list[LoadedInstance]]:
        return {identity: self.known[identity] for identity in files if identity in self.known}

    async def put(self, files: Mapping[FileIdentity, Sequence[LoadedInstance]]) -> None:
        self.known |= {identity: list(instances) for identity, instances in files.items()}


class Draft:
    """A manifest of so many bytes, which its desk keeps."""

    def __init__(self, size: int) -> None:
        self.size = size

    def discard(self) -> None:
        pass


class LoadDesk:
    """Loads over a budget of host memory, and what they have brought. Made on a loop."""

    def __init__(self, *, budget: int = 64 << 20, sparse: bool = True, threads: int = 2) -> None:
        self.device = HostDevice()
        self.device.sparse = sparse
        self.reclaimer = DeviceReclaimer(self.device)
        self.told: list[Event] = []
        self.index = Index()
        self.limits = UserLimits()
        self.contents: dict[str, Content] = {}
        self.store = ContentStore(leases=LeaseTable(lambda _: False), on_event=self._hear)
        memory = self.store.memories["host"] = MemoryAccounting(
            budget=budget, page=self.device.page, sparse=sparse, pool_limit=0, create=self.reclaimer.maker.create,
            on_reclaim=self.reclaimer.kick,
        )  # fmt: skip
        self.reclaimer.watch(memory)
        devices, reclaimers = {"host": cast("Any", self.device)}, {"host": self.reclaimer}
        self.loads = Loads(
            store=self.store, catalog=Catalog(self.store, self.limits), devices=devices, reclaimers=reclaimers,
            index=self.index, prepare=self.prepare, now=lambda: 0.0, on_event=self.told.append,
            open_manifest=self.open_manifest, lock=-1, threads=threads, fair_queue=LoadQueue(4, 4), limits=self.limits,
        )  # fmt: skip

    async def prepare(self, content: Content, _device: str) -> Draft:
        return Draft(len(self._encoded(content)))

    def open_manifest(self, key: CheckpointKey) -> int:
        return make_manifest(self._encoded(self.contents[key.content_digest]))

    def _encoded(self, content: Content) -> bytes:
        return encode_manifest(content, "host", "host", self.store.memories["host"].size)

    def _hear(self, event: Event) -> None:
        """As residency.py."""
        if isinstance(event, CheckpointSealed):
            self.contents[event.checkpoint.key.content_digest] = event.content
        elif isinstance(event, CheckpointEvicted):
            self.loads.evicted(event)

    def start(self, *paths: Path, **wish: Any) -> InFlightLoad:
        """Begin a load of these files, and send them."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours, theirs, contextlib.ExitStack() as stack:
            files = [stack.enter_context(path.open("rb")).fileno() for path in paths]
            sources = tuple(source_of(path, file) for path, file in zip(paths, files, strict=True))
            request = LoadRequest(**{"who": WHO, "peer": PEER, "sources": sources, "device": "host"} | wish)
            load, _, begins = self.loads.start(request, theirs.detach())
            assert begins
            batch = handles_pb2.IntakeBatch(first=0, descriptors=len(files))
            socket.send_fds(ours, [batch.SerializeToString()], files)
        return load

    async def load(self, *paths: Path, **wish: Any) -> tuple[Checkpoint, LoadOutcome]:
        """Load these files, as one who does not attach, and wait until nothing is left of the load."""
        load = self.start(*paths, **wish)
        try:
            return await load.done
        finally:
            await self.over(load)
            for lease in self.store.leases.waiting_of(PEER.connection):
                self.store.leases.end(lease.number)

    async def over(self, load: InFlightLoad) -> None:
        """Wait until a load has ended, and has cleaned up."""
        assert load.task is not None
        await asyncio.wait([load.task])
        if self.loads._background:
            await asyncio.wait(self.loads._background)

    def verify(self, *checkpoints: Checkpoint) -> LoadVerification:
        """Begin to verify."""
        return self.loads.verifications.begin(WHO, PEER, lambda: list(checkpoints), lambda _: NotFoundError("gone"))

    def bytes_of(self, checkpoint: Checkpoint) -> dict[str, bytes]:
        """The bytes of each tensor, as its segment has them."""
        content = self.contents[checkpoint.key.content_digest]
        return {
            entry.name: b"" if blob is None
            else os.pread(self.device.writable(blob.segment), blob.length, blob.offset)
            for entry, blob in zip(content.entries, content.blobs, strict=True)
        }  # fmt: skip

    async def close(self) -> None:
        """End everything."""
        await self.loads.close()
        await self.reclaimer.finish()
        self.device.close()


def source_of(path: Path, descriptor: int) -> SourceFile:
    """A file as a request names it: an index, where it is no checkpoint."""
    status = os.fstat(descriptor)
    identity = FileIdentity(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    return SourceFile("", path.name, identity, is_index=path.suffix == ".json")


class _WatchedHasher:
    """Hashes as usual; `act` is called before each piece."""

    def __init__(self, act: Callable[[], None]) -> None:
        self._hash = xxhash.xxh3_128()
        self._act = act

    def update(self, data: memoryview, /) -> None:
        self._act()
        self._hash.update(data)

    def digest(self) -> bytes:
        return self._hash.digest()


class WeakHasher:
    """Makes digests of the first two bytes alone, so that contents collide."""

    def __init__(self) -> None:
        self._first = b""

    def update(self, data: memoryview, /) -> None:
        self._first = self._first or bytes(data[:2])

    def digest(self) -> bytes:
        return self._first.ljust(16, b"\0")


class LoadScene:
    """A desk and its loaders, which call `act` before each piece that they hash, and a folder for files."""

    def __init__(self, desk: LoadDesk, threads: LoaderThreads, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.desk, self.threads, self.folder, self.patch = desk, threads, folder, patch
        self.act: Callable[[], None] = lambda: None
        self.pieces = 0
        threads.new_hasher = lambda: _WatchedHasher(self._hash)

    def write(self, name: str, tensors: dict[str, bytes]) -> Path:
        rows = {tensor: ("U8", (len(content),), content) for tensor, content in tensors.items()}
        return checkpoints.write(self.folder / f"{name}.safetensors", rows)

    def at_piece(self, number: int, act: Callable[[], None]) -> None:
        """Do something when that many pieces have been read, of those to come."""
        self.pieces = 0
        self.act = lambda: act() if self.pieces == number else None

    def hang(self) -> tuple[asyncio.Event, threading.Event]:
        """Have loaders set an event at each piece, and wait for the other one."""
        at_gate, gate = asyncio.Event(), threading.Event()
        loop = asyncio.get_running_loop()

        def hang() -> None:
            loop.call_soon_threadsafe(at_gate.set)
            gate.wait(60)

        self.act = hang
        return at_gate, gate

    async def refused(self, error: type[WeightdError], match: str, *paths: Path, **wish: Any) -> None:
        """A load fails like this, and leaves nothing."""
        with pytest.raises(error, match=match):
            await self.desk.load(*paths, **wish)
        await self.desk.reclaimer.finish()
        assert self.desk.store.memories["host"].used == 0
        assert not self.desk.store.open_loads

    async def check_serves(self, loaders: int) -> None:
        """Another load is well, and by then there were so many loaders."""
        self.act = lambda: None
        tensors = seeded("another", size=9000)
        checkpoint, _ = await self.desk.load(self.write("another", tensors))
        assert self.desk.bytes_of(checkpoint) == tensors
        assert len(self.threads.processes) == loaders

    def _hash(self) -> None:
        self.pieces += 1
        self.act()


def seeded(*seeds: object, size: int = 100_000) -> dict[str, bytes]:
    """Tensors t0, t1, …, of which equal seeds have equal bytes."""
    return {f"t{at}": checkpoints.random_bytes(seed, size) for at, seed in enumerate(seeds)}


def on_a_desk(**settings: Any) -> Callable[[Callable[..., Coroutine[Any, Any, None]]], Callable[..., None]]:
    """Make a test of a function that is given a scene; nothing in it takes longer than a minute."""

    def make(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
        def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
            threads = LoaderThreads(monkeypatch)

            async def play() -> None:
                desk = LoadDesk(**settings)
                async with asyncio.timeout(60):
                    try:
                        await test(LoadScene(desk, threads, tmp_path, monkeypatch))
                    finally:
                        await desk.close()

            try:
                asyncio.run(play())
            finally:
                threads.join()

        run.__name__, run.__doc__ = test.__name__, test.__doc__
        return run

    return make
