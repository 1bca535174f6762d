"""Whom the handle socket lets in, and when."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
from collections.abc import AsyncIterator, Awaitable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from weightd._proto.v1 import handles_pb2
from weightd_daemon.handles import entrance
from weightd_daemon.handles.connections import HandleSocketConnections
from weightd_daemon.handles.handle_server import HandleServer
from weightd_daemon.operations.sockets import listen

HELLO = handles_pb2.HandleRequest(hello=handles_pb2.HelloRequest(protocol=1)).SerializeToString()
ATTACH = handles_pb2.HandleRequest(attach=handles_pb2.AttachRequest(reference="a")).SerializeToString()


class Door:
    """A server on a socket of its own, and the peers that came to it."""

    def __init__(self, path: Path, most: int) -> None:
        self._path = path
        attacher: Any = SimpleNamespace(disconnected=lambda _: None, ended=lambda *_: None, room=self._room)
        self.failure: Exception | None = None
        """Why no file for a lease can be made, after a wait."""
        self.attaches: list[str] = []
        """The codes of the attaches that were counted."""
        connections = HandleSocketConnections(isolated=False, admins=frozenset())
        self.server = HandleServer(
            connections=connections,
            attacher=attacher,
            max_connections=most,
            on_attach=lambda code, _: self.attaches.append(code),
        )
        self._peers: list[socket.socket] = []

    @contextlib.asynccontextmanager
    async def open(self) -> AsyncIterator[Door]:
        self.server.start(listen(self._path, 0o600))
        try:
            async with asyncio.timeout(20.0):
                yield self
        finally:
            self.server.stop()
            for peer in self._peers:
                peer.close()

    def _room(self, *_: object) -> Awaitable[None]:
        async def wait() -> None:
            await asyncio.sleep(0)
            assert self.failure is not None
            raise self.failure

        return wait()

    async def come(self) -> socket.socket:
        """Connect and greet."""
        peer = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        self._peers.append(peer)
        peer.connect(str(self._path))
        with contextlib.suppress(OSError):  # who is refused may have been told already
            peer.send(HELLO)
        return peer


async def answer(peer: socket.socket) -> handles_pb2.HandleReply:
    """What comes next; who is refused may first hear that nobody reads its hello."""
    receive = asyncio.get_running_loop().sock_recv
    try:
        frame = await receive(peer, 65536)
    except ConnectionResetError:
        frame = await receive(peer, 65536)
    return handles_pb2.HandleReply.FromString(frame)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """One connection of a user at once, the next one after 1000 s, and none that would have to wait for longer."""
    monkeypatch.setattr(entrance, "CONNECTS", 1)
    monkeypatch.setattr(entrance, "CONNECTS_PER_SECOND", 0.001)
    monkeypatch.setattr(entrance, "CONNECT_WAIT_SECONDS", 1500.0)


@pytest.mark.usefixtures("slow")
def test_who_connects_too_often_waits_and_then_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        async with Door(tmp_path / "h", 10).open() as door:
            assert (await answer(await door.come())).hello.token
            early = await door.come()
            refused = await answer(await door.come())
            assert refused.error.reason == "BUSY"
            assert "connections a second of one user" in refused.error.message
            monkeypatch.setattr(entrance, "uid_of", lambda _: 12345)
            assert (await answer(await door.come())).hello.token
            with pytest.raises(BlockingIOError):
                early.recv(1)
            door.server.stop()
            with contextlib.suppress(ConnectionResetError):  # its hello was not read
                assert await asyncio.get_running_loop().sock_recv(early, 1) == b""

    asyncio.run(run())


@pytest.mark.usefixtures("slow")
def test_those_who_wait_count_as_connections(tmp_path: Path) -> None:
    async def run() -> None:
        async with Door(tmp_path / "h", 2).open() as door:
            assert (await answer(await door.come())).hello.token
            await door.come()
            assert "max_connections = 2" in (await answer(await door.come())).error.message

    asyncio.run(run())


def test_who_comes_too_early_is_heard_in_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entrance, "CONNECTS", 1)
    monkeypatch.setattr(entrance, "CONNECTS_PER_SECOND", 20.0)

    async def run() -> None:
        async with Door(tmp_path / "h", 10).open() as door:
            peers = [await door.come() for _ in range(5)]
            assert len({(await answer(peer)).hello.token for peer in peers}) == 5

    asyncio.run(run())


@pytest.mark.parametrize(
    ("failure", "reason", "code"),
    [
        (OSError(errno.EMFILE, "Too many open files"), "RESOURCE_LIMIT", "RESOURCE_EXHAUSTED"),
        (ZeroDivisionError(), "INTERNAL", "INTERNAL"),
    ],
)
def test_a_lease_file_that_cannot_be_made_is_an_answer(
    tmp_path: Path, failure: Exception, reason: str, code: str
) -> None:
    async def run() -> None:
        async with Door(tmp_path / "h", 10).open() as door:
            door.failure = failure
            peer = await door.come()
            assert (await answer(peer)).hello.token
            for _ in range(2):  # the connection goes on
                peer.send(ATTACH)
                assert (await answer(peer)).error.reason == reason
            assert door.attaches == [code, code]

    asyncio.run(run())


def test_who_cannot_be_accepted_waits_until_there_is_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of descriptors: the peer stays in the backlog, and the loop does not spin."""
    monkeypatch.setattr(entrance, "ACCEPT_PAUSE_SECONDS", 0.01)
    refused: list[int] = []

    class Listener(socket.socket):
        def accept(self) -> tuple[socket.socket, Any]:
            if len(refused) < 2:
                refused.append(errno.EMFILE)
                raise OSError(errno.EMFILE, "Too many open files")
            return super().accept()

    async def run() -> None:
        async with Door(tmp_path / "h", 10).open() as door:
            plain = listen(tmp_path / "other", 0o600)
            door._path = tmp_path / "other"
            door.server.start(Listener(fileno=plain.detach()))
            assert (await answer(await door.come())).hello.token
            assert len(refused) == 2
            (listener,) = [door.server.entrance._listener]
            assert listener is not None
            door.server.entrance._accept(listener)  # woken for nothing

    asyncio.run(run())


def test_many_who_are_refused_take_a_step_and_a_line_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(entrance, "ACCEPTS_OF_STEP", 3)

    async def run() -> None:
        async with Door(tmp_path / "h", 0).open() as door:
            peers = [await door.come() for _ in range(7)]
            for peer in peers:
                assert "max_connections = 0" in (await answer(peer)).error.message
            door.server.stop()
            door.server.entrance._resume()  # a pause that ends after the server

    asyncio.run(run())
    assert caplog.text.count("connection refused") == 1
