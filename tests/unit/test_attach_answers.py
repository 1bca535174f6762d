"""What a daemon does before an answer of the handle socket and what after it, and what an attach costs: real books."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from support.counting import operations
from support.kept_books import Books, Keeper
from weightd._proto.v1 import handles_pb2
from weightd_daemon.core.limits import UserLimits
from weightd_daemon.handles import connections as module
from weightd_daemon.handles.attach import AttachHandler
from weightd_daemon.handles.connections import HandleSocketConnections
from weightd_daemon.handles.handle_server import HandleServer, _Conversation

HELLO = handles_pb2.HandleRequest(hello=handles_pb2.HelloRequest(protocol=1))
ATTACH = handles_pb2.HandleRequest(attach=handles_pb2.AttachRequest(reference="c0", lease_file=True))
_TURNS = 200
"""Steps of the loop in which an answer that comes at all has come: nothing here waits for a process."""


class Desk:
    """A server of the handle socket over books with some checkpoints, c0, c1, …, and one peer of it."""

    def __init__(self, checkpoints: int) -> None:
        self.keeper = Keeper()
        self.books = Books(self.keeper)
        for number in range(checkpoints):
            self.books.load(f"c{number}", {"t": number.to_bytes(8, "little")})
        self.connections = HandleSocketConnections(isolated=False, admins=frozenset())
        loads: Any = SimpleNamespace(disconnected=lambda _: None)
        self.attacher = AttachHandler(
            store=self.books.store, catalog=self.books.catalog, loads=loads, manifests=self.books.manifests,
            locks=self.books.locks, connections=self.connections, devices={"host": self.books.device},
            default_device="host", limits=UserLimits(), now=lambda: 9.0,
        )  # fmt: skip
        self.server = HandleServer(
            connections=self.connections, attacher=self.attacher, max_connections=4, on_attach=lambda *_: None
        )
        self.theirs, self.peer = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)

    def answered(self) -> str | None:
        """Which answer the peer has got by now."""
        try:
            frame, descriptors, _, _ = socket.recv_fds(self.peer, 1 << 16, 8)
        except BlockingIOError:
            return None
        for descriptor in descriptors:
            os.close(descriptor)
        return handles_pb2.HandleReply.FromString(frame).WhichOneof("body")

    async def ask(self, request: handles_pb2.HandleRequest, done: Callable[[], object]) -> None:
        """Send a request, and let the loop go on until something is done."""
        self.peer.send(request.SerializeToString())
        for _ in range(_TURNS):
            await asyncio.sleep(0)
            if done():
                return
        raise AssertionError(f"{request.WhichOneof('body')} was not served in {_TURNS} steps")

    async def make_room(self, connection: module.HandleSocketConnection) -> None:
        """Have a lease file with room."""
        if (waiting := self.attacher.room(connection, ATTACH.attach)) is not None:
            await waiting

    def close(self) -> None:
        for end in (self.theirs, self.peer):
            end.close()
        self.books.end()
        self.keeper.close()


@pytest.fixture
def open_desk() -> Iterator[Callable[[int], Desk]]:
    """Make desks with so many checkpoints."""
    made: list[Desk] = []

    def of(checkpoints: int) -> Desk:
        made.append(Desk(checkpoints))
        return made[-1]

    yield of
    for desk in made:
        desk.close()


def test_a_hello_that_is_there_is_answered_in_the_step_that_lets_its_peer_in(open_desk: Callable[[int], Desk]) -> None:
    desk = open_desk(0)

    async def run() -> None:
        desk.peer.send(HELLO.SerializeToString())
        desk.server._enter(desk.theirs)
        assert desk.answered() == "hello"
        desk.server.stop()

    asyncio.run(run())


def test_a_hello_that_comes_later_is_answered_then(open_desk: Callable[[int], Desk]) -> None:
    desk = open_desk(0)

    async def run() -> None:
        desk.server._enter(desk.theirs)
        assert desk.answered() is None
        await desk.ask(HELLO, lambda: desk.answered() == "hello")
        desk.server.stop()

    asyncio.run(run())


def test_who_a_peer_is_is_found_out_after_its_answer(
    open_desk: Callable[[int], Desk], monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = open_desk(0)
    answers: list[str | None] = []

    def comm_of(_: int) -> str:
        answers.append(desk.answered())
        return "python"

    monkeypatch.setattr(module, "comm_of", comm_of)
    monkeypatch.setattr(module, "command_of", lambda _: "")

    async def run() -> None:
        desk.server._enter(desk.theirs)
        await desk.ask(HELLO, lambda: answers)
        (connection,) = desk.connections._by_token.values()
        assert (answers, connection.peer.command) == (["hello"], "python")
        desk.server.stop()

    asyncio.run(run())


def test_others_are_told_of_a_lease_when_its_answer_has_gone(open_desk: Callable[[int], Desk]) -> None:
    desk = open_desk(1)
    told: list[tuple[str, str | None]] = []
    desk.books.store.leases._on_event = lambda event: told.append((type(event).__name__, desk.answered()))

    async def run() -> None:
        desk.server._enter(desk.theirs)
        await desk.ask(HELLO, lambda: desk.answered() == "hello")
        await desk.ask(ATTACH, lambda: told)
        assert told == [("LeaseBegun", "attach")]
        desk.server.stop()

    asyncio.run(run())


def test_of_a_lease_whose_answer_cannot_be_sent_others_are_told_before_its_end(
    open_desk: Callable[[int], Desk], monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = open_desk(1)
    told: list[str] = []

    def refuse(*_: object) -> None:
        raise OSError(errno.ETOOMANYREFS, "Too many references")

    desk.books.store.leases._on_event = lambda event: told.append(type(event).__name__)

    async def run() -> None:
        desk.server._enter(desk.theirs)
        await desk.ask(HELLO, lambda: desk.answered() == "hello")
        monkeypatch.setattr(_Conversation, "_send", refuse)
        await desk.ask(ATTACH, lambda: len(told) == 2)
        assert told == ["LeaseBegun", "LeaseEnded"]
        desk.server.stop()

    asyncio.run(run())


def test_an_attach_costs_the_same_however_many_checkpoints_there_are(open_desk: Callable[[int], Desk]) -> None:
    costs = []
    for checkpoints in (5, 50):
        desk = open_desk(checkpoints)
        connection = desk.connections.add(desk.theirs)

        def attach(desk: Desk = desk, connection: module.HandleSocketConnection = connection) -> None:
            answer = desk.attacher.attach(connection, ATTACH.attach)
            desk.attacher.issued(answer)
            answer.locked.close()
            assert desk.attacher.detach(connection, answer.lease)
            while desk.books.store.sharing.go_on():
                pass

        asyncio.run(desk.make_room(connection))
        attach()  # the first reserves numbers, and catches up with what was loaded
        costs.append(operations(attach))
    assert costs[0] == costs[1]
