"""The daemon's side of loaders when something breaks half-way: no process, descriptor, task or buffer is left over."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import inspect
import os
import re
import socket
import subprocess
import sys
import weakref
from typing import Any, Never

import pytest

from support.children import children
from support.descriptors import open_descriptors
from support.limits import room_for
from support.prompt_memory import PromptMemory
from weightd.errors import CapacityError, DeviceError, FormatError, ResourceLimitError, ServerError
from weightd.types import TensorSpec
from weightd_daemon.core.digest import new_hasher
from weightd_daemon.core.reclaims import BlobFreeQueue, SegmentReclaim
from weightd_daemon.devices.device import DeviceSegment
from weightd_daemon.devices.driver_thread import AnyThread
from weightd_daemon.devices.host import HostDevice
from weightd_daemon.devices.reclaimer import DeviceReclaimer
from weightd_daemon.loader import channel as channel_module
from weightd_daemon.loader import job
from weightd_daemon.loader._proto import loader_pb2 as wire
from weightd_daemon.loader.channel import (
    BATCH,
    LENGTH,
    MAX_MESSAGE,
    LoaderChannel,
    LoaderChannelClosedError,
    error_of,
    failure_of,
    framed,
    receive_fds,
)
from weightd_daemon.loader.schedule import LoaderTensor, LoaderUnit, on_threads
from weightd_daemon.loads import dialogue
from weightd_daemon.loads.dialogue import LoadDialogue
from weightd_daemon.loads.loader_process import LoadProcess, LoadProcessDiedError

GRANT = wire.ToDaemon(grant=wire.Grant(ends=[256], need=256))
SLEEPER = (sys.executable, "-S", "-c", "import time; time.sleep(600)")


def test_cancelled_while_it_opens_the_channel(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[LoadProcess] = []
    opening = asyncio.Event()
    known = LoadProcess.__init__

    def remember(self: LoadProcess, *arguments: Any) -> None:
        known(self, *arguments)
        made.append(self)

    async def hang(**_: object) -> None:
        opening.set()
        await asyncio.Event().wait()

    async def run() -> None:
        task = asyncio.create_task(LoadProcess.spawn(SLEEPER, []))
        await opening.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        async with asyncio.timeout(60):
            await made[0].exited

    monkeypatch.setattr(LoadProcess, "__init__", remember)
    monkeypatch.setattr(asyncio, "open_connection", hang)
    before = open_descriptors()
    asyncio.run(run())
    assert open_descriptors() == before
    with pytest.raises(ProcessLookupError):
        os.kill(made[0].pid, 0)


def test_dead_before_its_channel_is_open(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = asyncio.open_connection

    async def late(**arguments: Any) -> Any:
        await asyncio.sleep(0.3)
        return await opened(**arguments)

    async def run() -> None:
        loader = await LoadProcess.spawn((sys.executable, "-S", "-c", ""), [])
        async with asyncio.timeout(60):
            await loader.exited
        with pytest.raises(LoadProcessDiedError):
            await loader.send(wire.ToLoader(), [DeviceSegment(1, 4096, 0)])
        with pytest.raises(LoadProcessDiedError):
            await loader.receive()

    monkeypatch.setattr(asyncio, "open_connection", late)
    before = open_descriptors()
    asyncio.run(run())
    assert open_descriptors() == before


def test_too_many_descriptors_on_their_way_is_a_limit_whatever_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> Never:
        raise OSError(errno.ETOOMANYREFS, "Too many references: cannot splice")

    async def run() -> None:
        loader = await LoadProcess.spawn(SLEEPER, [])
        try:
            for what, send in (
                ("segments", loader.send(wire.ToLoader(), [DeviceSegment(1, 4096, 0)])),
                ("an intake", loader.send_descriptor(0)),
            ):
                with pytest.raises(ResourceLimitError, match=rf"^sending {what} to a loader process: the user of "):
                    await send
        finally:
            loader.kill()
            await loader.exited

    monkeypatch.setattr(socket, "send_fds", fail)
    asyncio.run(run())


@pytest.mark.parametrize("part", ["Popen", "pidfd_open"])
def test_it_cannot_be_started(monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    def fail(*_: object, **__: object) -> Never:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(subprocess if part == "Popen" else os, part, fail)
    before, others = open_descriptors(), children()  # children of earlier tests: templates, among others
    with pytest.raises(ResourceLimitError, match=r"^starting a loader process: the weightd daemon has all"):
        asyncio.run(LoadProcess.spawn(SLEEPER, []))
    assert open_descriptors() == before
    assert children() <= others


def test_received_descriptors_are_not_inherited() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        socket.send_fds(ours, [b"ab"], [0, 1, 2])
        data, received, flags = receive_fds(theirs, 2, 3)
        assert (data, len(received), flags & socket.MSG_CTRUNC) == (b"ab", 3, 0)
        assert not any(os.get_inheritable(descriptor) for descriptor in received)
        for descriptor in received:
            os.close(descriptor)


def test_a_failed_step_leaves_no_buffer_behind() -> None:
    class Buffer:
        """Stands for a map or a buffer of a step."""

    alive: list[weakref.ref[Buffer]] = []

    def step(_: LoaderUnit) -> None:
        buffer = Buffer()
        alive.append(weakref.ref(buffer))
        raise ValueError("broken")

    unit = LoaderUnit(0, (LoaderTensor(0, 0, TensorSpec("t", "U8", (1,), 0, 1)),))
    gc.disable()
    try:
        with pytest.raises(ValueError, match="broken") as caught:
            on_threads([[unit]], 1, step)
        del caught
        assert alive[0]() is None
    finally:
        gc.enable()


class BrokenDevice:
    """Fails with what is not an OSError."""

    sparse, releases_by = False, "cuMemRelease"

    def __init__(self) -> None:
        self.calls = AnyThread()
        self.released: list[int] = []

    def release(self, segment: int) -> None:
        self.released.append(segment)
        if segment == 1:
            raise KeyError(segment)


class Books:
    """Two segments to release."""

    creating = False

    def __init__(self) -> None:
        self.queue = [SegmentReclaim(1, 4096), SegmentReclaim(2, 4096)]
        self.reported: list[int] = []
        self.freeing = BlobFreeQueue(lambda: None)

    def next_reclaims(self) -> list[SegmentReclaim]:
        taken, self.queue = self.queue, []
        return taken

    def reclaimed(self, reclaim: SegmentReclaim) -> None:
        self.reported.append(reclaim.segment)


def test_a_bug_of_the_device_does_not_stop_the_reclaims(caplog: pytest.LogCaptureFixture) -> None:
    device: Any = BrokenDevice()
    books: Any = Books()

    async def run() -> None:
        reclaimer = DeviceReclaimer(device)
        reclaimer.watch(books)
        reclaimer.kick()
        await reclaimer.finish()

    asyncio.run(run())
    assert device.released == books.reported == [1, 2]
    assert "could not be returned" in caplog.text


def test_a_job_that_cannot_begin_leaves_nothing_that_the_next_would_take_for_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*_: object) -> Never:
        raise DeviceError("cuInit failed")

    monkeypatch.setattr(job, "open_io", broken)
    with contextlib.ExitStack() as stack:
        control, descriptors = socket.socketpair(), socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        intake = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (*control, *descriptors, *intake):
            stack.enter_context(end)
        socket.send_fds(descriptors[0], [b"d"], [intake[1].fileno()])
        intake[1].close()
        asked = wire.Load(kind="cuda_vmm", device="GPU-0", sources=[wire.Source(file="a")])
        control[0].sendall(framed(wire.ToLoader(load=asked)))
        assert not job._do(LoaderChannel(control[1], descriptors[1]), new_hasher)
        assert b"cuInit failed" in control[0].recv(4096)
        descriptors[1].setblocking(False)
        with pytest.raises(BlockingIOError):
            descriptors[1].recv(1)
        assert intake[0].recv(1) == b""  # which the client sees at once


class DaemonEnd:
    """The daemon's ends of a loader's channel, and that channel."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self.control, control = socket.socketpair()
        self.descriptors, descriptors = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (self.control, control, self.descriptors, descriptors):
            stack.enter_context(end)
        self.channel = LoaderChannel(control, descriptors)
        stack.callback(self.channel._reader.close)  # not when the collector comes, which may take the socket first
        stack.callback(self.channel.forget_segments)

    def send(self, first: int, count: int) -> None:
        """A message with that many fresh segments, as LoadProcess sends it."""
        segments = [wire.Segment(number=first + at, size=4096) for at in range(count)]
        self.control.sendall(framed(wire.ToLoader(segments=segments)))
        for start in range(0, count, BATCH):
            socket.send_fds(self.descriptors, [b"d"], [0] * min(BATCH, count - start))

    def break_channel(self) -> None:
        """Leave a descriptor on its way to the channel, which had no room for those before it."""
        self.send(1, BATCH + 1)
        with room_for(os.getpid(), 10), pytest.raises(ResourceLimitError):
            self.channel.receive()


