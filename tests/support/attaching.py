"""The handle socket over real books, in this process, and clients of it that speak it by hand."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable, Coroutine
from types import SimpleNamespace
from typing import Any, cast

from support.kept_books import DATA, Books, Keeper
from weightd._proto.v1 import handles_pb2
from weightd._transport.protocol import MAX_DESCRIPTORS
from weightd_daemon.core.limits import UserLimits
from weightd_daemon.handles.attach import AttachHandler
from weightd_daemon.handles.connections import HandleSocketConnections
from weightd_daemon.handles.handle_server import HandleServer

Reply, Request = handles_pb2.HandleReply, handles_pb2.HandleRequest
ATTACH = handles_pb2.AttachRequest(reference="a", lease_file=True)


class Client:
    """A peer on the handle socket, greeted."""

    def __init__(self, server: HandleServer) -> None:
        theirs, self.socket = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        server._enter(theirs)
        self.descriptors: list[int] = []

    async def ask(self, **body: Any) -> Reply:
        self.socket.send(Request(**body).SerializeToString())
        return await self.receive()

    async def receive(self) -> Reply:
        """The next reply. Errors: ConnectionError when the daemon has hung up."""
        while True:
            try:
                frame, descriptors, _, _ = socket.recv_fds(self.socket, 1 << 16, MAX_DESCRIPTORS)
            except BlockingIOError:
                await asyncio.sleep(0)
                continue
            self.descriptors += descriptors
            if not frame:
                raise ConnectionResetError
            return Reply.FromString(frame)

    async def attach(self, request: handles_pb2.AttachRequest = ATTACH) -> handles_pb2.AttachReply:
        reply = await self.ask(attach=request)
        assert reply.HasField("attach"), reply
        return reply.attach

    async def refused(self, **body: Any) -> str:
        """The reason of the error that is the answer."""
        reply = await self.ask(**body)
        assert reply.HasField("error"), reply
        return reply.error.reason

    async def closed(self) -> None:
        """Wait until the daemon hangs up."""
        with contextlib.suppress(ConnectionError):
            while True:
                await self.receive()

    def let_go(self) -> None:
        """Close what came."""
        while self.descriptors:
            os.close(self.descriptors.pop())

    def close(self) -> None:
        self.let_go()
        self.socket.close()


class Counter:
    """A server over books that hold "a"."""

    def __init__(self) -> None:
        self.books = Books(Keeper())
        self.checkpoint = self.books.load("a", DATA["a"])
        self.store = self.books.store
        self.resident: dict[str, Any] = {}
        """By device, the checkpoint that was loaded from the files that are asked for."""
        self.attaches: list[str] = []
        """The codes of the attaches that were counted."""
        self.limits = UserLimits()
        self.connections = HandleSocketConnections(isolated=False, admins=frozenset())
        loads: Any = SimpleNamespace(
            disconnected=lambda _: None, untaken=lambda _: 0,
            find_resident=lambda request: self.resident.get(request.device),
        )  # fmt: skip
        self.attacher = AttachHandler(
            store=self.store, catalog=self.books.catalog, loads=loads, manifests=self.books.manifests,
            locks=self.books.locks, connections=self.connections,
            devices={"host": self.books.device, "GPU-0": cast("Any", self.books.device)}, default_device="host",
            limits=self.limits, now=lambda: 9.0,
        )  # fmt: skip
        self.server = HandleServer(
            connections=self.connections, attacher=self.attacher, max_connections=4,
            on_attach=lambda code, _: self.attaches.append(code),
        )  # fmt: skip
        self.clients: list[Client] = []

    async def come(self) -> Client:
        client = Client(self.server)
        self.clients.append(client)
        assert (await client.ask(hello=handles_pb2.HelloRequest(protocol=1))).hello.token
        return client

    async def attach_in_batches(self) -> None:
        """Attach as a client that acknowledges: afterwards its user has a lease file."""
        client = await self.come()
        await client.attach()
        await client.ask(ack=handles_pb2.BatchAck())
        client.let_go()

    def held(self) -> list[int]:
        """The numbers of the leases that the kernel says are held."""
        return [lease.number for lease in self.store.leases.refresh()]


Test = Callable[[Counter], Coroutine[Any, Any, None]]


def at_the_counter(test: Test) -> Callable[..., None]:
    """A test that runs on a loop."""

    def run(counter: Counter) -> None:
        async def play() -> None:
            async with asyncio.timeout(60):
                try:
                    await test(counter)
                finally:
                    counter.server.stop()

        asyncio.run(play())

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run
