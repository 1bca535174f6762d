"""What goes between a daemon and a loader process, seen from either end, and how such a process ends."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import sys
from collections.abc import Iterator
from typing import Any, Never

import pytest

from support.descriptors import open_descriptors
from weightd_daemon.devices.device import DeviceSegment
from weightd_daemon.loader import job
from weightd_daemon.loader._proto import loader_pb2 as wire
from weightd_daemon.loader.channel import BATCH, LoaderChannel, LoaderChannelClosedError, framed
from weightd_daemon.loads import loader_process
from weightd_daemon.loads.loader_process import DEFAULT_ARGV, LoadProcess, LoadProcessDiedError

SLEEPER = (sys.executable, "-S", "-c", "import time; time.sleep(600)")


class Ends:
    """The daemon's ends of a channel, and the loader's channel."""

    def __init__(self) -> None:
        self.control, control = socket.socketpair()
        self.descriptors, descriptors = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.channel = LoaderChannel(control, descriptors)
        self._ends = (self.control, control, self.descriptors, descriptors)

    def send(self, *segments: wire.Segment, descriptors: int = 0) -> None:
        self.control.sendall(framed(wire.ToLoader(segments=segments)))
        for start in range(0, descriptors, BATCH):
            socket.send_fds(self.descriptors, [b"d"], [0] * min(BATCH, descriptors - start))

    def close(self) -> None:
        self.channel.forget_segments()
        self.channel._reader.close()
        for end in self._ends:
            end.close()


@pytest.fixture
def ends() -> Iterator[Ends]:
    """Both ends of a channel."""
    made = Ends()
    yield made
    made.close()


def test_segments_come_by_handles_or_by_descriptors(ends: Ends) -> None:
    """One that comes again takes the place of the one before, whose descriptor is closed."""
    before = len(open_descriptors())
    numbers = range(1, BATCH + 2)
    for _ in range(2):
        described = [wire.Segment(number=number, size=4096) for number in numbers]
        ends.send(wire.Segment(number=9999, size=64, handle=b"ipc"), *described, descriptors=len(numbers))
        ends.channel.receive()
        assert ends.channel.segments[9999] == DeviceSegment(9999, 64, b"ipc")
        assert ends.channel.segments.keys() == {9999, *numbers}
        assert len(open_descriptors()) == before + len(numbers)
    ends.channel.forget_segments()
    assert len(open_descriptors()) == before


SEGMENT = framed(wire.ToLoader(segments=[wire.Segment(number=1, size=4096)]))


@pytest.mark.parametrize("sent", [b"", SEGMENT[:2], SEGMENT[:-1], SEGMENT])
def test_a_daemon_that_hangs_up_breaks_nothing_else(ends: Ends, sent: bytes) -> None:
    """It may do so at any byte, and between a message and its descriptors."""
    ends.control.sendall(sent)
    ends.control.close()
    ends.descriptors.close()
    with pytest.raises(LoaderChannelClosedError):
        ends.channel.receive()
    assert not ends.channel.broken


def test_a_loader_whose_daemon_is_gone_already_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "die_with", lambda _: False)
    assert job.main(["-1", "-1", "1"]) == 1


def test_a_loader_ends_by_itself_when_it_is_hung_up_on() -> None:
    async def run() -> None:
        loader = await LoadProcess.spawn(DEFAULT_ARGV, [])
        loader.hang_up()
        async with asyncio.timeout(60):
            await loader.exited
        assert loader._process.returncode == 0

    asyncio.run(run())


def test_its_end_is_seen_also_where_somebody_gave_up_waiting_for_it() -> None:
    async def run() -> list[dict[str, Any]]:
        failures: list[dict[str, Any]] = []
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, failure: failures.append(failure))
        loader = await LoadProcess.spawn(SLEEPER, [])
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0):
                await loader.exited
        os.kill(loader.pid, 9)
        async with asyncio.timeout(60):
            with pytest.raises(LoadProcessDiedError):
                await loader.receive()
            while loader._pidfd >= 0:  # noqa: ASYNC110  # nobody tells
                await asyncio.sleep(0)
        return failures

    assert asyncio.run(run()) == []


def test_a_program_that_is_not_there_is_no_limit() -> None:
    with pytest.raises(FileNotFoundError):
        asyncio.run(LoadProcess.spawn(("/nowhere/python",), []))


async def send_on(loader: LoadProcess) -> None:
    for _ in range(10_000):
        await loader.send_descriptor(0)


def test_a_loader_that_takes_no_descriptors_counts_as_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is stuck: the daemon's loop does not wait for it for ever."""
    monkeypatch.setattr(loader_process, "_TRIES", 3)

    async def run() -> None:
        loader = await LoadProcess.spawn(SLEEPER, [])
        try:
            with pytest.raises(LoadProcessDiedError):
                await send_on(loader)
        finally:
            loader.kill()
            await loader.exited

    asyncio.run(run())


@pytest.mark.parametrize(
    ("failure", "expected"),
    [(BrokenPipeError(), LoadProcessDiedError), (OSError(errno.EIO, "Input/output error"), OSError)],
)
def test_what_fails_of_sending_is_its_death_or_is_raised_as_it_is(
    failure: OSError, expected: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> Never:
        raise failure

    async def run() -> None:
        loader = await LoadProcess.spawn(SLEEPER, [])
        try:
            with pytest.raises(expected, match=failure.strerror):
                await loader.send(wire.ToLoader(), [DeviceSegment(1, 4096, 0)])
        finally:
            loader.kill()
            await loader.exited

    monkeypatch.setattr(socket, "send_fds", fail)
    asyncio.run(run())
