"""The descriptor store, from the service's side: edges/systemd.py against the manager that tests play."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
import subprocess
import sys
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.descriptors import open_descriptors
from support.manager import Manager
from weightd_daemon.persistence import service_manager
from weightd_daemon.persistence.service_manager import ServiceManagerStore, stored_descriptors

MOST = 4


@pytest.fixture
def manager(short_path: Path) -> Iterator[Manager]:
    manager = Manager(short_path / "notify", most=MOST)
    yield manager
    manager.close()


@pytest.fixture
def service(manager: Manager) -> ServiceManagerStore:
    return ServiceManagerStore(manager.environment())


@pytest.fixture
def memory() -> Iterator[list[int]]:
    """Descriptors of as many memfds as there is room for, and two more."""
    made = [os.memfd_create(f"m{number}") for number in range(MOST + 2)]
    yield made
    for descriptor in made:
        os.close(descriptor)


def inodes(manager: Manager) -> list[tuple[str, int]]:
    return [(name, os.fstat(descriptor).st_ino) for name, descriptor in manager.kept]


def inode(descriptor: int) -> int:
    return os.fstat(descriptor).st_ino


def settle(service: ServiceManagerStore) -> None:
    asyncio.run(service.barrier(5.0))


def test_what_is_kept_outlives_its_sender(manager: Manager, service: ServiceManagerStore, memory: list[int]) -> None:
    first, second = (inode(memory[number]) for number in (0, 1))
    service.store("a", memory[0])
    service.store("b", memory[1])
    settle(service)
    assert inodes(manager) == [("b", second), ("a", first)], "the newest first"
    service.drop("b")
    service.drop("unknown")
    settle(service)
    assert inodes(manager) == [("a", first)]


def test_a_duplicate_is_not_kept_again(manager: Manager, service: ServiceManagerStore, memory: list[int]) -> None:
    service.store("a", memory[0])
    copy = os.dup(memory[0])
    afresh = os.open(f"/proc/self/fd/{memory[0]}", os.O_RDONLY)
    service.store("b", copy)
    service.store("c", afresh)  # the same memory, but not the same opening of it
    settle(service)
    assert manager.names() == ["c", "a"]
    for descriptor in (copy, afresh):
        os.close(descriptor)


def test_a_full_store_keeps_no_more(manager: Manager, service: ServiceManagerStore, memory: list[int]) -> None:
    for number, descriptor in enumerate(memory):
        service.store(str(number), descriptor)
    settle(service)
    assert manager.names() == ["3", "2", "1", "0"]


@pytest.mark.parametrize("name", ["a:b", "ä", "x" * 256, "tab\t"])
def test_names_that_cannot_be(name: str, manager: Manager, service: ServiceManagerStore, memory: list[int]) -> None:
    service.store(name, memory[0])
    settle(service)
    assert manager.names() == ["stored"]
    service.drop(name)
    settle(service)
    assert manager.names() == ["stored"]


def test_messages_that_are_passed_over(manager: Manager, service: ServiceManagerStore, memory: list[int]) -> None:
    service.notify("FDSTORE=1", "FDNAME=a", "BARRIER=1", descriptors=[memory[0]])
    service.notify("READY=1", "STATUS=" + "x" * 4096)
    service.notify("STATUS=short")
    settle(service)
    assert (manager.names(), len(manager.ignored)) == ([], 2)
    assert manager.said == ["STATUS=short"]


def test_a_barrier_waits_for_a_manager_that_reads(short_path: Path) -> None:
    silent = subprocess.Popen(
        [sys.executable, "-c", "import socket, sys, time\ns = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)\n"
         "s.bind(sys.argv[1])\nprint(flush=True)\ntime.sleep(60)", str(short_path / "silent")],
        stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert silent.stdout is not None
        silent.stdout.readline()
        with pytest.raises(TimeoutError):
            asyncio.run(ServiceManagerStore({"NOTIFY_SOCKET": str(short_path / "silent")}).barrier(0.2))
    finally:
        silent.kill()
        silent.communicate()


class Sleeper:
    """A manager that reads only what it is told to."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._socket.settimeout(60)

    def read(self) -> tuple[str, int]:
        """The next message, and how many descriptors came with it."""
        data, descriptors, _, _ = socket.recv_fds(self._socket, 4096, 253)
        for descriptor in descriptors:
            os.close(descriptor)
        return data.decode(), len(descriptors)

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def sleeper(short_path: Path) -> Iterator[Sleeper]:
    sleeper = Sleeper(short_path / "asleep")
    yield sleeper
    sleeper.close()


def test_nobody_waits_for_a_manager_that_is_behind(sleeper: Sleeper, short_path: Path, memory: list[int]) -> None:
    """The kernel queues few datagrams (net.unix.max_dgram_qlen); the rest waits here, in order, and is bounded."""
    service = ServiceManagerStore({"NOTIFY_SOCKET": str(short_path / "asleep")})
    failed: list[int] = []
    for number in range(600):  # each would wait 5 s, and fail
        service.store(f"{number}", memory[0], lambda number=number: failed.append(number))  # type: ignore[misc]  # bound
    with pytest.raises(OSError, match="does not read"):
        deque(service.notify("STATUS=x") for _ in range(service_manager._MOST_WAITING + 1000))
    for number in range(600):
        text, descriptors = sleeper.read()
        assert (f"FDNAME={number}" in text.split("\n"), descriptors) == (True, 1)
    assert failed == []
    while sleeper.read() != ("STATUS=x", 0):
        raise AssertionError("what came behind is next")


def test_what_a_manager_never_takes_is_told_and_a_barrier_behind_it_fails(
    sleeper: Sleeper, short_path: Path, memory: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service_manager, "_SEND_TIMEOUT", struct.pack("@ll", 0, 200_000))
    service = ServiceManagerStore({"NOTIFY_SOCKET": str(short_path / "asleep")})
    before = len(open_descriptors())
    failed: list[int] = []
    for number in range(600):
        service.store(f"{number}", memory[0], lambda number=number: failed.append(number))  # type: ignore[misc]  # bound
    with pytest.raises(OSError, match="takes no more"):
        asyncio.run(service.barrier(60.0))
    assert failed == list(range(failed[0], 600)), "all but what the kernel has queued, in order"
    assert len(open_descriptors()) == before


def test_without_a_manager_nothing_happens(memory: list[int]) -> None:
    environment: dict[str, str] = {"LISTEN_PID": "1", "LISTEN_FDS": "3", "WATCHDOG_USEC": "nonsense", "OTHER": "x"}
    service = ServiceManagerStore(environment)
    assert (service.listens, service.watchdog_seconds, service.most_stored) == (False, None, None)
    service.store("a", memory[0])
    settle(service)
    assert stored_descriptors(environment) == [], "they are for another process"
    assert environment == {"OTHER": "x"}