def test_after_descriptors_were_lost_no_thread_takes_those_of_another_message() -> None:
    with contextlib.ExitStack() as stack:
        daemon = DaemonEnd(stack)
        before = open_descriptors()
        daemon.break_channel()
        assert open_descriptors() == before
        daemon.send(1000, 1)
        for go_on in (lambda: daemon.channel.call(GRANT), daemon.channel.receive, daemon.channel.receive_descriptor):
            with pytest.raises(ResourceLimitError, match=r"^receiving segments: the daemon's loader process has all"):
                go_on()
        assert daemon.channel.segments == {}
        daemon.control.setblocking(False)
        with pytest.raises(BlockingIOError):  # nothing was asked either
            daemon.control.recv(1)


@pytest.mark.parametrize("count", [0, 2])
def test_another_number_of_descriptors_than_belong_to_a_message(count: int) -> None:
    with contextlib.ExitStack() as stack:
        daemon = DaemonEnd(stack)
        before = open_descriptors()
        socket.send_fds(daemon.descriptors, [b"d"], [0] * count)
        socket.send_fds(daemon.descriptors, [b"d"], [0])
        for _ in range(2):
            with pytest.raises(ServerError, match=r"^receiving an intake: "):
                daemon.channel.receive_descriptor()
        assert open_descriptors() == before


