"""Files that a loader takes from a client: how many bytes of them it keeps in memory, and for how long it waits."""

from __future__ import annotations

import contextlib
import fcntl
import os
import resource
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.limits import room_for
from weightd._proto.v1 import handles_pb2
from weightd.errors import InvalidReferenceError, ResourceLimitError
from weightd_daemon.loader import intake as intakes
from weightd_daemon.loader.source import LoaderSource


class Intake:
    """Both ends of an intake, the client's files, and a loader that takes them."""

    def __init__(self, folder: Path, stack: contextlib.ExitStack) -> None:
        self._folder = folder
        self._stack = stack
        self._names: list[str] = []
        self.client, self.loader = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        stack.enter_context(self.client)
        stack.enter_context(self.loader)
        self._files: list[int | LoaderSource] = []
        stack.callback(intakes.close_all, self._files)

    def send(self, *sizes: int) -> None:
        """A batch of files of these sizes."""
        first = len(self._names)
        self._names += [f"{first + at}" for at in range(len(sizes))]
        descriptors = []
        for name, size in zip(self._names[first:], sizes, strict=True):
            file = self._stack.enter_context((self._folder / name).open("wb+"))
            file.truncate(size)
            descriptors.append(os.open(file.name, os.O_RDONLY))
            self._stack.callback(os.close, descriptors[-1])
        frame = handles_pb2.IntakeBatch(first=first, descriptors=len(sizes))
        socket.send_fds(self.client, [frame.SerializeToString()], descriptors)

    def received(self, missing: int = 0) -> list[int | LoaderSource]:
        intakes.receive_files(self.loader, self._names + ["x"] * missing, self._files)
        return self._files


@pytest.fixture
def intake(tmp_path: Path) -> Iterator[Intake]:
    with contextlib.ExitStack() as stack:
        yield Intake(tmp_path, stack)


@pytest.fixture
def scarce(monkeypatch: pytest.MonkeyPatch) -> None:
    """More files than descriptors, and 100 bytes to hold files in."""
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1, 1))
    monkeypatch.setattr(intakes, "_HELD_BYTES", 100)


def held(files: list[int | LoaderSource]) -> list[bool]:
    return [isinstance(file, LoaderSource) for file in files]


@pytest.mark.usefixtures("scarce")
def test_files_are_held_while_there_is_room_for_them(intake: Intake) -> None:
    intake.send(60, 60, 0)
    intake.send(41, 40, 1)
    assert held(intake.received()) == [True, False, True, False, True, False]


@pytest.mark.usefixtures("scarce")
def test_a_file_that_grows_while_it_is_looked_at_is_held_by_the_size_that_is_read(
    intake: Intake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = fcntl.fcntl

    def grown(descriptor: int, *command: int) -> int:
        """As if it had grown a moment before it is looked at."""
        if more := {10: 101, 11: 80, 12: 21}.get(os.fstat(descriptor).st_size):
            os.truncate(f"/proc/self/fd/{descriptor}", more)
        return flags(descriptor, *command)

    monkeypatch.setattr("weightd_daemon.loader.source.fcntl.fcntl", grown)
    intake.send(10, 11, 12)
    files = intake.received()
    assert held(files) == [False, True, False]  # of 101, 80 and 21 bytes


def test_each_batch_has_its_own_time(intake: Intake, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float | None] = []
    receive = intakes.receive_fds

    def noted(end: socket.socket, size: int, most: int) -> tuple[bytes, list[int], int]:
        waits.append(end.gettimeout())
        return receive(end, size, most)

    monkeypatch.setattr(intakes, "receive_fds", noted)
    for _ in range(3):
        intake.send(1)
    assert len(intake.received()) == 3
    assert waits == [intakes.INTAKE_SECONDS] * 3


@pytest.mark.parametrize("sent", [1, 100])
def test_a_client_that_sends_no_more_or_takes_no_confirmation(
    sent: int, intake: Intake, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(intakes, "INTAKE_SECONDS", 0.01)
    intake.loader.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)  # the kernel makes it a few frames
    for _ in range(sent):
        intake.send(1)
    with pytest.raises(InvalidReferenceError, match=r"^the client sent \d+ of 101 files, and then did nothing for "):
        intake.received(missing=101 - sent)


def batch(first: int, descriptors: int) -> bytes:
    return handles_pb2.IntakeBatch(first=first, descriptors=descriptors).SerializeToString()


@pytest.mark.parametrize(
    ("frame", "sent", "why"),
    [
        (b"", 0, "the client sent 0 of 2 files and left"),
        (b"\xff\xff", 1, "the intake got a frame that is no IntakeBatch"),
        (batch(0, 2), 1, "descriptors were lost on the way"),
        (batch(1, 1), 1, "the intake got 1 files from 1 on; 0 of 2 had come"),
        (batch(0, 3), 3, "the intake got 3 files from 0 on; 0 of 2 had come"),
        (batch(1, 0), 0, "the intake got 0 files from 1 on; 0 of 2 had come"),
    ],
)
def test_what_is_no_batch_of_the_files(frame: bytes, sent: int, why: str, intake: Intake) -> None:
    with open(os.devnull, "rb") as null:
        socket.send_fds(intake.client, [frame], [null.fileno()] * sent)
    with pytest.raises(InvalidReferenceError, match=why):
        intake.received(missing=2)


def test_a_client_that_leaves_without_having_read_its_confirmation(
    intake: Intake, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel tells the loader of that with an error, where it only comes to the end otherwise."""
    receive, batches = intakes.receive_fds, [0]

    def leaving(end: socket.socket, size: int, most: int) -> tuple[bytes, list[int], int]:
        batches[0] += 1
        if batches[0] == 2:
            intake.client.close()
        return receive(end, size, most)

    intake.send(1)
    monkeypatch.setattr(intakes, "receive_fds", leaving)
    with pytest.raises(InvalidReferenceError, match="the client sent 1 of 2 files and left"):
        intake.received(missing=1)


def test_a_loader_without_descriptors_for_the_files_says_so(intake: Intake) -> None:
    intake.send(1, 1, 1)
    with (
        room_for(os.getpid(), 1),
        pytest.raises(ResourceLimitError, match=r"^receiving 3 files: the daemon's loader process has all"),
    ):
        intake.received()