def test_nothing_is_sent_after_a_message_that_was_sent_in_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """The daemon would take the rest of it for the begin of the next, and wait for what never comes."""

    class Half:
        """A socket for which the kernel runs out of memory half-way."""

        def __init__(self, control: socket.socket) -> None:
            self._control = control

        def sendall(self, frame: bytes) -> None:
            self._control.sendall(frame[: len(frame) // 2])
            raise OSError(errno.ENOBUFS, "No buffer space available")

    with contextlib.ExitStack() as stack:
        daemon = DaemonEnd(stack)
        monkeypatch.setattr(daemon.channel, "_control", Half(daemon.channel._control))
        for go_on in (lambda: daemon.channel.send(GRANT), lambda: daemon.channel.call(GRANT)):
            with pytest.raises(LoaderChannelClosedError):
                go_on()
        frame = framed(GRANT)
        assert daemon.control.recv(4096) == frame[: len(frame) // 2]
        daemon.control.setblocking(False)
        with pytest.raises(BlockingIOError):
            daemon.control.recv(1)
        daemon.send(0, 0)
        with pytest.raises(LoaderChannelClosedError):  # so the process ends, and the daemon reads the end of the stream
            job._do(daemon.channel, new_hasher)


@pytest.mark.parametrize(
    ("sent", "why"),
    [
        (framed(wire.ToLoader(settle=wire.Candidates())), "grant was asked, and settle came"),
        (framed(wire.ToLoader()), "grant was asked, and None came"),
        (LENGTH.pack(MAX_MESSAGE + 1), f"a message of {MAX_MESSAGE + 1} bytes came"),
        (LENGTH.pack(2) + b"\xff\xff", "2 bytes came that are no message"),
    ],
)
def test_an_answer_that_is_none_breaks_the_channel(sent: bytes, why: str) -> None:
    with contextlib.ExitStack() as stack:
        daemon = DaemonEnd(stack)
        daemon.control.sendall(sent)
        with pytest.raises(ServerError, match=re.escape(why)):
            daemon.channel.call(GRANT)
        assert daemon.channel.broken
        with pytest.raises(ServerError, match=re.escape(why)):
            daemon.channel.call(GRANT)


@pytest.mark.parametrize("sent", [LENGTH.pack(MAX_MESSAGE + 1), LENGTH.pack(2) + b"\xff\xff"])
def test_a_loader_that_sends_what_is_no_message_is_killed(sent: bytes, caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> None:
        writes = f"import os; os.write(int(__import__('sys').argv[1]), {sent!r}); __import__('time').sleep(600)"
        loader = await LoadProcess.spawn((sys.executable, "-S", "-c", writes), [])
        async with asyncio.timeout(60):
            with pytest.raises(LoadProcessDiedError):
                await loader.receive()
            await loader.exited

    asyncio.run(run())
    assert "sent what is no message" in caplog.text


def test_a_message_that_is_too_long_is_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel_module, "MAX_MESSAGE", 3)
    with contextlib.ExitStack() as stack:
        daemon = DaemonEnd(stack)
        with pytest.raises(ServerError, match=r"^grant has \d+ bytes; a message has at most 3$"):
            daemon.channel.send(GRANT)
        daemon.channel.send(wire.ToDaemon(idle=wire.Idle()))  # the stream is in step


def test_every_question_has_an_answer_of_its_name() -> None:
    """`LoaderChannel.call` goes by the names, and the daemon answers what it does not only hear."""
    asked = {field.name for field in wire.ToDaemon.DESCRIPTOR.oneofs_by_name["body"].fields}
    answered = {field.name for field in wire.ToLoader.DESCRIPTOR.oneofs_by_name["body"].fields}
    told = {*dialogue._TOLD, "verified", "failed", "idle"}
    assert asked - told == answered - {"failed", "load", "verify"}
    assert set(re.findall(r'case "(\w+)"', inspect.getsource(LoadDialogue._answer))) == asked - told
    assert dialogue._TOLD.keys() <= asked


def test_an_error_travels_with_all_that_it_says() -> None:
    error = CapacityError("a\udcff does not fit", {"requested_bytes": "1"})
    again = error_of(failure_of(error))
    assert (type(again), again.message, again.metadata) == (CapacityError, "a\\udcff does not fit", error.metadata)


def test_a_loader_that_lost_descriptors_does_no_other_job_whatever_it_failed_of(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Another thread's error may come first, one after which a loader goes on."""

    def work(_: LoaderChannel, __: wire.ToLoader, ___: object) -> Never:
        daemon.break_channel()
        raise FormatError("broken file")

    monkeypatch.setattr(job, "_work", work)
    with contextlib.ExitStack() as stack:
        daemon = DaemonEnd(stack)
        daemon.send(0, 0)
        assert not job._do(daemon.channel, new_hasher)
        assert b"broken file" in daemon.control.recv(4096)


def test_who_waits_for_memory_is_woken_when_a_load_ends_that_gives_none_back() -> None:
    async def run() -> None:
        reclaimer = DeviceReclaimer(HostDevice())
        memory = PromptMemory(
            budget=4096, page=4096, sparse=False, pool_limit=0, create=lambda _: 1, on_reclaim=reclaimer.kick
        )
        reclaimer.watch(memory)
        memory.expect(1)
        waiting = asyncio.create_task(reclaimer.wait())
        await asyncio.sleep(0)
        assert not waiting.done()
        memory.withdraw(1)
        async with asyncio.timeout(60):
            await waiting
            await reclaimer.wait()  # there is nothing to wait for any more

    asyncio.run(run())
